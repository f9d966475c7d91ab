"""What changes several weights of ours as one matrix, as which the authors have them, in the host's patches.

The host gives a patch one weight at a time. DoRA by columns, and OFT whose blocks cross q, k and v, have to
see the others as they are at that point of the patches.
"""

from dataclasses import fields

import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import get_key_weight
from comfy.weight_adapter import WeightAdapterBase

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.transformer.changes import Edit, Kind

# The host's adapters that turn blocks of rows, and where in the others' weights the magnitudes of DoRA are.
TURNS = ("oft", "boft")
MAGNITUDES = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5}


class KindAdapter(WeightAdapterBase):
    """What the engine's adapters do to a weight, or to some of its rows.

    weights: the kind with its tensors spread out, so that the host finds and moves them; the shape of the
    whole matrix; which rows of it the weight is.
    """

    name = "pixart_sigma"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, edit: Edit) -> "KindAdapter":
        return cls({edit.layer}, (_spread(edit.kind), edit.shape, slice(None)))

    @property
    def rowwise(self) -> bool:
        return _gather(self.weights[0]).rowwise

    def narrow(self, start: int, count: int) -> "KindAdapter":
        """The same for `count` rows from `start`."""
        kind, shape, _ = self.weights
        return KindAdapter(self.loaded_keys, (kind, shape, slice(start, start + count)))

    def calculate_weight(self, weight, key, strength, *arguments, **settings):
        kind, shape, rows = self.weights
        changed = _gather(kind).apply(weight.to(torch.float32), shape, rows, strength)
        # In place: where a patch is for some rows of a weight, the host keeps what it gave.
        return weight.copy_(changed)


def _spread(kind: Kind) -> tuple:
    """(its class, its fields), with those of a kind within in the same way."""
    held = (getattr(kind, field.name) for field in fields(kind))
    return type(kind), tuple(_spread(value) if hasattr(value, "apply") else value for value in held)


def _gather(spread: tuple) -> Kind:
    made, held = spread
    return made(*(_gather(value) if _is_spread(value) else value for value in held))


def _is_spread(value) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], type)


class JoinedAdapter(WeightAdapterBase):
    """One weight's part of what another adapter does to several as one.

    weights: that adapter, the names of all of them in the order of their rows, or once it is one of a MODEL's
    patches their `Siblings`, and which of them this one is.
    """

    name = "joined"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    def within(self, patcher) -> "JoinedAdapter":
        adapter, names, index = self.weights
        return JoinedAdapter(self.loaded_keys, (adapter, Siblings(patcher, names), index))

    def calculate_weight(self, weight, key, strength, strength_model, *arguments, **settings):
        adapter, siblings, index = self.weights
        parts = [
            weight if place == index else siblings.before(name, weight, strength_model)
            for place, name in enumerate(siblings.names)
        ]
        whole = adapter.calculate_weight(
            torch.cat(parts), key, strength, strength_model, *arguments, **settings
        )
        return weight.copy_(whole.tensor_split(len(parts))[index])


class Siblings:
    """The weights of one matrix of the authors, and what a MODEL's patches do to each before a joined one."""

    def __init__(self, patcher, names: tuple[str, ...]):
        self.names = names
        # Not the patcher: its patches hold this, and what refers to itself is released late.
        self._model, self._backup = patcher.model, patcher.backup
        self._patches = {name: tuple(patcher.patches.get(name, ())) for name in names}

    def before(self, name: str, like: torch.Tensor, strength_model: float) -> torch.Tensor:
        """A weight as it is before the joined patch, on the device and in the dtype of another."""
        weight, _, convert = get_key_weight(self._model, name)
        if name in self._backup:
            weight = self._backup[name].weight
        weight = comfy.model_management.cast_to_device(weight, like.device, like.dtype, copy=True)
        if convert is not None:
            weight = convert(weight, inplace=True)
        patches = self._patches[name]
        return strength_model * comfy.lora.calculate_weight(patches, weight, name, like.dtype)


def rows_are_apart(patch: WeightAdapterBase, count: int, total: int) -> bool:
    """Whether each `count` rows of a weight of `total` can be changed without the others."""
    if isinstance(patch, KindAdapter):
        return patch.rowwise
    if patch.name in TURNS:
        return count % patch.weights[0].shape[-1] == 0
    magnitudes = patch.weights[MAGNITUDES[patch.name]] if patch.name in MAGNITUDES else None
    return magnitudes is None or len(magnitudes) == total


def with_siblings(patches: dict, patcher) -> dict:
    """The patches, of which each joined one knows the other weights of the patcher's MODEL."""
    joined = {key: patch for key, patch in patches.items() if isinstance(patch, JoinedAdapter)}
    return patches | {key: patch.within(patcher) for key, patch in joined.items()}


def refuse_joined(patches: dict) -> dict:
    """The patches of a hook, which is put on and taken off while the others stay; SigmaError for a joined
    one."""
    if any(isinstance(patch, JoinedAdapter) for patch in patches.values()):
        raise SigmaError(
            "This LoRA (DoRA by columns, or OFT) changes q, k and v as one matrix, whose rows depend on each "
            "other, and a hook changes them one by one. Load it without a hook, by Load Σ LoRA or Load LoRA."
        )
    return patches
