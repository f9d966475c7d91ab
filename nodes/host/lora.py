"""Patches made for the host's own PixArt, applied to the same weights under our names.

The host finds a LoRA's targets by the authors' names, in which q, k and v are one tensor; ours are three.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable

import torch
from comfy.weight_adapter import WeightAdapterBase

from ...pixart_sigma.transformer.keys import to_diffusers_keys, to_original_keys
from ...pixart_sigma.transformer.lora_names import LayerNames
from .bypass import RefusedRows
from .merging import rows_of_merge
from .whole_matrix import JoinedAdapter, KindAdapter, rows_are_apart

PREFIX = "diffusion_model."
WEIGHT = ".weight"
BIAS = ".bias"


def authors_names(weights: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The authors' names of weights, each with ours: several for a fused one."""
    return _authors_names(tuple(name for name in weights if name.startswith(PREFIX)))


@functools.lru_cache(8)
def _authors_names(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    found = to_original_keys(name.removeprefix(PREFIX) for name in names)
    return {PREFIX + name: tuple(PREFIX + part for part in ours) for name, ours in found.items()}


class SpelledName(str):
    """The name of a weight or layer, that is written as a trainer spells it.

    The host writes the names of layers into its list of a LoRA's targets by `format`, and finds them by the
    names themselves. Several are of one weight, so each equals itself alone.
    """

    def __new__(cls, weight: str, spelled: str):
        made = super().__new__(cls, weight)
        made.spelled = spelled
        return made

    def __getitem__(self, part):
        found = super().__getitem__(part)
        return SpelledName(found, self.spelled) if part == slice(None, -len(WEIGHT)) else found

    def __format__(self, form):
        return self.spelled

    def __hash__(self):
        return hash((str(self), self.spelled))

    def __eq__(self, other):
        return isinstance(other, SpelledName) and (str(self), self.spelled) == (str(other), other.spelled)


@functools.lru_cache(8)
def _layer_names(names: tuple[str, ...]) -> LayerNames:
    return LayerNames(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


@functools.lru_cache(8)
def _spelled_names(names: tuple[str, ...]) -> tuple[SpelledName, ...]:
    """A name for each spelling of each layer."""
    weights = {
        tuple(part.removesuffix(WEIGHT) for part in ours): authors
        for authors, ours in authors_names(names).items()
    }
    weights |= {(name.removesuffix(WEIGHT),): name for name in names}
    spelled = []
    for spelling, modules in _layer_names(names).spellings():
        weight = weights.get(tuple(PREFIX + module for module in modules))
        if weight is not None and not weight.endswith(".bias"):
            spelled.append(SpelledName(weight, spelling))
    return tuple(spelled)


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
        # What stands last is the one that the host takes of two that it spells alike.
        spelled = _spelled_names(tuple(super().keys()))
        return dict.fromkeys((*spelled, *super().keys(), *self._authors, *self._refused)).keys()

    def __missing__(self, name):
        name = str(name)
        if name in self:
            return self[name]
        parts = [self[part] for part in self._authors[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_translated(add, patches: dict, width: int, weights: Iterable[str]) -> list:
    """Give `add(patches)` our patches for the host's; returns those of the host's keys that were applied.

    weights: our names of all.
    """
    names = _layer_names(tuple(weights))
    # A file may hold one patch for q, k and v together and another for q: the same key twice.
    rounds = []
    targets = defaultdict(list)
    for key, patch in patches.items():
        for target, part in translate(key, patch, width, names):
            chosen = next((made for made in rounds if target not in made), None)
            if chosen is None:
                chosen = {}
                rounds.append(chosen)
            chosen[target] = part
            targets[key].append(target)
    applied = {target for made in rounds for target in add(made)}
    return [key for key in patches if all(target in applied for target in targets[key])]


def translate(key, patch, width: int, layers: LayerNames) -> list[tuple]:
    """(key, patch) for each of our weights that a patch of the host is for.

    Keys are a weight's name or (name, (dimension, start, length)). `width` is the rows that q, k and v have
    each. What can not be translated is returned as it is.
    """
    name, *where = (key,) if isinstance(key, str) else key
    if isinstance(name, SpelledName):
        name = str(name)
        key = (name, *where) if where else name
    names = _names_of(name, layers)
    if len(names) == 1:
        renamed = PREFIX + names[0]
        return [((renamed, *where) if where else renamed, patch)]
    offset, *function = where or (None,)
    parts = [((0, index * width, width), PREFIX + part) for index, part in enumerate(names)]
    if offset is not None:
        exact = dict(parts).get(tuple(offset))
        return [((exact, None, *function) if function else exact, patch)] if exact else [(key, patch)]
    split = [(part, rows_of(patch, rows, [part for _, part in parts])) for rows, part in parts]
    return split if split and all(part is not None for _, part in split) else [(key, patch)]


def _names_of(name: str, layers: LayerNames) -> tuple[str, ...]:
    """diffusers' names for a weight of the authors, or for the bias of a layer as a trainer spells it."""
    if name.startswith(PREFIX):
        return to_diffusers_keys(name.removeprefix(PREFIX))
    found = layers.find(name.removesuffix(BIAS)) if name.endswith(BIAS) else None
    return tuple(module + BIAS for module in found.modules) if found else ()


def rows_of(patch, rows: tuple[int, int, int], names: list[str]):
    """The part of a patch for several weights as one that is for `rows`, (dimension, start, length), or None.
    names: ours of those weights, of as many rows each."""
    _, start, count = rows
    total = count * len(names)
    if isinstance(patch, WeightAdapterBase):
        if not rows_are_apart(patch, count, total):
            return JoinedAdapter(patch.loaded_keys, (patch, tuple(names), start // count))
        if isinstance(patch, KindAdapter):
            return patch.narrow(start, count)
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
