"""The streamed transformer at the real width: equal to the resident one, and copied while it computes."""

from dataclasses import replace

import pytest
import torch
from gpu_device import settled_bytes

from pixart_sigma.memory import block_buffers
from pixart_sigma.memory.block_buffers import BlockBuffers
from pixart_sigma.transformer.config import XL_2
from pixart_sigma.transformer.network import build_transformer
from pixart_sigma.transformer.streaming import stream_blocks, window_nbytes


def make(on_gpu, dtype):
    sizes = {"num_layers": 8} if on_gpu else {"num_layers": 3, "num_attention_heads": 2}
    config = replace(XL_2, **sizes)
    config = replace(config, cross_attention_dim=config.num_attention_heads * config.attention_head_dim)
    transformer = build_transformer(config)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (0.02 * torch.randn(weight.shape, generator=generator)).to(dtype)
        for name, weight in transformer.state_dict().items()
    }
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


def make_input(device, on_gpu, dtype):
    generator = torch.Generator().manual_seed(1)
    side = 128 if on_gpu else 8
    latents = torch.randn(2, 4, side, side, generator=generator)
    prompts = torch.randn(2, 20, XL_2.caption_channels, generator=generator)
    return latents.to(device, dtype), torch.tensor([700.0], device=device), prompts.to(device, dtype)


@pytest.mark.parametrize("rules", [(), "mean:2:all"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_streamed_is_resident_bit_for_bit(device, on_gpu, dtype, rules):
    inputs = make_input(device, on_gpu, dtype)
    expected = make(on_gpu, dtype).to(device)(*inputs, kv_compression=rules)
    before = settled_bytes(device)
    streamed = stream_blocks(make(on_gpu, dtype), device)
    for _ in range(3):
        assert torch.equal(streamed(*inputs, kv_compression=rules), expected)
    assert streamed.nbytes > 0 and expected.isfinite().all()
    if on_gpu:
        assert settled_bytes(device) - before < window_nbytes(streamed, dtype)
        streamed.to("cpu")
        del streamed
        assert settled_bytes(device) - before < 2**20  # positions of one size at most


class Timed(BlockBuffers):
    """Tells when each copy and each computation began and ended on the device."""

    copies: list
    computed: list

    def __init__(self, *arguments):
        super().__init__(*arguments)
        type(self).copies, type(self).computed = [], []
        self._began = {}

    def fill(self, slot, block_bytes):
        with torch.cuda.stream(self._copy):
            self._copy.wait_event(self._used[slot])
        began = _now(self._copy)
        super().fill(slot, block_bytes)
        self.copies.append((began, _now(self._copy)))

    def wait_until_filled(self, slot):
        super().wait_until_filled(slot)
        self._began[slot] = _now(self._compute)

    def mark_used(self, slot):
        self.computed.append((self._began[slot], _now(self._compute)))
        super().mark_used(slot)


def _now(stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


@torch.no_grad()
def test_blocks_are_copied_while_others_compute(cuda, monkeypatch):
    monkeypatch.setattr(block_buffers, "BlockBuffers", Timed)
    streamed, inputs = stream_blocks(make(True, torch.bfloat16), cuda), make_input(cuda, True, torch.bfloat16)
    for _ in range(3):
        start = _now(torch.cuda.current_stream(cuda))
        streamed(*inputs)
    torch.cuda.synchronize(cuda)
    copies, computed = (
        [tuple(start.elapsed_time(event) for event in span) for span in spans]
        for spans in (Timed.copies, Timed.computed)
    )
    together = sum(
        max(0.0, min(one[1], other[1]) - max(one[0], other[0])) for one in copies for other in computed
    )
    shorter = min(sum(end - begin for begin, end in spans) for spans in (copies, computed))
    assert len(copies) == len(computed) == 8 and together > 0.5 * shorter, (copies, computed)
