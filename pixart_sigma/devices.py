"""Which device a run uses, and what it computes in there."""

import platform

import torch

from .choices import DTYPES
from .errors import SigmaError


def pick_device(name: str | torch.device) -> torch.device:
    """The device of this name; "auto" is the first GPU, else the CPU. Raises SigmaError for one that cannot
    be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has no numbers
    except Exception as error:  # each backend raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SigmaError(
            f"The device {name!r} cannot be used here: {reason} Use 'cpu', or install torch for it."
        ) from error
    return device


def half_precision(device: torch.device) -> torch.dtype:
    """bfloat16 on a CPU and on a GPU that computes in it, else float16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    if device.type == "mps" and int(platform.mac_ver()[0].partition(".")[0] or 0) < 14:
        return torch.float16
    return torch.bfloat16


def pick_dtype(device: torch.device) -> torch.dtype:
    """What the transformer and the VAE compute in: float32 on a CPU, else half precision."""
    return torch.float32 if device.type == "cpu" else half_precision(device)


def dtype_name(dtype: torch.dtype) -> str:
    """What `Ways` calls it, such as "bf16"."""
    named = str(dtype).removeprefix("torch.")
    return next(name for name, value in DTYPES.items() if value == named)
