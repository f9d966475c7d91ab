"""Small transformers, and the quantised files that gguf and comfy-kitchen make of their weights."""

import json
from dataclasses import replace

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from pixart_sigma.transformer.config import XL_2
from pixart_sigma.transformer.network import build_transformer

WIDTH, PROMPT_WIDTH = 96, 256  # 96 is three blocks of 32, 256 one of the large types


def random_weights(width=WIDTH, layers=2, prompt_width=PROMPT_WIDTH, head_dim=32):
    """A transformer's weights in diffusers' keys, float32."""
    config = replace(
        XL_2,
        num_layers=layers,
        num_attention_heads=width // head_dim,
        attention_head_dim=head_dim,
        caption_channels=prompt_width,
        cross_attention_dim=width,
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {name: weight.shape for name, weight in build_transformer(config).named_parameters()}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def is_linear(name, weight):
    return weight.ndim == 2 and name.endswith(".weight")


def make_input(width=PROMPT_WIDTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 6, generator=generator).to(dtype)
    return latents, torch.tensor([700]), torch.randn(1, 5, width, generator=generator).to(dtype)


def write_gguf(
    path, weights, kind="Q8_0", plain="F32", prefix="", architecture="pixart", random_blocks=False
):
    """The linear weights in a block type where its blocks fit into a row, the others in `plain`.

    Returns all as gguf itself dequantises them. random_blocks: of types that gguf can not write, with scales
    of the usual size.
    """
    writer = gguf.GGUFWriter(path, architecture)
    chance = numpy.random.default_rng(0)
    expected = {}
    for name, weight in weights.items():
        array, wanted = weight.float().numpy(), GGMLQuantizationType[kind]
        if not is_linear(name, weight) or array.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = GGMLQuantizationType[plain]
        if wanted.name == "BF16" or wanted.name not in ("F32", "F16"):
            stored = _random_blocks(array.shape, wanted, chance) if random_blocks else quantize(array, wanted)
            writer.add_tensor(prefix + name, stored, raw_dtype=wanted)
        else:
            stored = quantize(array, wanted)
            writer.add_tensor(prefix + name, stored)
        expected[name] = torch.from_numpy(dequantize(stored, wanted).reshape(array.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _random_blocks(shape, kind, chance):
    """Blocks of random bytes; as float16 each of their pairs is a number below 1."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    blocks = chance.integers(0, 256, (*shape[:-1], shape[-1] // block_size * type_size), dtype=numpy.uint8)
    return blocks & 0x3B if type_size % 2 == 0 else blocks


FORMS = (
    "old fp8",
    "float8_e4m3fn",
    "float8_e5m2",
    "metadata",
    "int8 by tensor",
    "int8 by row",
    "int8 rotated",
    "mxfp8",
    "nvfp4",
)


def quantise_layers(weights, form):
    """Linear weights in a form of ComfyUI's, by comfy-kitchen: (all tensors, metadata, the expected ones)."""
    tensors, layers, expected = {}, {}, {}
    for name, weight in weights.items():
        if not is_linear(name, weight):
            tensors[name] = expected[name] = weight
            continue
        layer = name.removesuffix(".weight")
        stored, facts, expected[name] = _quantise(weight, form)
        tensors |= {layer + ending: tensor for ending, tensor in stored.items()}
        layers[layer] = facts
    metadata = None
    if form == "old fp8":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    elif form == "metadata":
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    else:
        for layer, facts in layers.items():
            tensors[layer + ".comfy_quant"] = torch.tensor(
                list(json.dumps(facts).encode()), dtype=torch.uint8
            )
    return tensors, metadata, expected


def _quantise(weight, form):
    from comfy_kitchen.backends.eager import quantization as kitchen

    if form in ("old fp8", "float8_e4m3fn", "float8_e5m2", "metadata"):
        dtype = torch.float8_e5m2 if form == "float8_e5m2" else torch.float8_e4m3fn
        scale = weight.abs().max() / torch.finfo(dtype).max
        stored = kitchen.quantize_per_tensor_fp8(weight, scale, dtype)
        name = ".scale_weight" if form == "old fp8" else ".weight_scale"
        beside = ".scale_input" if form == "old fp8" else ".input_scale"
        facts = {"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True}
        expected = kitchen.dequantize_per_tensor_fp8(stored, scale, torch.float32)
        return {".weight": stored, name: scale, beside: torch.tensor(1.0)}, facts, expected
    if form.startswith("int8"):
        facts = {"format": "int8_tensorwise"}
        if form == "int8 rotated":
            size = 64 if weight.shape[1] % 64 == 0 else 16
            facts |= {"convrot": True, "convrot_groupsize": size}
            stored, scale = kitchen.quantize_int8_convrot_weight(weight, size)
            expected = kitchen.dequantize_int8_convrot_weight(stored, scale, size)
        else:
            by_row = form == "int8 by row"
            quantise = kitchen.quantize_int8_rowwise if by_row else kitchen.quantize_int8_tensorwise
            stored, scale = quantise(weight)
            expected = kitchen.dequantize_int8_simple(stored, scale)
        return {".weight": stored, ".weight_scale": scale}, facts, expected
    if form == "mxfp8":
        stored, scale = kitchen.quantize_mxfp8(weight)
        expected = kitchen.dequantize_mxfp8(stored, scale, torch.float32)
        return {".weight": stored, ".weight_scale": scale}, {"format": "mxfp8"}, expected
    whole = weight.abs().max() / (448 * 6)
    stored, scale = kitchen.quantize_nvfp4(weight, whole)
    expected = kitchen.dequantize_nvfp4(stored, whole, scale, torch.float32)
    return (
        {".weight": stored, ".weight_scale": scale, ".weight_scale_2": whole},
        {"format": "nvfp4"},
        expected,
    )
