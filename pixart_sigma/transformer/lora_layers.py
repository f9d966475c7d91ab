"""The tensors of an adapter's file, put together by the layer that they are of."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError, SigmaError
from .lora_kinds import Layer
from .lora_names import LayerNames, split_name


@dataclass(frozen=True)
class Grouped:
    """spellings: whose names the layers have, and how many. unmatched: names that are nobody's."""

    layers: tuple[Layer, ...]
    spellings: Counter
    unmatched: tuple[str, ...]


def group_layers(tensors: dict[str, torch.Tensor], names: LayerNames, source: Path) -> Grouped:
    """Raises CheckpointError where two tensors or modules have one name."""
    groups: dict[tuple[str, ...], Layer] = {}
    spellings: Counter = Counter()
    unmatched = []
    for key, tensor in tensors.items():
        name, part = split_name(key)
        try:
            found = names.find(name) if part else None
        except SigmaError as error:
            raise CheckpointError(f"The names in {source} are not clear: {error}") from error
        if found is None:
            unmatched.append(key)
            continue
        if found.modules not in groups:
            groups[found.modules] = Layer(name, found.modules, {})
            spellings[found.spelling] += 1
        if part in groups[found.modules].tensors:
            raise CheckpointError(f"{source} has {part} of {name} twice, under two names.")
        groups[found.modules].tensors[part] = tensor
    return Grouped(tuple(groups.values()), spellings, tuple(unmatched))
