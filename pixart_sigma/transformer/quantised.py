"""Linear layers whose weight stays as its file stores it, and is dequantised for each use."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..files.quantised_weights import QuantisedWeight
from .changes import Change

STORED = "stored_"  # in front of the names of a layer's stored tensors
# Bytes for each number of a layer while it is dequantised: two float32 and what they are unpacked from, at
# most (measured, see the tests).
PER_NUMBER = 10


class QuantisedLinear(torch.nn.Module):
    """A linear layer on a quantised weight (out, in) and a bias (out).

    The stored tensors are its parameters, as bytes, so that they move between devices and are counted as
    other weights are, and no change of dtype touches them. It computes what a linear layer on the weight
    dequantised to the bias' dtype does, bit for bit.
    """

    bias: torch.nn.Parameter

    def __init__(self, weight: QuantisedWeight, change: Change | None = None):
        """weight: on the meta device for a layer that is only measured. change: what becomes of the
        dequantised weight, at every use."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.form, self.change = weight.form, change
        self._meaning = {name: (part.dtype, part.shape) for name, part in weight.parts.items()}
        self._weight = weight.with_parts({})
        for name, stored in stored_parts(weight).items():
            self.register_parameter(name, torch.nn.Parameter(stored, requires_grad=False))
        self.bias = torch.nn.Parameter(torch.empty(self.out_features, device="meta"))

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out, in), dequantised and changed, in the dtype of the bias and on its device."""
        parts = {
            name: getattr(self, STORED + name).view(dtype).view(shape)
            for name, (dtype, shape) in self._meaning.items()
        }
        weight = self._weight.with_parts(parts).dequantise()
        if self.change is not None:
            weight = self.change(weight)
        return weight.to(self.bias.dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"


def stored_parts(weight: QuantisedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a quantised weight as bytes, by the names of a QuantisedLinear's parameters."""
    return {
        STORED + name: part.contiguous().reshape(-1).view(torch.uint8) for name, part in weight.parts.items()
    }


def put_layers(
    transformer: torch.nn.Module,
    quantised: Iterable[tuple[str, QuantisedWeight]],
    changes: Mapping[str, Change],
) -> None:
    """Put a QuantisedLinear in the place of each linear layer whose weight is given, by its name."""
    for name, weight in quantised:
        path = name.removesuffix(".weight")
        parent, _, own = path.rpartition(".")
        setattr(transformer.get_submodule(parent), own, QuantisedLinear(weight, changes.get(name)))


def stays_quantised(name: str, weight: Any) -> bool:
    """Whether a weight is a linear layer's that is kept as it is stored: all of a PixArt transformer's
    two-dimensional `weight`s are. Others are dequantised when they are loaded."""
    return isinstance(weight, QuantisedWeight) and weight.ndim == 2 and name.endswith(".weight")


def working_nbytes(quantised: Iterable[tuple[str, QuantisedWeight]]) -> int:
    """Bytes that dequantising needs beside the weights, for the largest layer."""
    return PER_NUMBER * max((weight.numel() for _, weight in quantised), default=0)
