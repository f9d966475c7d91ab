"""Changes of T5's weights by adapters, made whenever a weight is read from its file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..files.quantised_weights import dequantised


@dataclass(frozen=True)
class WeightChanges:
    """What adapters do to T5's weights. of: by a weight's name, from the weight in float32 to the changed
    one; fingerprint: of all that decides it."""

    of: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    fingerprint: str

    def applied(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The weights of `read_t5`, of which those that change do so when they are read."""
        return weights | {name: ChangedWeight(weights[name], change) for name, change in self.of.items()}


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """A stored weight that is changed whenever it is read; it answers as `QuantisedWeight` does."""

    stored: Any
    change: Callable[[torch.Tensor], torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it is read as."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.stored.nbytes

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def is_floating_point(self) -> bool:
        return True

    def __getitem__(self, index) -> torch.Tensor:
        return self.change(dequantised(self.stored).to(torch.float32))[index]
