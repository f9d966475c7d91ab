"""Transformers' T5 encoder in a precision, from weights that were checked."""

import logging
import math
from importlib.util import find_spec
from pathlib import Path

import torch

from ..choices import QUANTIZED, T5_PRECISIONS
from ..devices import half_precision
from ..errors import CheckpointError, SigmaError
from ..memory.out_of_memory import is_out_of_memory


def build_model(config, weights: dict, precision: str, device: torch.device, path: Path):
    """Build transformers' T5EncoderModel from weights that were checked, quantising layer by layer."""
    from transformers import T5EncoderModel

    dtype = compute_dtype(precision, device)
    quantization = None
    if precision in QUANTIZED:
        check_packages(precision)
        quantization = quantization_config(config, precision, dtype)
        if T5_PRECISIONS[precision].bits == 4:
            check_4bit_widths(config, precision)
        quiet_int8_casts()
    try:
        model, info = T5EncoderModel.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization,
            output_loading_info=True,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} could not be loaded as a T5 encoder in {precision}: {error}"
        ) from error
    # transformers fills what it misses with random numbers
    absent = sorted(info["missing_keys"])
    if absent:
        raise CheckpointError(f"{path}: the weight {absent[0]} was not loaded. The file is incomplete.")
    return model.eval().requires_grad_(False)


def check_packages(precision: str) -> None:
    """Raise SigmaError for a quantised precision without its libraries."""
    for package in ("bitsandbytes", "accelerate") if precision in QUANTIZED else ():
        if find_spec(package) is None:
            raise SigmaError(f"Precision {precision} needs {package}: pip install {package}, or choose bf16.")


def quantization_config(config, precision: str, dtype: torch.dtype):
    """BitsAndBytesConfig of a precision; None for a folder that carries its own, which then computes in
    dtype."""
    from transformers import BitsAndBytesConfig

    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        saved["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        return None
    facts = T5_PRECISIONS[precision]
    computing = {"bnb_4bit_compute_dtype": dtype} if facts.bits == 4 else {}
    return BitsAndBytesConfig(**(facts.bitsandbytes or {}), **computing)


def check_4bit_widths(config, precision: str) -> None:
    """Raise SigmaError for widths that bitsandbytes' 4-bit kernels do not take (in % 64, out % 32)."""
    inner = config.num_heads * config.d_kv
    for name, width in (("d_model", config.d_model), ("d_ff", config.d_ff), ("heads x d_kv", inner)):
        if math.gcd(width, 64) != 64:
            raise SigmaError(
                f"Precision {precision} needs widths that are multiples of 64, and this encoder has "
                f"{name} = {width}. Use int8 or bf16."
            )


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What an encoder computes in: the precision's dtype, or half precision where it is quantised."""
    named = T5_PRECISIONS[precision].dtype
    return getattr(torch, named) if named else half_precision(device)


def _without_int8_casts(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.getMessage()


def quiet_int8_casts() -> None:
    """bitsandbytes logs the intended cast to fp16 at every layer of every call."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_without_int8_casts)
