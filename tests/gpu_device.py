"""The device that tests/gpu run on, and what they ask of it."""

import gc
import sys
from pathlib import Path

import torch

from pixart_sigma.memory.measure import live_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from measuring import at_most  # noqa: E402

__all__ = ["at_most", "find_device", "relative", "settled_bytes"]


def find_device(name: str) -> torch.device | str:
    """The device of this name, or why there is none."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        return "there is no CUDA device here; `--device cpu` tries these tests on the CPU, at small sizes"
    return torch.device(name)


def settled_bytes(device: torch.device) -> int:
    """Bytes alive on the device once all that is unreachable is gone: the allocator's count on CUDA, without
    what cuBLAS works in, which stays from the first product on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return live_bytes(device)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative L2 error."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())
