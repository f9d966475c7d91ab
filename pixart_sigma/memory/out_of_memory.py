"""One name for memory that ran out: libraries and devices tell it in many ways."""

import errno

import torch

# Of a RuntimeError, in lower case: torch's on a CPU, MPS and XPU, cuBLAS, bitsandbytes, pinned memory.
SAID = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "alloc_failed",
    "cudaerrormemoryallocation",
    "failed to allocate",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, is memory that ran out, on whatever device."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAID):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        error = error.__cause__
    return False
