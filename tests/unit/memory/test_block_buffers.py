"""Blocks pass through two buffers: each arrives whole, none is overwritten too early, none stays."""

import gc
import weakref

import pytest
import torch

from pixart_sigma.memory import block_buffers
from pixart_sigma.memory.block_buffers import BlockBuffers, double_buffered, lay_out, unpack

CPU = torch.device("cpu")
WIDE = lay_out([("weight", torch.float32, (3, 5)), ("scale", torch.bfloat16, (3,))])
NARROW = lay_out([("weight", torch.int8, (2, 2))])


def make_blocks(layouts) -> list[torch.Tensor]:
    """Bytes of blocks, all as long as the largest; the numbers of block i are i + 1."""
    blocks = []
    for number, layout in enumerate(layouts, start=1):
        blocks.append(torch.zeros(WIDE[-1].end, dtype=torch.uint8))
        for tensor in unpack(blocks[-1], layout).values():
            tensor.fill_(number)
    return blocks


@pytest.fixture
def buffers(monkeypatch) -> list:
    """What is asked of the buffers in turn, and weak references to their bytes."""
    seen = []

    class Watched(BlockBuffers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.extend(weakref.ref(buffer) for buffer in self.bytes)

        def fill(self, slot, block_bytes):
            seen.append(("fill", slot))
            super().fill(slot, block_bytes)

        def wait_until_filled(self, slot):
            seen.append(("wait", slot))

        def mark_used(self, slot):
            seen.append(("used", slot))

        def close(self):
            seen.append(("close",))
            super().close()

    monkeypatch.setattr(block_buffers, "BlockBuffers", Watched)
    return seen


def test_tensors_lie_aligned_one_after_the_other():
    assert [(part.offset, part.end) for part in WIDE] == [(0, 256), (256, 512)]
    tensors = unpack(torch.arange(512, dtype=torch.int32).to(torch.uint8), WIDE)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "weight": (torch.float32, (3, 5)),
        "scale": (torch.bfloat16, (3,)),
    }
    assert tensors["scale"].view(torch.uint8).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_buffer_is_filled_only_when_its_block_is_done(buffers):
    layouts = [WIDE] * 3
    blocks = make_blocks(layouts)
    for _ in double_buffered(layouts, CPU, lambda index, _: blocks[index]):
        buffers.append("computes")
    first = [("fill", 0), ("fill", 1), ("wait", 0), "computes", ("used", 0)]
    second = [("fill", 0), ("wait", 1), "computes", ("used", 1)]
    assert buffers[2:] == [*first, *second, ("wait", 0), "computes", ("used", 0), ("close",)]


@pytest.mark.parametrize("layouts", [[WIDE], [WIDE] * 5, [WIDE, NARROW, NARROW, WIDE, NARROW]])
def test_every_block_arrives_whole(layouts):
    blocks = make_blocks(layouts)
    arrived = double_buffered(layouts, CPU, lambda index, _: blocks[index])
    for number, (layout, tensors) in enumerate(zip(layouts, arrived, strict=True), start=1):
        assert list(tensors) == [part.name for part in layout]
        for part in layout:
            tensor = tensors[part.name]
            assert (tensor.dtype, tensor.shape) == (part.dtype, part.shape) and (tensor == number).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_while_a_block_is_read_leaves_no_buffer(buffers, error):
    blocks = make_blocks([WIDE] * 4)

    def bytes_of(index, _):
        if index == 2:
            raise error("while it is read")
        return blocks[index]

    with pytest.raises(error) as raised:
        for tensors in double_buffered([WIDE] * 4, CPU, bytes_of):
            del tensors
    gc.collect()
    # Also while the error is kept.
    assert raised.value is not None and buffers[-1] == ("close",)
    assert [buffer() for buffer in buffers[:2]] == [None, None]


def test_closing_it_between_two_blocks_leaves_no_buffer(buffers):
    blocks = make_blocks([WIDE] * 4)
    passing = double_buffered([WIDE] * 4, CPU, lambda index, _: blocks[index])
    next(passing)
    passing.close()
    assert [buffer() for buffer in buffers[:2]] == [None, None]
