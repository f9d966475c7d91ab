"""The transformer from outside the device: its blocks pass through it, one copied while another computes.

Diffusers' group offloading does so too, but torch keeps the RAM that it pins, rounded up, after the model is
gone, and an error between two blocks leaves weights on the device. Here T5's buffers serve the transformer.
"""

from collections.abc import Generator, Iterable
from contextlib import closing

import torch

from ..memory.block_buffers import Part, PinnedMemory, double_buffered, lay_out, unpack
from ..memory.measure import weight_bytes
from .network import SigmaBlock, SigmaTransformer

BLOCKS = "transformer_blocks"


class StreamedTransformer(SigmaTransformer):
    """A SigmaTransformer of which at most two blocks are on its device; what is not a block stays there.

    It computes what the resident one does, bit for bit. On the CPU it is the resident one, since the blocks
    are in RAM already. `load_transformer(..., stream=True)` or `stream_blocks` makes it.
    """

    _parked: list[torch.Tensor]  # a piece of RAM (uint8) for each block
    _layouts: list[tuple[Part, ...]]  # where in it each weight lies
    _parked_weights: list[dict[str, torch.Tensor]]  # the weights there
    _pinned: PinnedMemory
    _visits: Generator[SigmaBlock, None, None] | None

    @property
    def nbytes(self) -> int:
        """Bytes on the device while it computes, without activations."""
        return weight_bytes(self) if self.device.type == "cpu" else window_nbytes(self, self.dtype)

    def to(self, device: str | torch.device) -> "StreamedTransformer":
        """Compute on this device from now on. The blocks stay in RAM, pinned for CUDA where it can be."""
        device = torch.device(device)
        if device.type != "cpu" and not self._parked:
            self._park(device)
        for name, child in self.named_children():
            if name != BLOCKS:
                child.to(device)
        self.scale_shift_table.data = self.scale_shift_table.data.to(device)
        self._positions.clear()
        return self

    def forward(self, *arguments, **settings) -> torch.Tensor:
        """See `SigmaTransformer.forward`. Also after an error no block is left on the device."""
        try:
            return super().forward(*arguments, **settings)
        finally:
            if self._visits is not None:
                self._visits.close()
                self._visits = None

    def visit_blocks(self) -> Iterable[SigmaBlock]:
        if not self._parked:
            return self.transformer_blocks
        self._visits = self._through_buffers()
        return self._visits

    def _through_buffers(self) -> Generator[SigmaBlock, None, None]:
        """The blocks in turn, each on its weights in a buffer; afterwards all on those in RAM."""
        blocks = self.transformer_blocks
        passing = double_buffered(self._layouts, self.device, lambda index, _: self._parked[index])
        try:
            with closing(passing):
                for block, weights in zip(blocks, passing, strict=True):
                    _bind(block, weights)
                    yield block
        finally:
            for block, weights in zip(blocks, self._parked_weights, strict=True):
                _bind(block, weights)

    def _park(self, device: torch.device) -> None:
        """Move each block's weights to one piece of RAM, from which `device` can copy by itself."""
        nbytes = block_nbytes(self, self.dtype)
        # Once, because it takes longer than the GPU has to wait for a block.
        self._layouts = [_lay_out(block, self.dtype) for block in self.transformer_blocks]
        self._parked_weights = []
        parked = []
        for block, layout in zip(self.transformer_blocks, self._layouts, strict=True):
            block_bytes = self._pinned.allocate_any(nbytes, device)
            views = unpack(block_bytes, layout)
            for view, weight in zip(views.values(), block.parameters(), strict=True):
                view.copy_(weight)
            _bind(block, views)
            self._parked_weights.append(views)
            parked.append(block_bytes)
        self._parked = parked


def stream_blocks(transformer: SigmaTransformer, device: str | torch.device) -> StreamedTransformer:
    """This transformer, itself, streamed to a device. Its weights must be on the CPU, all in one dtype but
    for quantised ones, which are streamed as they are stored."""
    transformer.__class__ = StreamedTransformer
    transformer._parked, transformer._layouts, transformer._parked_weights = [], [], []
    transformer._pinned = PinnedMemory()
    transformer._visits = None
    return transformer.to(device)


def block_nbytes(transformer: SigmaTransformer, dtype: torch.dtype) -> int:
    """Bytes of the largest block in a dtype; each block has as many in RAM, and each buffer on the device."""
    return max(_lay_out(block, dtype)[-1].end for block in transformer.transformer_blocks)


def parked_nbytes(transformer: SigmaTransformer, dtype: torch.dtype) -> int:
    """Bytes of RAM in which the blocks wait."""
    return len(transformer.transformer_blocks) * block_nbytes(transformer, dtype)


def window_nbytes(transformer: SigmaTransformer, dtype: torch.dtype) -> int:
    """Bytes of weights on the device at once: two blocks, and all that is in no block."""
    beside = (weight for name, weight in transformer.named_parameters() if not name.startswith(BLOCKS))
    return 2 * block_nbytes(transformer, dtype) + parameter_nbytes(beside, dtype)


def parameter_nbytes(parameters: Iterable[torch.Tensor], dtype: torch.dtype) -> int:
    """Bytes of parameters in a dtype; of quantised ones, which are bytes, as they are."""
    return sum(weight.numel() * _stored_in(weight, dtype).itemsize for weight in parameters)


def _lay_out(block: torch.nn.Module, dtype: torch.dtype) -> tuple[Part, ...]:
    parameters = block.named_parameters()
    return lay_out((name, _stored_in(weight, dtype), weight.shape) for name, weight in parameters)


def _stored_in(weight: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if weight.is_floating_point() else weight.dtype


def _bind(block: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Let the block run on these weights, in the order of its own, without a copy."""
    for weight, parameter in zip(weights.values(), block.parameters(), strict=True):
        parameter.data = weight
