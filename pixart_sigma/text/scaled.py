"""Weights that ComfyUI's files store as 8-bit floats, each with a scale: the three forms of them.

The first has a tensor `scaled_fp8` and `LAYER.scale_weight` for each layer, the others `LAYER.weight_scale`
and, as JSON, the format of each layer: in the metadata `_quantization_metadata` of the file, or in a tensor
`LAYER.comfy_quant` (comfy/utils.py and comfy/ops.py of ComfyUI).
"""

import json
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files.parts import place

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
SCALES = (".scale_weight", ".weight_scale")
# How activations may be quantised too, which nothing here does.
OF_ACTIVATIONS = (".scale_input", ".input_scale")
MARKER = "scaled_fp8"
FORMAT = ".comfy_quant"


class Float8Weight:
    """An 8-bit float weight (any shape) and its scale, dequantised to float32 only when it is read.

    It answers `tensor[...]`, the way transformers reads the slices of a safetensors file, so that loading
    never holds more than one dequantised weight.
    """

    def __init__(self, weight, scale=None):
        self.weight, self.scale = weight, scale

    def __getitem__(self, index):
        weight = self.weight.float()
        if self.scale is not None:
            scale = self.scale.float()
            weight = weight * (scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1))
        return weight[index]


def pair_scales(weights: dict, metadata: dict[str, str], path: Path, is_linear) -> dict:
    """The weights, those in float8 as Float8Weight with their scales; scales and marks taken out.

    is_linear(key): whether a weight must have a scale in a file that is marked as scaled. Raises
    CheckpointError for another format, and when a scale is missing or does not fit its weight.
    """
    formats = _read_formats(weights, metadata, path)
    marked = MARKER in weights
    scales, plain = {}, {}
    for key, value in weights.items():
        if key.endswith(SCALES):
            scales[key.rpartition(".")[0] + ".weight"] = key, value
        elif key != MARKER and not key.endswith((FORMAT, *OF_ACTIVATIONS)):
            plain[key] = value
    result = {}
    for key, weight in plain.items():
        name, scale = scales.pop(key, ("", None))
        named = formats.get(key)
        if named and weight.dtype == torch.uint8:
            weight = weight.view(FORMATS[named])
        is_float8 = weight.dtype in FORMATS.values()
        if not weight.dtype.is_floating_point:
            raise CheckpointError(
                f"{path}: {key} holds {weight.dtype} numbers, not floating-point weights. "
                "Use an fp32, fp16, bf16 or fp8 file, or a folder that transformers saved."
            )
        if is_float8 and scale is None and (named or (marked and is_linear(key))):
            raise CheckpointError(f"{path} is scaled fp8 but has no scale for {key}. Download it again.")
        if scale is not None and scale.numel() not in (1, *weight.shape[:1]):
            raise CheckpointError(
                f"{path}: the scale of {key} has shape {tuple(scale.shape)}, which does not fit the weight's "
                f"{tuple(weight.shape)}. Only one scale per weight or per row is read."
            )
        result[key] = Float8Weight(weight, scale) if is_float8 or scale is not None else weight
    left_over = {name: scale for name, scale in scales.values()}
    return result | left_over  # a scale without a weight: check_weights names it


def _read_formats(weights: dict, metadata: dict[str, str], path: Path) -> dict[str, str]:
    """The format of each weight that is said to be quantised. Raises CheckpointError for an unknown one."""
    told = {}
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for layer, facts in layers.items():
            told[place(layer + ".weight").bare] = facts["format"]
        for key, value in weights.items():
            if key.endswith(FORMAT):
                told[key.removesuffix(FORMAT) + ".weight"] = json.loads(bytes(value.tolist()))["format"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} says in a way that can not be read how it is quantised: {error!r}. Download it again."
        ) from error
    for key, name in told.items():
        if name not in FORMATS:
            raise CheckpointError(
                f"{path} stores {key} as {name}, which is not read here, only {' and '.join(FORMATS)}. Use "
                "t5xxl_fp16 or t5xxl_fp8_e4m3fn_scaled, or in ComfyUI load it with Load CLIP (type pixart)."
            )
    return told
