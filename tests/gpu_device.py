"""The device that tests/gpu run on, and what they ask of it."""

import gc
from contextlib import contextmanager

import torch

from pixart_sigma.memory.measure import live_bytes


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


@contextmanager
def at_most(nbytes: int, device: torch.device):
    """Within this block torch allocates at most so many bytes on a CUDA device, as on a smaller card."""
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative L2 error."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())
