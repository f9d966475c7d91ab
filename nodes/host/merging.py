"""Merges of MODELs by the host's nodes: each weight of one is given to the other as a patch.

Such a patch is a list as of the host's `get_key_patches`: (weight, function) first, where the function makes
of a copy of the weight what is merged, and then the patches that the weight has itself.
"""

import comfy.lora
import comfy.model_management
import torch

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.transformer.keys import DROPPED


class Fused(list):
    """The patch for a weight of the authors that is several of ours, whose patches are `parts`."""

    def __init__(self, parts: list[list]):
        self.parts = parts
        (first, _), *_ = parts[0]
        super().__init__([(first, self._join)])

    def _join(self, first, **_):
        made = [_evaluate(self.parts[0], first)]
        for part in self.parts[1:]:
            weight = comfy.model_management.cast_to_device(part[0][0], first.device, first.dtype, copy=True)
            made.append(_evaluate(part, weight))
        return torch.cat(made)

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(len(part[0][0]) for part in self.parts), *self.parts[0][0][0].shape[1:])


def in_authors_names(patches: dict, names: dict[str, tuple[str, ...]]) -> dict:
    """What `get_key_patches` has by our names, as the host's own PixArt would have it."""
    found = {}
    for name, ours in names.items():
        parts = [patches[part] for part in ours if part in patches]
        if len(parts) == len(ours):
            found[name] = parts[0] if len(parts) == 1 else Fused(parts)
    return found


def rows_of_merge(patch: list, start: int, count: int) -> list:
    """The patch that merges `count` rows from `start` of the weight that another is for."""
    if isinstance(patch, Fused):
        return patch.parts[start // count]
    return [(patch[0][0], lambda weight, **_: _evaluate(patch, weight).narrow(0, start, count).clone())]


def _evaluate(patch: list, weight):
    """What is merged, from a copy of the patch's weight."""
    (_, convert), *rest = patch
    return comfy.lora.calculate_weight(
        rest, convert(weight, inplace=True), "merged weight", intermediate_dtype=weight.dtype
    )


def check_merge(patches: dict, names: dict[str, tuple[str, ...]], weights: dict) -> dict:
    """The patches without those of training alone, which our network has not.

    names: ours by the authors'. weights: ours by our names. Raises SigmaError for a MODEL that is not like
    ours.
    """
    kept = {}
    for name, patch in patches.items():
        if not isinstance(patch, list):
            kept[name] = patch
            continue
        bare = name.removeprefix("diffusion_model.")
        if bare in DROPPED["original"]:
            continue
        parts = [weights[part] for part in names.get(name, (name,)) if part in weights]
        if not parts:
            raise SigmaError(
                f"The other MODEL has a weight {bare}, which this PixArt-Sigma has no place for. Only "
                "transformers of one architecture can be merged: PixArt-Sigma with PixArt-Sigma, both with "
                "trained KV compression or both without."
            )
        expected = (sum(len(part) for part in parts), *parts[0].shape[1:])
        shape = tuple(patch.shape if isinstance(patch, Fused) else patch[0][0].shape)
        if shape != expected:
            raise SigmaError(
                f"The weight {bare} of the other MODEL is {shape}, and that of this one is {expected}: they "
                "differ in size, as the demo and the published model do, and can not be merged."
            )
        kept[name] = patch
    return kept
