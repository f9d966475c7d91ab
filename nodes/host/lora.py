"""Patches made for the host's own PixArt, applied to the same weights under our names.

The host finds a LoRA's targets by the authors' names, in which q, k and v are one tensor; ours are three.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable

import torch
from comfy.weight_adapter import WeightAdapterBase

from ...pixart_sigma.transformer.keys import to_diffusers_keys, to_original_keys
from .bypass import RefusedRows
from .merging import rows_of_merge

PREFIX = "diffusion_model."


def authors_names(weights: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The authors' names of weights, each with ours: several for a fused one."""
    return _authors_names(tuple(name for name in weights if name.startswith(PREFIX)))


@functools.lru_cache(8)
def _authors_names(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    found = to_original_keys(name.removeprefix(PREFIX) for name in names)
    return {PREFIX + name: tuple(PREFIX + part for part in ours) for name, ours in found.items()}


class NamedTwice(dict):
    """A state dict whose `keys()` has the authors' names too: there the host looks for a LoRA's targets.

    Under such a name lies the weight as the authors have it. What is iterated, counted or copied is under our
    names alone. `width` is the rows that q, k and v have each.
    """

    def __init__(self, state_dict: dict, width: int):
        super().__init__(state_dict)
        self._authors = authors_names(self)
        self._refused = [
            RefusedRows((name, (0, part * width, width)))
            for name, ours in self._authors.items()
            if len(ours) > 1
            for part in range(len(ours))
        ]

    def keys(self):
        return dict.fromkeys((*super().keys(), *self._authors, *self._refused)).keys()

    def __missing__(self, name):
        parts = [self[part] for part in self._authors[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_translated(add, patches: dict, width: int) -> list:
    """Give `add(patches)` our patches for the host's; returns those of the host's keys that were applied."""
    # A file may hold one patch for q, k and v together and another for q: the same key twice.
    rounds = []
    targets = defaultdict(list)
    for key, patch in patches.items():
        for target, part in translate(key, patch, width):
            chosen = next((made for made in rounds if target not in made), None)
            if chosen is None:
                chosen = {}
                rounds.append(chosen)
            chosen[target] = part
            targets[key].append(target)
    applied = {target for made in rounds for target in add(made)}
    return [key for key in patches if all(target in applied for target in targets[key])]


def translate(key, patch, width: int) -> list[tuple]:
    """(key, patch) for each of our weights that a patch of the host is for.

    Keys are a weight's name or (name, (dimension, start, length)). `width` is the rows that q, k and v have
    each. What can not be translated is returned as it is.
    """
    name, *where = (key,) if isinstance(key, str) else key
    names = to_diffusers_keys(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else ()
    if len(names) == 1:
        renamed = PREFIX + names[0]
        return [((renamed, *where) if where else renamed, patch)]
    offset, *function = where or (None,)
    parts = [((0, index * width, width), PREFIX + part) for index, part in enumerate(names)]
    if offset is not None:
        exact = dict(parts).get(tuple(offset))
        return [((exact, None, *function) if function else exact, patch)] if exact else [(key, patch)]
    split = [(part, rows_of(patch, rows[1], width, width * len(names))) for rows, part in parts]
    return split if split and all(part is not None for _, part in split) else [(key, patch)]


def rows_of(patch, start: int, count: int, total: int):
    """The part of a patch for `total` rows that changes `count` rows from `start`, or None."""
    if isinstance(patch, WeightAdapterBase):
        return RowsAdapter(patch.loaded_keys, (patch, start, total))
    if isinstance(patch, list):
        return rows_of_merge(patch, start, count)
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] in ("diff", "set", "model_as_lora"):
        tensor, *settings = patch[1]
        if len(tensor) == total:
            return patch[0], (tensor.narrow(0, start, count), *settings)
    return None


class RowsAdapter(WeightAdapterBase):
    """Some rows of what another adapter does; `weights` are that one, the first row, and how many it has."""

    name = "rows"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(self, weight, *arguments, **settings):
        adapter, start, total = self.weights
        whole = weight.new_zeros(total, *weight.shape[1:])
        rows = slice(start, start + len(weight))
        whole[rows] = weight
        # A view would keep all rows alive for as long as the patched weight.
        return adapter.calculate_weight(whole, *arguments, **settings)[rows].clone()
