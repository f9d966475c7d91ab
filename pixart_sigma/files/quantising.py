"""Weights quantised to be stored, the inverse of `quantised_layers` and `gguf_blocks`: what is stored, and
with it the numbers that a reader makes of it."""

import functools
import json
from collections.abc import Callable

import torch

from .gguf import block_type
from .quantised_layers import INT8, multiply, rotation
from .quantised_weights import QuantisedWeight

# How many neighbours in a row are rotated together: the first that divides it. ComfyUI's usual 256 does not
# divide 1152.
GROUPS = (64, 16, 4)
FP8 = torch.float8_e4m3fn
LEAST_SCALE = 1e-30  # of a row of zeros


def rotation_group(columns: int) -> int:
    """How many neighbours `quantise_int8` rotates together in a row of so many numbers; 0 for none."""
    return next((size for size in GROUPS if columns % size == 0), 0)


def quantise_int8(weight: torch.Tensor) -> QuantisedWeight:
    """weight (N, K) in float32, rotated in groups of GROUPS, in int8 with a scale for each row (N, 1): the
    "int8_tensorwise" of ComfyUI with "convrot"."""
    group = rotation_group(weight.shape[1])
    if group:
        turned = weight.unflatten(1, (-1, group)) @ rotation(group, weight.device)
        weight = turned.flatten(1)
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=LEAST_SCALE)
    stored = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    name = f"{INT8} (convrot {group})" if group else INT8
    formula = functools.partial(multiply, group=group)
    return QuantisedWeight(name, tuple(weight.shape), {"weight": stored, "scale": scale}, formula)


def quantise_fp8(weight: torch.Tensor) -> QuantisedWeight:
    """weight (N, K) in float32 in float8_e4m3fn with one scale ()."""
    most = torch.finfo(FP8).max
    scale = (weight.abs().amax() / most).clamp(min=LEAST_SCALE)
    stored = (weight / scale).clamp(-most, most).to(FP8)
    return QuantisedWeight("float8_e4m3fn", tuple(weight.shape), {"weight": stored, "scale": scale}, multiply)


def quantise_blocks(weight: torch.Tensor, name: str) -> QuantisedWeight:
    """weight (N, K) in float32 in blocks of a type of GGUF, such as "Q8_0", by the package gguf."""
    blocks = block_type(name)
    if weight.is_meta:
        return blocks.outline(tuple(weight.shape))
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    stored = torch.from_numpy(quantize(weight.cpu().numpy(), GGMLQuantizationType[name]))
    return blocks.weight(tuple(weight.shape), stored)


def layer_facts(weight: QuantisedWeight) -> torch.Tensor:
    """What ComfyUI reads of a layer that `quantise_int8` or `quantise_fp8` made: JSON, in bytes."""
    facts: dict[str, str | bool | int]
    if not weight.form.startswith(INT8):
        # Its float8 matrix products would round the layer's input too, without a scale, and cut it at 448.
        facts = {"format": weight.form, "full_precision_matrix_mult": True}
    else:
        facts = {"format": INT8}
        if group := rotation_group(weight.shape[1]):
            facts |= {"convrot": True, "convrot_groupsize": group}
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


# weight (N, K) in float32 -> what is stored of it. On the meta device too, for its shapes.
Quantise = Callable[[torch.Tensor], QuantisedWeight]
# By the words of TRANSFORMER_FORMS.
QUANTISE: dict[str, Quantise] = {
    "int8": quantise_int8,
    "fp8": quantise_fp8,
    "q8_0": functools.partial(quantise_blocks, name="Q8_0"),
    "q5_0": functools.partial(quantise_blocks, name="Q5_0"),
    "q4_0": functools.partial(quantise_blocks, name="Q4_0"),
}
