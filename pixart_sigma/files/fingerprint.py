"""A model known again by its weights, without reading all of them."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from .quantised_weights import QuantisedWeight

SAMPLED_NUMBERS = 32  # of each weight, at its start, middle and end


def fingerprint(weights: dict[str, Any], *beside: bytes) -> str:
    """A SHA-256 of what lies `beside` the weights, and of every weight its name, shape, dtype and some
    numbers as they are stored: the same weights in another dtype are others, since what they compute
    differs."""
    digest = hashlib.sha256()
    for part in beside:
        digest.update(part)
    for key, weight in sorted(_stored(weights)):
        digest.update(f"\n{key} {weight.dtype} {tuple(weight.shape)}\n".encode())
        flat = weight.reshape(-1)
        for start in (0, len(flat) // 2, max(0, len(flat) - SAMPLED_NUMBERS)):
            digest.update(raw_bytes(flat[start : start + SAMPLED_NUMBERS]))
    return digest.hexdigest()


def _stored(weights: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, weight in weights.items():
        if isinstance(weight, QuantisedWeight):
            yield from ((f"{key}.{name} {weight.form}", part) for name, part in weight.parts.items())
        else:
            yield key, weight


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The numbers of a tensor on the CPU as they are stored."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*tensors: torch.Tensor) -> str:
    """A SHA-256 of the numbers in some tensors."""
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(raw_bytes(tensor.cpu()))
    return made.hexdigest()
