"""A T5 encoder's blocks: those that its file stores, and a module that runs on the weights of any of them."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.locating import find_weight_files
from ..files.mapping import Unchanged
from ..memory.block_buffers import lay_out, unpack
from .config import INT8_THRESHOLD
from .weights import is_linear


class StoredBlocks:
    """The blocks of a T5 encoder as its file stores them, read one at a time in the wanted precision."""

    def __init__(self, config, weights: dict, precision: str, dtype: torch.dtype, path: Path | None):
        """config, weights: of `read_t5`; dtype: what is not int8 is read in it.

        Raises CheckpointError for weights that do not fit a block.
        """
        self.config, self.precision, self.dtype = config, precision, dtype
        self._weights, self._path = weights, path
        self._files = Unchanged(find_weight_files(path) if path else (), "the streamed text encoder")
        self.is_int8 = any(key.endswith(".SCB") for key in weights)  # in the file already
        self.layout = lay_out(self._find_tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of one block in the wanted precision."""
        return self.layout[-1].end

    def read(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of the block's parts in RAM, views of the file where that holds them so.

        Raises CheckpointError when the file is gone or was changed.
        """
        self.check_files()
        for part in self.layout:
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

    def read_into(self, block_bytes: torch.Tensor, index: int) -> None:
        """Read a block to where `layout` has its parts in these bytes."""
        tensors = unpack(block_bytes, self.layout)
        for name, tensor in self.read(index):
            tensors[name].copy_(tensor)

    def check_files(self) -> None:
        """CheckpointError where a file is not what it was, see `Unchanged`."""
        self._files.check()

    def _find_tensors(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what every block has. Raises CheckpointError where a block has others."""
        shapes = {
            name: tuple(weight.shape)
            for name, weight in make_block(self.config)[0].named_parameters()
            if "relative_attention_bias" not in name
        }
        dtypes = {name: self._dtype_of(0, name) for name in shapes}
        for index in range(self.config.num_layers):
            for name, shape in shapes.items():
                self._check_weight(index, name, shape, dtypes[name])
        for name, shape in shapes.items():
            yield name, dtypes[name], shape
            if dtypes[name] == torch.int8:
                yield _scale_name(name), torch.float32, shape[:1]

    def _check_weight(self, index: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        key = f"encoder.block.{index}.{name}"
        stored = self._weights[key]
        if tuple(stored.shape) != shape:
            raise CheckpointError(
                f"{self._path}: {key} has shape {tuple(stored.shape)}, not the {shape} of a block."
            )
        if self._dtype_of(index, name) != dtype:
            raise CheckpointError(
                f"{self._path}: {key} is {stored.dtype}, unlike in the first block, so they can not "
                "share a buffer. Write the folder again with quantize-t5."
            )

    def _dtype_of(self, index: int, name: str) -> torch.dtype:
        key = f"encoder.block.{index}.{name}"
        wo = name.endswith(".wo.weight")
        if self._weights[key].dtype == torch.int8:
            return torch.int8
        if self.precision == "int8" and is_linear(key) and not wo and not self.is_int8:
            return torch.int8
        return torch.float32 if wo and self.dtype == torch.float16 else self.dtype  # it overflows in fp16


def make_block(config) -> tuple[Any, torch.nn.Module]:
    """The first block and the final norm of transformers' encoder, without weights, on the meta device."""
    from transformers import T5EncoderModel

    config = copy.deepcopy(config)
    config.num_layers = 1
    with torch.device("meta"):
        encoder = T5EncoderModel(config).eval().encoder
    return encoder.block[0], encoder.final_layer_norm


def use_int8(block: torch.nn.Module, stored: StoredBlocks) -> None:
    """Put bitsandbytes' layers where the stored blocks are read as int8."""
    quantized = [part for part in stored.layout if part.dtype == torch.int8]
    if not quantized:
        return
    from bitsandbytes.nn import Linear8bitLt

    saved = getattr(stored.config, "quantization_config", None) or {}
    threshold = saved.get("llm_int8_threshold", INT8_THRESHOLD)
    for part in quantized:
        path, _, name = part.name.removesuffix(".weight").rpartition(".")
        rows, columns = part.shape
        layer = Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        setattr(block.get_submodule(path), name, layer.eval())


def bind(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
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


def unbind(module: torch.nn.Module) -> None:
    """Drop the tensors, of which an error's traceback could keep the module."""
    layer: Any
    for layer in module.modules():
        if getattr(layer, "weight", None) is not None:
            empty = torch.empty_like(layer.weight, device="meta")
            layer.weight = torch.nn.Parameter(empty, requires_grad=False)
        if hasattr(layer, "state"):
            layer.state.CB = layer.state.SCB = layer.state.idx = None


def _scale_name(name: str) -> str:
    return name.removesuffix("weight") + "SCB"
