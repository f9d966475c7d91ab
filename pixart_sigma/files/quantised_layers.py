"""Weights that ComfyUI's files store quantised, each layer with a format and scales of its own.

The first form, of scaled fp8 alone, has a tensor `scaled_fp8` and `LAYER.scale_weight` for each layer. The
others have `LAYER.weight_scale` and, as JSON, the format of each layer: in the metadata
`_quantization_metadata` of the file, or in a tensor `LAYER.comfy_quant` (comfy/utils.py and comfy/ops.py of
ComfyUI). The arithmetic is that of comfy-kitchen's formulas for any device.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .parts import place
from .quantised_weights import QuantisedWeight
from .reading import AGAIN, parse_json, parsing

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
INT8, MXFP8, NVFP4 = "int8_tensorwise", "mxfp8", "nvfp4"
READ = (*FLOAT8, INT8, MXFP8, NVFP4)
# What are read nowhere but in ComfyUI.
REFUSED = {"convrot_w4a4", "asym_w4a8_int8"}
SCALES = (".scale_weight", ".weight_scale")
SECOND_SCALE = ".weight_scale_2"  # of nvfp4
# How activations may be quantised too, which nothing here does.
OF_ACTIVATIONS = (".scale_input", ".input_scale")
MARKER = "scaled_fp8"
FORMAT = ".comfy_quant"
LAYER_FORMATS = "_quantization_metadata"  # in the header of a file
USUAL_GROUP = 256  # of rotated int8, where its JSON says none
# The numbers of two bits of exponent and one of mantissa, by their four bits.
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def pair_scales(
    weights: dict, metadata: dict[str, str], path: Path, is_linear: Callable[[str], bool]
) -> dict:
    """The weights, quantised ones as QuantisedWeight with their scales; scales and marks taken out.

    weights: by bare names; on the meta device too, but for the tensors of FORMAT. is_linear(key): whether an
    fp8 weight must have a scale in a file that is marked as scaled. What has a scale and no known form stays
    as it is, beside its scale. Raises CheckpointError for another format, and when a scale is missing or does
    not fit its weight.
    """
    formats = _read_formats(weights, metadata, path)
    marked = MARKER in weights
    scales, seconds, plain = {}, {}, {}
    for key, value in weights.items():
        if key.endswith(SCALES):
            scales[key.rpartition(".")[0] + ".weight"] = key, value
        elif key.endswith(SECOND_SCALE):
            seconds[key.removesuffix(SECOND_SCALE) + ".weight"] = key, value
        elif key != MARKER and not key.endswith((FORMAT, *OF_ACTIVATIONS)):
            plain[key] = value
    result: dict[str, Any] = {}
    for key, weight in plain.items():
        facts = formats.get(key, {})
        named = facts.get("format")
        if isinstance(weight, QuantisedWeight):  # GGUF needs no scales
            result[key] = weight
            continue
        if named is None and (key not in scales or not weight.dtype.is_floating_point):
            if marked and weight.dtype in FLOAT8.values() and is_linear(key):
                raise _without_scale(key, path)
            result[key] = weight
            continue
        scale = scales.pop(key, ("", None))[1]
        if scale is None:
            raise _without_scale(key, path)
        if named in (None, *FLOAT8):
            result[key] = _scaled(named, weight, scale, key, path)
        elif named == INT8:
            result[key] = _int8(facts, weight, scale, key, path)
        elif named == MXFP8:
            result[key] = _mxfp8(weight, scale, key, path)
        else:
            second = seconds.pop(key, ("", None))[1]
            if second is None:
                raise _without_scale(key, path)
            result[key] = _nvfp4(weight, scale, second, key, path)
    # A scale that belongs to no weight here is named by whoever knows which weights there are.
    left_over = dict([*scales.values(), *seconds.values()])
    return result | left_over


def _read_formats(weights: dict, metadata: dict[str, str], path: Path) -> dict[str, dict]:
    """The facts of each weight that is said to be quantised. Raises CheckpointError for an unknown format."""
    told: dict[str, dict] = {}
    said = "says in a way that can not be read how it is quantised"
    with parsing(path, said, AGAIN):
        layers = parse_json(metadata.get(LAYER_FORMATS, "{}")).get("layers", {})
        for layer, facts in layers.items():
            told[place(layer + ".weight").bare] = dict(facts)
        for key, value in weights.items():
            if key.endswith(FORMAT):
                told[key.removesuffix(FORMAT) + ".weight"] = dict(parse_json(bytes(value.tolist())))
        named = {key: facts["format"] for key, facts in told.items()}
    for key, name in named.items():
        if name not in READ:
            known = "only ComfyUI's own loaders read it" if name in REFUSED else "it is unknown"
            raise CheckpointError(
                f"{path} stores {key} as {name}, which is not read here ({known}), only {', '.join(READ)}. "
                "Choose a file in int8, scaled fp8, GGUF, fp16 or bf16 of the same model."
            )
    return told


def _scaled(form: str | None, weight, scale, key: str, path: Path) -> QuantisedWeight:
    """float8, or any floats, with one scale, or one for each row."""
    if form is not None and weight.dtype == torch.uint8:
        weight = weight.view(FLOAT8[form])
    if not weight.dtype.is_floating_point:
        raise _misfit(key, f"holds {weight.dtype} numbers and is said to be {form}", path)
    name = form or str(weight.dtype).removeprefix("torch.")
    parts = {"weight": weight, "scale": _by_row(scale, weight, key, path)}
    return QuantisedWeight(name, tuple(weight.shape), parts, multiply)


def _int8(facts: dict, weight, scale, key: str, path: Path) -> QuantisedWeight:
    if weight.dtype == torch.uint8:
        weight = weight.view(torch.int8)
    if weight.dtype != torch.int8:
        raise _misfit(key, f"holds {weight.dtype} numbers and is said to be {INT8}", path)
    parts = {"weight": weight, "scale": _by_row(scale, weight, key, path)}
    inner = facts.get("params")
    facts = (inner if isinstance(inner, dict) else {}) | facts
    if not facts.get("convrot"):
        return QuantisedWeight(INT8, tuple(weight.shape), parts, multiply)
    size = facts.get("convrot_groupsize", USUAL_GROUP)
    if not isinstance(size, int) or size not in (4, 16, 64, 256, 1024) or weight.shape[-1] % size:
        raise _misfit(key, f"{tuple(weight.shape)} is said to be rotated in groups of {size!r}", path)
    formula = functools.partial(multiply, group=size)
    return QuantisedWeight(f"{INT8} (convrot {size})", tuple(weight.shape), parts, formula)


def _mxfp8(weight, scale, key: str, path: Path) -> QuantisedWeight:
    """float8 with a power of two for each run of 32 numbers in a row (OCP Microscaling Formats, 2023)."""
    if weight.dtype == torch.uint8:
        weight = weight.view(torch.float8_e4m3fn)
    if weight.ndim != 2 or weight.shape[1] % 32 or weight.dtype != torch.float8_e4m3fn:
        raise _misfit(key, f"{tuple(weight.shape)} of {weight.dtype} is said to be {MXFP8}", path)
    scales = from_tiles(scale, weight.shape[0], weight.shape[1] // 32, torch.float8_e8m0fnu, key, path)
    return QuantisedWeight(MXFP8, tuple(weight.shape), {"weight": weight, "scale": scales}, multiply_runs)


def _nvfp4(weight, scale, second, key: str, path: Path) -> QuantisedWeight:
    """Two numbers of four bits in a byte, a float8 for each 16 of them in a row, and one scale for all."""
    if weight.dtype != torch.uint8 or weight.ndim != 2 or weight.shape[1] % 8 or second.numel() != 1:
        raise _misfit(key, f"{tuple(weight.shape)} of {weight.dtype} is said to be {NVFP4}", path)
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    scales = from_tiles(scale, rows, columns // 16, torch.float8_e4m3fn, key, path)
    parts = {"weight": weight, "scale": scales, "second": second.reshape(())}
    return QuantisedWeight(NVFP4, (rows, columns), parts, _unpack_float4)


def multiply(weight: torch.Tensor, scale: torch.Tensor, group: int = 0) -> torch.Tensor:
    """weight (N, ...) times its scale, () or (N, 1, ...), in float32; turned back where its rows were rotated
    in groups."""
    weight = weight.float() * scale.float()
    if not group:
        return weight
    turned = weight.unflatten(-1, (-1, group)) @ rotation(group, weight.device)
    return turned.flatten(-2)


def multiply_runs(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight (N, K) times the scale (N, K / n) of each run of n numbers, in float32."""
    runs = weight.float().unflatten(1, (scale.shape[1], -1))
    return (runs * scale.float()[..., None]).flatten(1)


def _unpack_float4(weight: torch.Tensor, scale: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    numbers = torch.tensor(FLOAT4, device=weight.device)
    pairs = torch.stack([weight >> 4, weight & 15], dim=-1).flatten(1)
    return multiply_runs(numbers[pairs.int()], second.float() * scale.float())


def rotation(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The rotation (size, size) of groups in "convrot": a regular Hadamard matrix, which is orthogonal and
    its own inverse. `size` is a power of four."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return (matrix / size**0.5).to(device)


def from_tiles(scale, rows: int, columns: int, dtype: torch.dtype, key: str, path: Path) -> torch.Tensor:
    """Scales (rows, columns) out of cuBLAS' order: tiles of 128 x 4, of which the rows r, r + 32, ... lie
    side by side, padded to whole tiles."""
    down, across = -(-rows // 128), -(-columns // 4)
    if scale.numel() != down * across * 512 or scale.dtype.itemsize != 1:
        raise _misfit(key, f"has scales {tuple(scale.shape)} of {scale.dtype}", path)
    tiles = scale.view(torch.uint8).reshape(down, across, 32, 4, 4)
    ordered = tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)
    return ordered[:rows, :columns].contiguous().view(dtype)


def _by_row(scale, weight, key: str, path: Path):
    """The scale () of all, or one for each row, in a shape that multiplies the weight."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() != weight.shape[0]:
        raise CheckpointError(
            f"{path}: the scale of {key} has shape {tuple(scale.shape)}, which does not fit the weight's "
            f"{tuple(weight.shape)}. Only one scale per weight or per row is read."
        )
    return scale.reshape(-1, *(1,) * (weight.ndim - 1))


def _without_scale(key: str, path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is quantised but has no scale for {key}. Download it again.")


def _misfit(key: str, what: str, path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: {key} {what}, which does not fit together. Download it again.")
