"""Quantised transformers: each form against its own library, the network against a plain one, memory."""

import json

import pytest
import torch
from quantised_files import (
    FORMS,
    WIDTH,
    is_linear,
    make_input,
    quantise_layers,
    random_weights,
    write_gguf,
)
from safetensors.torch import load_file, save_file

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.files.quantised_weights import QuantisedWeight, dequantised
from pixart_sigma.inspection import describe
from pixart_sigma.memory.measure import peak_bytes, weight_bytes
from pixart_sigma.planner import Models, plan
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
from pixart_sigma.transformer.config import XL_2
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.quantised import QuantisedLinear, working_nbytes
from pixart_sigma.transformer.stage import Pass, predict_needs
from pixart_sigma.transformer.streaming import StreamedTransformer

pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen, which ComfyUI comes with")
GGUF_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
LAYER = "transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture
def write(tmp_path, weights, to_original):
    """`write(form, keys="diffusers", prefix="") -> (Path, the weights in diffusers' keys that it means)`.

    Of the authors' keys the fused ones are quantised as a whole, as their owners do it.
    """

    def make(form, keys="diffusers", prefix=""):
        named = to_original(weights) if keys == "original" else weights
        if form.startswith("gguf "):
            path = tmp_path / "small.gguf"
            expected = write_gguf(path, named, form.removeprefix("gguf "), prefix=prefix)
        else:
            path = tmp_path / "small.safetensors"
            tensors, metadata, expected = quantise_layers(named, form)
            if metadata:
                metadata = {
                    key: text.replace('"transformer_', f'"{prefix}transformer_')
                    for key, text in metadata.items()
                }
            save_file(
                {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata
            )
        return path, (in_diffusers_keys(expected, weights) if keys == "original" else expected)

    return make


def in_diffusers_keys(original, weights):
    """The expected weights of original keys, split by hand."""
    from pixart_sigma.transformer.keys import to_diffusers_keys

    split = {}
    for name, tensor in original.items():
        names = to_diffusers_keys(name)
        split |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    assert split.keys() == weights.keys()
    return split


def plain(path, expected):
    """A file of the dequantised weights."""
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, path)
    return path


@pytest.mark.parametrize("keys", ["diffusers", "original"])
@pytest.mark.parametrize("form", [*(f"gguf {kind}" for kind in GGUF_KINDS), *FORMS])
def test_each_form_is_read_as_its_own_library_does(write, weights, form, keys):
    path, expected = write(form, keys)
    found = inspect(path)
    assert (found.key_style, found.dtype) == (keys, torch.float32)
    read = load_transformer_state_dict(found)
    assert read.keys() == expected.keys()
    for name, weight in read.items():
        assert isinstance(weight, QuantisedWeight) == is_linear(name, weights[name]), name
        assert torch.equal(dequantised(weight), expected[name]), name
    assert [name for name, _ in found.quantised] == [
        name for name, weight in read.items() if isinstance(weight, QuantisedWeight)
    ]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "module."])
@pytest.mark.parametrize("form", ["gguf Q8_0", "old fp8", "metadata", "int8 rotated"])
def test_a_prefix_stands_in_front_of_all(write, form, prefix):
    path, expected = write(form, prefix=prefix)
    read = load_transformer_state_dict(inspect(path))
    assert all(torch.equal(dequantised(weight), expected[name]) for name, weight in read.items())


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form", ["gguf Q5_0", "gguf Q8_0", "old fp8", "int8 by row", "int8 rotated", "mxfp8", "nvfp4"]
)
def test_the_network_equals_the_dequantised_one_bit_for_bit(write, tmp_path, form, dtype, stream, parked):
    path, expected = write(form, "original")
    reference = load_transformer(plain(tmp_path / "plain.safetensors", expected), dtype, variant="1024")
    transformer = load_transformer(path, dtype, variant="1024", stream=stream)
    assert isinstance(transformer.transformer_blocks[0].attn1.to_q, QuantisedLinear)
    latents, timestep, embeds = make_input(dtype=dtype)
    for _ in range(2):
        result = transformer(latents, timestep, embeds)
        assert torch.equal(result, reference(latents, timestep, embeds))
    assert isinstance(transformer, StreamedTransformer) == stream


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_changes_are_made_of_the_dequantised_weight(write, tmp_path, stream, parked):
    path, expected = write("gguf Q8_0")
    bias = "transformer_blocks.0.attn1.to_q.bias"
    changes = {LAYER: lambda weight: weight * 1.5 + 0.25, bias: lambda bias: bias - 1}
    merged = {name: changes[name](weight) if name in changes else weight for name, weight in expected.items()}
    reference = load_transformer(
        plain(tmp_path / "plain.safetensors", merged), torch.bfloat16, variant="1024"
    )
    latents, timestep, embeds = make_input(dtype=torch.bfloat16)
    transformer = load_transformer(path, torch.bfloat16, variant="1024", stream=stream, changes=changes)
    for _ in range(2):
        assert torch.equal(transformer(latents, timestep, embeds), reference(latents, timestep, embeds))
    unchanged = load_transformer(path, torch.bfloat16, variant="1024")
    assert not torch.equal(unchanged(latents, timestep, embeds), reference(latents, timestep, embeds))
    with pytest.raises(SigmaError, match="A change is for surprise"):
        load_transformer(path, changes={"surprise": lambda weight: weight})


def test_stored_bytes_keep_their_place_and_dtype(write):
    path, _ = write("int8 rotated")
    transformer = load_transformer(path, torch.float32, variant="1024")
    layer = transformer.transformer_blocks[0].ff.net[2]
    before = layer.weight.clone()
    transformer.to(torch.bfloat16)
    assert layer.stored_weight.dtype == layer.stored_scale.dtype == torch.uint8
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before.to(torch.bfloat16))
    assert not any(weight.requires_grad for weight in transformer.parameters())


# ---- memory


@pytest.mark.parametrize("form", ["gguf Q5_0", "int8 by row", "nvfp4"])
def test_bytes_are_those_that_are_stored(write, form):
    path, expected = write(form)
    stored = load_transformer_state_dict(inspect(path))
    plain = sum(weight.numel() * 2 for weight in stored.values() if not isinstance(weight, QuantisedWeight))
    quantised = sum(weight.nbytes for weight in stored.values() if isinstance(weight, QuantisedWeight))
    transformer = load_transformer(path, torch.bfloat16, variant="1024")
    for weight in transformer.parameters():  # out of the mapped file, which is counted as a whole
        weight.data = weight.data.clone()
    assert weight_bytes(transformer) == plain + quantised
    checkpoint = inspect(path)
    work = Pass(64, 64)
    needs = predict_needs(checkpoint.config, work, torch.bfloat16, "cuda", False, checkpoint.quantised)
    assert needs.weights == plain + quantised
    assert predict_needs(checkpoint.config, work, torch.bfloat16, "cuda", False).weights == 2 * sum(
        tensor.numel() for tensor in expected.values()
    )


def test_a_q5_0_file_of_the_published_size_takes_less_than_half_a_gigabyte():
    """610 million parameters, of which each 32 take 22 bytes."""
    from pixart_sigma.files.gguf import BlockType
    from pixart_sigma.transformer.network import build_transformer

    blocks = BlockType("Q5_0", 32, 22)
    parameters = build_transformer(XL_2).named_parameters()
    quantised = tuple(
        (name, blocks.outline(tuple(weight.shape))) for name, weight in parameters if is_linear(name, weight)
    )
    work = Pass(1024, 1024)
    resident = predict_needs(XL_2, work, torch.bfloat16, "cuda", False, quantised)
    whole = predict_needs(XL_2, work, torch.bfloat16, "cuda", False)
    assert 0.41e9 < resident.weights < 0.43e9 < 1.2e9 < whole.weights
    assert whole.peak - resident.peak > 0.7e9
    streamed = predict_needs(XL_2, work, torch.bfloat16, "stream", False, quantised)
    assert streamed.ram < 0.42e9 and streamed.weights < 0.05e9


@pytest.mark.parametrize("form", ["gguf Q5_0", "gguf Q8_0", "int8 rotated", "mxfp8", "nvfp4"])
def test_a_layer_is_dequantised_in_the_bytes_that_are_counted(write, form):
    path, _ = write(form)
    transformer = load_transformer(path, torch.bfloat16, variant="1024")
    layer = transformer.adaln_single.linear
    peak = peak_bytes(torch.device("cpu"), lambda: layer.weight)
    counted = working_nbytes(inspect(path).quantised)
    assert counted == 10 * layer.in_features * layer.out_features
    assert 0.75 * counted < peak <= counted


def test_the_planner_counts_what_is_stored(write, pipeline_folder):
    path, _ = write("gguf Q5_0")
    models = Models.read(inspect(path), None, pipeline_folder / "vae")
    settings, ways = Settings(width=1024, height=1024), Ways(budget=4e9)
    made = plan(settings, ways, models)
    needs = predict_needs(
        models.transformer, Pass(1024, 1024), torch.bfloat16, "auto", False, models.quantised
    )
    assert made.stages["transformer"].weights == needs.weights
    assert (
        needs.weights
        < sum(weight.nbytes for weight in load_transformer(path, torch.bfloat16).parameters()) + 1
    )


# ---- words


def test_inspect_says_the_quantisation_and_the_bytes(write):
    path, _ = write("gguf Q5_0", "original")
    words = describe(path)
    stored = load_transformer_state_dict(inspect(path)).values()
    nbytes = sum(weight.nbytes for weight in stored if isinstance(weight, QuantisedWeight))
    assert f"original keys, Q5_0 ({nbytes / 1e6:,.1f} MB), float32 (" in words
    assert "int8_tensorwise (convrot 16)" in describe(write("int8 rotated")[0])


@pytest.mark.parametrize("form", ["convrot_w4a4", "asym_w4a8_int8", "float7"])
def test_a_format_that_is_not_read_is_named(write, form):
    path, _ = write("int8 by row")
    tensors = load_file(path)
    layer = LAYER.removesuffix(".weight")
    facts = json.dumps({"format": form}).encode()
    tensors[layer + ".comfy_quant"] = torch.tensor(list(facts), dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"stores {LAYER} as {form}.* Choose a file in int8"):
        inspect(path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda layer: layer.pop("weight_scale"), "has no scale for"),
        (lambda layer: layer.update(weight_scale=torch.ones(5)), "does not fit the weight's"),
        (lambda layer: layer.update(weight=layer["weight"].float()), "is said to be int8_tensorwise"),
        (lambda layer: layer.update(weight=layer["weight"][:-1]), "does not fit the weight's"),
        (
            lambda layer: layer.update(comfy_quant=torch.zeros(3, dtype=torch.uint8)),
            "in a way that can not be",
        ),
        (lambda layer: layer.update(comfy_quant=_json([1])), "in a way that can not be"),
        (lambda layer: layer.update(comfy_quant=_json(_rotated(256))), "rotated in groups of 256"),
        (lambda layer: layer.update(comfy_quant=_json(_rotated("64"))), "rotated in groups of '64'"),
        (lambda layer: layer.update(comfy_quant=_json(_rotated(0))), "rotated in groups of 0"),
        (lambda layer: layer.update(comfy_quant=_json({"format": "mxfp8"})), "said to be mxfp8"),
        (
            lambda layer: layer.update(comfy_quant=_json({"format": "nvfp4"})),
            "has no scale for|said to be nvfp4",
        ),
        (lambda layer: layer.update(surprise=torch.ones(2)), "surprise"),
    ],
)
def test_scales_that_do_not_fit_are_named(write, edit, words):
    path, _ = write("int8 by row")
    tensors = load_file(path)
    prefix = LAYER.removesuffix("weight")
    layer = {
        name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)
    }
    edit(layer)
    save_file(tensors | {prefix + name: tensor for name, tensor in layer.items()}, path)
    with pytest.raises(CheckpointError, match=words):
        inspect(path)


def _json(facts):
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def _rotated(size):
    return {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": size}}


def test_scales_in_tiles_of_another_size_are_named(write):
    for form in ("mxfp8", "nvfp4"):
        path, _ = write(form)
        tensors = load_file(path)
        name = LAYER + "_scale"
        tensors[name] = tensors[name].view(torch.uint8)[:64].view(tensors[name].dtype)
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=f"{LAYER} has scales"):
            inspect(path)


def test_a_marked_file_without_one_scale_is_named(write):
    path, _ = write("old fp8")
    tensors = load_file(path)
    del tensors[LAYER.removesuffix("weight") + "scale_weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"no scale for {LAYER}"):
        inspect(path)


def test_at_the_published_width_rows_are_split_within_a_fused_layer(tmp_path):
    """1152 is 36 blocks of 32 and no multiple of 256; scales of nvfp4 and mxfp8 come in tiles of 128 rows."""
    fused = 0.05 * torch.randn(3 * 1152, 1152, generator=torch.Generator().manual_seed(0))
    for form in ("int8 rotated", "mxfp8", "nvfp4"):
        from pixart_sigma.files.quantised_layers import pair_scales

        tensors, metadata, expected = quantise_layers({"qkv.weight": fused}, form)
        weight = pair_scales(tensors, metadata or {}, tmp_path, lambda name: True)["qkv.weight"]
        for part, wanted in zip(weight.chunk(3), expected["qkv.weight"].chunk(3), strict=True):
            assert torch.equal(part.dequantise(), wanted)
            assert part.nbytes < weight.nbytes / 2.9
    write_gguf(tmp_path / "one.gguf", {"qkv.weight": fused}, "Q5_1")
    from pixart_sigma.files.weight_files import read_state_dict

    weight = read_state_dict(tmp_path / "one.gguf")["qkv.weight"]
    assert weight.nbytes == fused.numel() // 32 * 24
    joined = torch.cat([part.dequantise() for part in weight.chunk(3)])
    assert torch.equal(joined, weight.dequantise())
    assert (joined - fused).norm() / fused.norm() < 0.04


def test_rows_of_a_quantised_weight(write):
    path, expected = write("nvfp4")
    weight = load_transformer_state_dict(inspect(path))[LAYER]
    assert weight.shape == (WIDTH, WIDTH) and weight.numel() == WIDTH**2
    assert torch.equal(weight[5], expected[LAYER][5])
    assert torch.equal(weight[2:4], expected[LAYER][2:4])
    picked = weight.select(torch.tensor([7, 3, 7]))
    assert torch.equal(picked.dequantise(), expected[LAYER][[7, 3, 7]])
