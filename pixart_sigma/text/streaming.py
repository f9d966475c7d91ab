"""T5 from outside the device: its blocks pass through in turn, the next one copied while one computes.

The blocks wait in pinned RAM, or in the memory-mapped file. Diffusers' group offloading does so for plain
weights, but leaves behind what bitsandbytes keeps beside a weight; one mechanism here serves all precisions.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from ..errors import CheckpointError, SigmaError
from ..files.weight_files import find_weight_files
from ..memory.block_buffers import BlockBuffers, Part, PinnedMemory, double_buffered, lay_out, unpack
from .weights import Float8Weight, is_linear

STREAMED = ("int8", "bf16", "fp16", "fp32")
SPARE_RAM = 4_000_000_000  # bytes that pinning leaves to the other stages
INT8_THRESHOLD = 6.0  # LLM.int8(): activations beyond it are multiplied unquantised (Dettmers et al., 2022)


def check_streamed(precision: str, path) -> None:
    """Raise SigmaError for a precision whose blocks can not be streamed."""
    if precision not in STREAMED:
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
        self._files = {file: _stamp(file) for file in (find_weight_files(path) if path else ())}
        self._block, self._final_layer_norm = _empty_block(config)
        self._parts = self._lay_out()
        self._block_nbytes = self._parts[-1].end
        _use_int8(self._block, self._parts, config)
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
        return self.is_mapped and self.precision == "int8" and not self._is_stored_int8()

    def window_nbytes(self, device: torch.device) -> int:
        """Bytes of weights that a call needs on the device."""
        beside = self._weights["encoder.final_layer_norm.weight"], self._weights[_bias_key()]
        small = sum(_stored(weight).numel() for weight in beside) * self.dtype.itemsize
        return (1 if device.type == "cpu" else 2) * self._block_nbytes + small

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
    ) -> torch.Tensor:
        """Hidden states (B, n, C) of token ids (B, n) after the layer that counts from the end, normed.

        progress: called as progress(blocks done, blocks to do) before every block and after the last; what it
        raises stops the call. Raises CheckpointError when the file is gone or was changed.
        """
        count = self.config.num_layers + 1 + layer
        self._check_files()
        hidden_states = _rows(self._weights["shared.weight"], input_ids.cpu()).to(self.dtype).to(self.device)
        position_bias = self._position_bias(input_ids.shape[1])
        with closing(self._visit_blocks(count)) as blocks:
            for done, block in enumerate(blocks):
                if progress is not None:
                    progress(done, count)
                hidden_states = block(hidden_states, position_bias=position_bias)[0]
        if progress is not None:
            progress(count, count)
        weight = self._weights["encoder.final_layer_norm.weight"][...]
        try:
            _bind(self._final_layer_norm, {"weight": weight.to(self.device, self.dtype)})
            return self._final_layer_norm(hidden_states)
        finally:
            _unbind(self._final_layer_norm)

    def _visit_blocks(self, count: int) -> Iterator[torch.nn.Module]:
        """The blocks in turn, each with its weights where it computes; one module serves them all."""
        tensors_of_blocks = self._from_ram if self.device.type == "cpu" else self._through_buffers
        try:
            with closing(tensors_of_blocks(count)) as passing:
                for tensors in passing:
                    _bind(self._block, tensors)
                    del tensors  # the block is dropped before the next is read
                    yield self._block
                    _unbind(self._block)
        finally:
            _unbind(self._block)

    def _from_ram(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        for index in range(count):
            if self._in_ram:
                yield unpack(self._in_ram[index], self._parts)
            else:
                self._check_files()
                yield dict(self._read(index))

    def _through_buffers(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        return double_buffered([self._parts] * count, self.device, self._bytes_of)

    def _bytes_of(self, index: int, buffers: BlockBuffers) -> torch.Tensor:
        if self._in_ram:
            return self._in_ram[index]
        self._check_files()
        while len(self._staging) < 2:
            self._staging.append(self._pinned.allocate_any(self._block_nbytes, self.device))
        buffers.wait_until_copied(index % 2)
        self._fill(self._staging[index % 2], index)
        return self._staging[index % 2]

    def _position_bias(self, length: int) -> torch.Tensor:
        """The first block's position bias (1, heads, n, n), which all blocks add."""
        attention = self._block.layer[0].SelfAttention
        table = self._weights[_bias_key()][...].to(self.device, self.dtype)
        try:
            _bind(attention.relative_attention_bias, {"weight": table})
            return attention.compute_bias(length, length, device=self.device)
        finally:
            _unbind(attention.relative_attention_bias)

    def _read(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of the block's parts in RAM, views of the file where that holds them so."""
        for part in self._parts:
            if part.name.endswith(".SCB"):
                continue  # comes with its weight
            key = f"encoder.block.{index}.{part.name}"
            weight = self._weights[key][...]
            if part.dtype != torch.int8:
                yield part.name, weight.to(part.dtype)
                continue
            scale_name = _scale_name(part.name)
            if weight.dtype == torch.int8:
                scale = self._weights[f"encoder.block.{index}.{scale_name}"].float()
            else:
                from bitsandbytes.functional import int8_vectorwise_quant

                weight, scale, _ = int8_vectorwise_quant(weight.to(self.dtype).to(torch.float16))
            yield part.name, weight
            yield scale_name, scale

    def _fill(self, block_bytes: torch.Tensor, index: int) -> None:
        tensors = unpack(block_bytes, self._parts)
        for name, tensor in self._read(index):
            tensors[name].copy_(tensor)

    def _lay_out(self) -> tuple[Part, ...]:
        """The parts that every block has. Raises CheckpointError where a block has others."""
        shapes = {
            name: tuple(weight.shape)
            for name, weight in self._block.named_parameters()
            if "relative_attention_bias" not in name
        }
        dtypes = {name: self._dtype_of(0, name) for name in shapes}
        for index in range(self.config.num_layers):
            for name, shape in shapes.items():
                key = f"encoder.block.{index}.{name}"
                stored = _stored(self._weights[key])
                if tuple(stored.shape) != shape:
                    raise CheckpointError(
                        f"{self._path}: {key} has shape {tuple(stored.shape)}, not the {shape} of a block."
                    )
                if self._dtype_of(index, name) != dtypes[name]:
                    raise CheckpointError(
                        f"{self._path}: {key} is {stored.dtype}, unlike in the first block, so they can not "
                        "share a buffer. Write the folder again with quantize-t5."
                    )
                scale = self._weights.get(f"encoder.block.{index}.{_scale_name(name)}")
                if stored.dtype == torch.int8 and scale.numel() != shape[0]:
                    raise CheckpointError(
                        f"{self._path}: the scale of {key} has {scale.numel()} numbers for {shape[0]} rows. "
                        "Write the folder again with quantize-t5."
                    )
        tensors = []
        for name, shape in shapes.items():
            tensors.append((name, dtypes[name], shape))
            if dtypes[name] == torch.int8:
                tensors.append((_scale_name(name), torch.float32, shape[:1]))
        return lay_out(tensors)

    def _dtype_of(self, index: int, name: str) -> torch.dtype:
        key = f"encoder.block.{index}.{name}"
        wo = name.endswith(".wo.weight")
        if _stored(self._weights[key]).dtype == torch.int8:
            return torch.int8
        if self.precision == "int8" and is_linear(key) and not wo and not self._is_stored_int8():
            return torch.int8
        return torch.float32 if wo and self.dtype == torch.float16 else self.dtype  # it overflows in fp16

    def _is_stored_int8(self) -> bool:
        return any(key.endswith(".SCB") for key in self._weights)

    def _pin_blocks(self, device: torch.device, progress) -> None:
        import psutil

        count = self.config.num_layers
        needed, available = count * self._block_nbytes, psutil.virtual_memory().available
        if available < needed + SPARE_RAM:
            logging.info(
                f"The text encoder's blocks are read from {self._path} for every prompt: holding them takes "
                f"{needed / 1e9:.1f} GB of RAM, and {available / 1e9:.1f} GB are free."
            )
            return
        try:
            blocks = [self._pinned.allocate(self._block_nbytes, device) for _ in range(count)]
        except (RuntimeError, MemoryError) as error:
            self._pinned.release()
            logging.warning(
                f"The text encoder's blocks are read from {self._path} for every prompt, because "
                f"{needed / 1e9:.1f} GB of RAM could not be pinned: {error}"
            )
            return
        try:
            for index, block_bytes in enumerate(blocks):
                if progress is not None:
                    progress(index + 1, count)
                self._fill(block_bytes, index)
        except BaseException:
            self._pinned.release()
            raise
        self._in_ram = blocks

    def _check_files(self) -> None:
        """Reading a mapped file that was cut off kills the process, so this is asked before every reading."""
        for file, stamp in self._files.items():
            if not file.exists():
                raise CheckpointError(
                    f"{file} is gone, and the streamed text encoder reads from it. Put it back, or load "
                    "another encoder."
                )
            if _stamp(file) != stamp:
                raise CheckpointError(
                    f"{file} was changed, and the streamed text encoder reads from it. Load it again."
                )


def _empty_block(config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The first block and the final norm of transformers' encoder, on the meta device."""
    from transformers import T5EncoderModel

    config = copy.deepcopy(config)
    config.num_layers = 1
    with torch.device("meta"):
        encoder = T5EncoderModel(config).eval().encoder
    return encoder.block[0], encoder.final_layer_norm


def _use_int8(block: torch.nn.Module, parts: tuple[Part, ...], config) -> None:
    """Put bitsandbytes' layers where the parts are int8."""
    quantized = [part for part in parts if part.dtype == torch.int8]
    if not quantized:
        return
    from bitsandbytes.nn import Linear8bitLt

    saved = getattr(config, "quantization_config", None) or {}
    threshold = saved.get("llm_int8_threshold", INT8_THRESHOLD)
    for part in quantized:
        path, _, name = part.name.removesuffix(".weight").rpartition(".")
        rows, columns = part.shape
        layer = Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        setattr(block.get_submodule(path), name, layer.eval())


def _bind(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Let the module's layers run on these tensors, without a copy."""
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        if kind == "SCB":
            continue
        scale = weights.get(_scale_name(name))
        if scale is None:
            parameter = torch.nn.Parameter(weight, requires_grad=False)
        else:
            from bitsandbytes.nn import Int8Params

            # The layer takes CB and SCB into its state at every call that finds them here.
            parameter = Int8Params(weight, requires_grad=False, CB=weight, SCB=scale)
        module.get_submodule(path).weight = parameter


def _unbind(module: torch.nn.Module) -> None:
    """Drop the tensors, of which an error's traceback could keep the module."""
    for layer in module.modules():
        if getattr(layer, "weight", None) is not None:
            empty = torch.empty_like(layer.weight, device="meta")
            layer.weight = torch.nn.Parameter(empty, requires_grad=False)
        if hasattr(layer, "state"):
            layer.state.CB = layer.state.SCB = layer.state.idx = None


def _rows(table, ids: torch.Tensor) -> torch.Tensor:
    """The rows of an embedding table that these ids name; only they are read."""
    if not isinstance(table, Float8Weight):
        return torch.nn.functional.embedding(ids, table)
    scale = table.scale
    if scale is not None and scale.numel() != 1:
        scale = scale.reshape(-1)[ids.reshape(-1)]
    rows = Float8Weight(table.weight[ids.reshape(-1)], scale)[...]
    return rows.reshape(*ids.shape, -1)


def _stored(weight) -> torch.Tensor:
    return weight.weight if isinstance(weight, Float8Weight) else weight


def _scale_name(name: str) -> str:
    return name.removesuffix("weight") + "SCB"


def _bias_key() -> str:
    return "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
