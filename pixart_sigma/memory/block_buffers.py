"""Blocks of a network that wait in RAM and pass through a device, one copied while another computes.

The bytes of a block and the tensors within them, two buffers on a device, the loop that fills them in turn,
and pinned RAM to copy from.
"""

import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

ALIGNMENT = 256  # bytes; tensors of a block start at multiples of it, as the CUDA allocator's do


@dataclass(frozen=True)
class Part:
    """A tensor of a block: its name, what it is, and where it lies in the block's bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """The first aligned byte after it."""
        nbytes = self.dtype.itemsize * torch.Size(self.shape).numel()
        return self.offset + -(-nbytes // ALIGNMENT) * ALIGNMENT

    def of(self, block_bytes: torch.Tensor) -> torch.Tensor:
        """This tensor as a view of a block's bytes (uint8)."""
        nbytes = self.dtype.itemsize * torch.Size(self.shape).numel()
        return block_bytes[self.offset : self.offset + nbytes].view(self.dtype).view(self.shape)


def lay_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[Part, ...]:
    """Where the tensors of a block, given by name, dtype and shape, lie one after the other in its bytes."""
    parts, offset = [], 0
    for name, dtype, shape in tensors:
        parts.append(Part(name, dtype, tuple(shape), offset))
        offset = parts[-1].end
    return tuple(parts)


def unpack(block_bytes: torch.Tensor, layout: tuple[Part, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a block by name, as views of its bytes (uint8)."""
    return {part.name: part.of(block_bytes) for part in layout}


class BlockBuffers:
    """Two buffers on a device, for a block that computes and the next; on CUDA a stream fills them."""

    def __init__(self, nbytes: int, device: torch.device):
        self.bytes = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._compute = torch.cuda.current_stream(device)
            self._copy = torch.cuda.Stream(device)
            self._copy.wait_stream(self._compute)  # which may still use what these bytes held before
            self._filled = [torch.cuda.Event() for _ in range(2)]
            self._used = [torch.cuda.Event() for _ in range(2)]

    def fill(self, slot: int, block_bytes: torch.Tensor) -> None:
        """Copy a block's bytes, once what computes on the buffer's present ones is done."""
        if not self._cuda:
            self.bytes[slot].copy_(block_bytes)
            return
        with torch.cuda.stream(self._copy):
            self._copy.wait_event(self._used[slot])
            self.bytes[slot].copy_(block_bytes, non_blocking=True)
            self._filled[slot].record(self._copy)

    def wait_until_filled(self, slot: int) -> None:
        """Make the computing stream wait, not the CPU."""
        if self._cuda:
            self._compute.wait_event(self._filled[slot])

    def wait_until_copied(self, slot: int) -> None:
        """Make the CPU wait until the bytes last given to `fill` may change."""
        if self._cuda:
            self._filled[slot].synchronize()

    def mark_used(self, slot: int) -> None:
        """What has been asked of the device so far is what uses the buffer."""
        if self._cuda:
            self._used[slot].record(self._compute)

    def close(self) -> None:
        """Free the buffers, when no copy writes to them any more."""
        if self._cuda:
            self._copy.synchronize()
        self.bytes.clear()


def double_buffered(
    layouts: Sequence[tuple[Part, ...]],
    device: torch.device,
    bytes_of: Callable[[int, BlockBuffers], torch.Tensor],
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Each block's tensors by name, on the device, while the next block is copied to the other buffer.

    layouts: the parts of every block. bytes_of(index, buffers): a block's bytes in RAM. Where they take the
    place of those of block index - 2, `buffers.wait_until_copied(index % 2)` comes first.
    The tensors of a block are overwritten once the next block is asked for. Close this generator, also after
    an error: then it keeps nothing on the device.
    """
    buffers = BlockBuffers(max(layout[-1].end for layout in layouts), device)
    views = {}  # of a buffer, by its layout: nearly all blocks have the same
    try:
        buffers.fill(0, bytes_of(0, buffers))
        for index, layout in enumerate(layouts):
            slot = index % 2
            if index + 1 < len(layouts):  # before this block computes, which may make the CPU wait
                buffers.fill(1 - slot, bytes_of(index + 1, buffers))
            buffers.wait_until_filled(slot)
            if (layout, slot) not in views:
                views[layout, slot] = unpack(buffers.bytes[slot], layout)
            yield views[layout, slot]
            buffers.mark_used(slot)
    finally:
        views.clear()
        buffers.close()


class PinnedMemory:
    """RAM that CUDA copies by itself. It is pinned until `release`, or until this object is dropped.

    Torch's own pinned memory is rounded up to a power of two, and stays with torch when it is freed.
    """

    def __init__(self):
        self._pinned: list[torch.Tensor] = []
        weakref.finalize(self, _unpin, self._pinned).atexit = False  # the driver may be gone by then

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """nbytes of RAM (uint8), pinned if the device is CUDA. Raises RuntimeError where that is refused."""
        memory = torch.empty(nbytes, dtype=torch.uint8)
        if device.type != "cuda":
            return memory
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        if status:
            with suppress(RuntimeError):  # the next kernel reports the failure once more
                torch.zeros(1, device=device)
                torch.cuda.synchronize(device)
            raise RuntimeError(f"CUDA refused to pin {nbytes} bytes of RAM (error {status})")
        self._pinned.append(memory)
        return memory

    def allocate_any(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """The same, but plain RAM where pinning is refused: the copy then waits, and is as right."""
        try:
            return self.allocate(nbytes, device)
        except RuntimeError:
            return torch.empty(nbytes, dtype=torch.uint8)

    def release(self) -> None:
        """Unpin everything. The tensors stay usable."""
        _unpin(self._pinned)


def _unpin(pinned: list[torch.Tensor]) -> None:
    while pinned:
        torch.cuda.cudart().cudaHostUnregister(pinned.pop().data_ptr())
