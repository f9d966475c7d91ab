"""T5 from outside the device: its blocks pass through in turn, the next one copied while one computes.

The blocks wait in pinned RAM, or in the memory-mapped file. Diffusers' group offloading does so for plain
weights, but leaves behind what bitsandbytes keeps beside a weight; one mechanism here serves all precisions.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import torch

from ..choices import T5_PRECISIONS
from ..errors import SigmaError
from ..files.quantised_weights import QuantisedWeight
from ..memory.block_buffers import BlockBuffers, PinnedMemory, double_buffered, unpack
from .blocks import StoredBlocks, bind, make_block, unbind, use_int8

BIAS_KEY = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
SPARE_RAM = 4_000_000_000  # bytes that pinning leaves to the other stages
MOST_WAITING = 2**25  # bytes of hidden states of prompts that share a pass: of 300 tokens in bf16, 13

logger = logging.getLogger(__name__)


def check_streamed(precision: str, path) -> None:
    """Raise SigmaError for a precision whose blocks can not be streamed."""
    if not T5_PRECISIONS[precision].streams:
        raise SigmaError(
            f"{path} in {precision} can not be streamed: bitsandbytes repacks 4-bit weights where they run. "
            f"Choose int8 or bf16 to stream, or load {precision} without streaming."
        )


class StreamedT5:
    """A T5 encoder of which at most two blocks are on its device, and nothing between two calls.

    It computes what the resident encoder does, bit for bit. On the CPU it uses one block at a time, straight
    from the file where that holds it in the wanted precision.
    """

    def __init__(self, config, weights: dict, precision: str, dtype: torch.dtype, path: Path | None):
        """Reads nothing yet. config, weights: of `read_t5`; dtype: what is not int8 computes in it. With no
        path it can only say what it needs.

        Raises SigmaError for a 4-bit precision, CheckpointError for weights that do not fit a block.
        """
        check_streamed(precision, path)
        self.config, self.precision, self.dtype = config, precision, dtype
        self.device = torch.device("cpu")
        self._weights, self._path = weights, path
        self._stored = StoredBlocks(config, weights, precision, dtype, path)
        self._block, self._final_layer_norm = make_block(config)
        use_int8(self._block, self._stored)
        self._pinned = PinnedMemory()
        self._in_ram: list[torch.Tensor] = []  # the bytes of every block; without any, they are read in turn
        self._staging: list[torch.Tensor] = []  # the bytes of two, on their way from the file to a device

    @property
    def nbytes(self) -> int:
        """Bytes on the device while it computes, without activations."""
        return self.window_nbytes(self.device)

    @property
    def is_mapped(self) -> bool:
        """Whether the blocks are read from the file at every call, and not held in RAM."""
        return not self._in_ram

    @property
    def is_quantized_again(self) -> bool:
        """Whether every call quantises the blocks, because the file holds them in more than int8."""
        return self.is_mapped and self.precision == "int8" and not self._stored.is_int8

    def window_nbytes(self, device: torch.device) -> int:
        """Bytes of weights that a call needs on the device."""
        beside = self._weights["encoder.final_layer_norm.weight"], self._weights[BIAS_KEY]
        small = sum(weight.numel() for weight in beside) * self.dtype.itemsize
        return (1 if device.type == "cpu" else 2) * self._stored.nbytes + small

    def to(
        self, device: str | torch.device, progress: Callable[[int, int], None] | None = None
    ) -> "StreamedT5":
        """Compute on this device from now on. For CUDA the blocks are pinned in RAM if it is large enough.

        progress: called as progress(blocks read, all blocks); what it raises stops the reading.
        """
        device = torch.device(device)
        if device.type == "cuda" and not self._in_ram:
            self._pin_blocks(device, progress)
        self.device = device
        return self

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        layer: int = -1,
        progress: Callable[[int, int], None] | None = None,
        rows: Mapping[int, torch.Tensor] = MappingProxyType({}),
    ) -> torch.Tensor:
        """Hidden states (B, n, C) of token ids (B, n) after the layer that counts from the end, normed.

        rows: by a token's index, what takes the place of its row in the embedding table, (C).

        progress: called as progress(blocks done, blocks to do) before every block and after the last; what it
        raises stops the call. Raises CheckpointError when the file is gone or was changed.
        """
        return self.together([(input_ids, rows)], layer, progress)[0]

    @torch.no_grad()
    def together(
        self,
        prompts: Sequence[tuple[torch.Tensor, Mapping[int, torch.Tensor]]],
        layer: int = -1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[torch.Tensor]:
        """The hidden states of several (token ids, rows), each as a call of its own makes them, bit for bit:
        a block takes one after the other while it is there, and is read once for all.

        All their hidden states are on the device: `most_together` says how many may be.
        """
        count = self.config.num_layers + 1 + layer
        self._stored.check_files()
        waiting = [self._embed(input_ids, rows) for input_ids, rows in prompts]
        table = self._weights[BIAS_KEY][...].to(self.device, self.dtype)
        position_bias = None
        with closing(self._visit_blocks(count)) as blocks:
            for done, block in enumerate(blocks):
                if progress is not None:
                    progress(done, count)
                for index, hidden_states in enumerate(waiting):
                    length = hidden_states.shape[1]
                    if position_bias is None or position_bias.shape[-1] != length:
                        position_bias = self._position_bias(length, table)
                    waiting[index] = block(hidden_states, position_bias=position_bias)[0]
        if progress is not None:
            progress(count, count)
        weight = self._weights["encoder.final_layer_norm.weight"][...]
        try:
            bind(self._final_layer_norm, {"weight": weight.to(self.device, self.dtype)})
            for index, hidden_states in enumerate(waiting):
                waiting[index] = self._final_layer_norm(hidden_states)
            return waiting
        finally:
            unbind(self._final_layer_norm)

    def most_together(self, lengths: Sequence[int]) -> int:
        """How many of the first prompts, of so many tokens, `together` may take: one at least."""
        token = self.config.d_model * self.dtype.itemsize
        total = 0
        for count, length in enumerate(lengths):
            total += length * token
            if count and total > MOST_WAITING:
                return count
        return len(lengths)

    def _embed(self, input_ids: torch.Tensor, rows: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Hidden states (B, n, C) before the first block, on the device."""
        hidden_states = _rows(self._weights["shared.weight"], input_ids.cpu()).to(self.dtype)
        for index, row in rows.items():
            hidden_states[:, index] = row.to(hidden_states)
        return hidden_states.to(self.device)

    def _visit_blocks(self, count: int) -> Generator[torch.nn.Module, None, None]:
        """The blocks in turn, each with its weights where it computes; one module serves them all."""
        tensors_of_blocks = self._from_ram if self.device.type == "cpu" else self._through_buffers
        try:
            with closing(tensors_of_blocks(count)) as passing:
                for tensors in passing:
                    bind(self._block, tensors)
                    del tensors  # the block is dropped before the next is read
                    yield self._block
                    unbind(self._block)
        finally:
            unbind(self._block)

    def _from_ram(self, count: int) -> Generator[dict[str, torch.Tensor], None, None]:
        for index in range(count):
            if self._in_ram:
                yield unpack(self._in_ram[index], self._stored.layout)
            else:
                yield dict(self._stored.read(index))

    def _through_buffers(self, count: int) -> Generator[dict[str, torch.Tensor], None, None]:
        return double_buffered([self._stored.layout] * count, self.device, self._bytes_of)

    def _bytes_of(self, index: int, buffers: BlockBuffers) -> torch.Tensor:
        if self._in_ram:
            return self._in_ram[index]
        while len(self._staging) < 2:
            self._staging.append(self._pinned.allocate_any(self._stored.nbytes, self.device))
        buffers.wait_until_copied(index % 2)
        self._stored.read_into(self._staging[index % 2], index)
        return self._staging[index % 2]

    def _position_bias(self, length: int, table: torch.Tensor) -> torch.Tensor:
        """The first block's position bias (1, heads, n, n), by its table, which all blocks add."""
        attention = self._block.layer[0].SelfAttention
        try:
            bind(attention.relative_attention_bias, {"weight": table})
            return attention.compute_bias(length, length, device=self.device)
        finally:
            unbind(attention.relative_attention_bias)

    def _pin_blocks(self, device: torch.device, progress) -> None:
        import psutil

        count = self.config.num_layers
        needed, available = count * self._stored.nbytes, psutil.virtual_memory().available
        if available < needed + SPARE_RAM:
            logger.info(
                f"The text encoder's blocks are read from {self._path} for every prompt: holding them takes "
                f"{needed / 1e9:.1f} GB of RAM, and {available / 1e9:.1f} GB are free."
            )
            return
        try:
            blocks = [self._pinned.allocate(self._stored.nbytes, device) for _ in range(count)]
        except (RuntimeError, MemoryError) as error:
            self._pinned.release()
            logger.warning(
                f"The text encoder's blocks are read from {self._path} for every prompt, because "
                f"{needed / 1e9:.1f} GB of RAM could not be pinned: {error}"
            )
            return
        try:
            for index, block_bytes in enumerate(blocks):
                if progress is not None:
                    progress(index + 1, count)
                self._stored.read_into(block_bytes, index)
        except BaseException:
            self._pinned.release()
            raise
        self._in_ram = blocks


def _rows(table, ids: torch.Tensor) -> torch.Tensor:
    """The rows of an embedding table that these ids name; only they are read."""
    if not isinstance(table, QuantisedWeight):
        return torch.nn.functional.embedding(ids, table[...])
    return table.select(ids.reshape(-1)).dequantise().reshape(*ids.shape, -1)
