"""What bitsandbytes keeps beside a quantised weight, checked before its native kernels index by it: they ask
for no bounds, and a wrong one reads other memory or ends the process.

The names and layouts are those of bitsandbytes' QuantState.as_dict and Int8Params (bitsandbytes/functional.py
and nn/modules.py).
"""

from math import prod
from pathlib import Path
from typing import Any

import torch

from ..choices import T5_PRECISIONS
from ..files.reading import parse_json, parsing

STATE = ".quant_state.bitsandbytes__"  # and the name of the 4-bit type
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTED_IN = ("float32", "float16", "bfloat16")
CODES_4BIT, CODES_8BIT = 16, 256  # numbers that a code stands for
FORMATS = 4  # of int8 weights, of which the first is by row
AGAIN = "Quantise the encoder again, with `pixart-sigma quantize-t5`."


def needed_beside(precision: str) -> set[str]:
    """The endings of what a weight of this precision cannot be without."""
    return {"SCB"} if T5_PRECISIONS[precision].bits == 8 else {".absmax", ".quant_map"}


def check_quantised(key: str, weights: dict, shape: tuple[int, ...], precision: str, path: Path) -> None:
    """CheckpointError unless a quantised weight (rows, columns), and all beside it, fit together.

    weights: all of the file; on the meta device their shapes and dtypes are checked, and not their numbers.
    """
    with parsing(path, f"holds a quantised {key} that can not be used", AGAIN):
        if len(shape) != 2:
            raise ValueError(f"it has the shape {shape}, and no such layer is quantised")
        if T5_PRECISIONS[precision].bits == 8:
            _check_int8(key, weights, shape)
        else:
            _check_4bit(key, weights, shape, precision)


def _check_int8(key: str, weights: dict, shape: tuple[int, ...]) -> None:
    weight = weights[key]
    if tuple(weight.shape) != shape:
        raise ValueError(f"it has shape {tuple(weight.shape)}, not {shape}")
    if weight.dtype != torch.int8:
        raise ValueError(f"it holds {weight.dtype} numbers")
    _check_numbers("SCB", weights[key.removesuffix("weight") + "SCB"], shape[0], (torch.float32,))
    form = weights.get(key + "_format")
    if form is not None and (form.numel() != 1 or not form.is_meta and int(form) >= FORMATS):
        raise ValueError("its weight_format is none that is known")


def _check_4bit(key: str, weights: dict, shape: tuple[int, ...], precision: str) -> None:
    numbers = prod(shape)
    if weights[key].nbytes != (numbers + 1) // 2:
        raise ValueError(f"it has {weights[key].nbytes} bytes for {numbers} numbers of 4 bits")
    state = weights.get(f"{key}{STATE}{precision}")
    if state is None:
        raise ValueError(f"its quant_state of {precision} is missing")
    if state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError(f"its quant_state is {tuple(state.shape)} in {state.dtype}")
    _check_numbers("quant_map", weights[f"{key}.quant_map"], CODES_4BIT, (torch.float32,))
    absmax, nested = weights[f"{key}.absmax"], weights.get(f"{key}.nested_absmax")
    if state.is_meta:
        return
    said = parse_json(bytes(state.tolist()))
    block_size = said["blocksize"]
    if said["quant_type"] != precision or tuple(said["shape"]) != shape or said["dtype"] not in COMPUTED_IN:
        raise ValueError(f"its quant_state says {said}, and it is {shape} in {precision}")
    blocks = -(-numbers // _block_size(block_size))
    if nested is None:
        if any(name.startswith("nested") for name in said):
            raise ValueError("its quant_state names scales that are missing")
        _check_numbers("absmax", absmax, blocks, (torch.float32,))
        return
    _check_numbers("absmax", absmax, blocks, (torch.uint8,))
    groups = -(-blocks // _block_size(said["nested_blocksize"]))
    _check_numbers("nested_absmax", nested, groups, (torch.float32,))
    codes = weights[f"{key}.nested_quant_map"]
    _check_numbers("nested_quant_map", codes, CODES_8BIT, (torch.float32,))
    if said["nested_dtype"] not in COMPUTED_IN or not abs(float(said["nested_offset"])) < float("inf"):
        raise ValueError(f"its quant_state says {said}")


def _block_size(said: Any) -> int:
    if type(said) is not int or said not in BLOCK_SIZES:
        raise ValueError(f"it is said to be in blocks of {said!r}")
    return said


def _check_numbers(name: str, found: torch.Tensor, count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if found.numel() != count or found.dtype not in dtypes or found.ndim > 2:
        raise ValueError(
            f"its {name} is {tuple(found.shape)} in {found.dtype}, and {count} numbers are needed"
        )
    if found.dtype.is_floating_point and not found.is_meta and not found.isfinite().all():
        raise ValueError(f"its {name} has numbers that are not finite")
