"""A quantised weight as its file stores it, in any form: its raw tensors, and the numbers they stand for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A quantised weight of shape (rows, ...), dequantised to float32 only when it is read.

    form: what the file calls it, such as "Q5_0" or "int8_tensorwise". parts: the stored tensors by name, each
    with a row for each row of the weight, or without dimensions. formula(**parts): the float32 numbers, in
    any shape. It also answers `weight[...]`, the way transformers reads the slices of a safetensors file, so
    that loading never holds more than one dequantised weight.
    """

    form: str
    shape: tuple[int, ...]
    parts: Mapping[str, torch.Tensor]
    formula: Callable[..., torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it is read as."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        """How many numbers it stands for."""
        return torch.Size(self.shape).numel()

    def is_floating_point(self) -> bool:
        return True

    def dequantise(self) -> torch.Tensor:
        """The weight in float32, on the device of its parts."""
        return self.formula(**self.parts).reshape(self.shape)

    def __getitem__(self, index) -> torch.Tensor:
        if isinstance(index, int):
            return self.select([index]).dequantise()[0]
        return self.dequantise()[index]

    def with_parts(self, parts: Mapping[str, torch.Tensor]) -> "QuantisedWeight":
        """The same weight on other tensors, such as copies on another device."""
        return QuantisedWeight(self.form, self.shape, parts, self.formula)

    def select(self, rows) -> "QuantisedWeight":
        """Some of its rows, by a slice, a list or a tensor of their numbers; nothing is dequantised."""
        parts = {name: _rows(part, rows) if part.ndim else part for name, part in self.parts.items()}
        counted = next(part for part in parts.values() if part.ndim)
        return QuantisedWeight(self.form, (counted.shape[0], *self.shape[1:]), parts, self.formula)

    def chunk(self, count: int) -> list["QuantisedWeight"]:
        """Its rows in so many equal parts, as torch.chunk has it. The rows must be a multiple of them."""
        rows = self.shape[0] // count
        return [self.select(slice(part * rows, (part + 1) * rows)) for part in range(count)]


def _rows(part: torch.Tensor, rows) -> torch.Tensor:
    if part.dtype.itemsize > 1:
        return part[rows]
    return part.view(torch.uint8)[rows].view(part.dtype)  # not every torch that is promised indexes float8


def dequantised(weight) -> torch.Tensor:
    """A quantised weight in float32; a tensor as it is."""
    return weight.dequantise() if isinstance(weight, QuantisedWeight) else weight


def split_rows(weight, count: int) -> list:
    """A tensor or quantised weight in so many equal parts along its rows."""
    return weight.chunk(count) if isinstance(weight, QuantisedWeight) else list(torch.chunk(weight, count))


def describe_storage(weights: Mapping) -> str:
    """How tensors and quantised weights are stored, and the bytes of each kind, the most first."""
    counted: dict[str, int] = {}
    for weight in weights.values():
        kind = weight.form if isinstance(weight, QuantisedWeight) else str(weight.dtype)
        kind = kind.removeprefix("torch.")
        counted[kind] = counted.get(kind, 0) + weight.nbytes
    kinds = sorted(counted, key=lambda kind: -counted[kind])
    return ", ".join(f"{kind} ({counted[kind] / 1e6:,.1f} MB)" for kind in kinds)
