"""The layers under the authors' names, for the host's LoRA loaders that change layers and not weights.

They find a LoRA's target in the keys of the state dict, look it up by attributes, and set `forward` of what
they find (comfy/weight_adapter/bypass.py).
"""

import functools

import torch
from comfy.patcher_extension import PatcherInjection

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.transformer.keys import to_diffusers_keys
from .whole_matrix import rows_are_apart


class PartOfName:
    """The beginning of an authors' name; its attributes and items are what comes next in the name.

    `module` is the network, or a block for names that begin with "blocks.0".
    """

    __iter__ = None

    def __init__(self, module, path: str):
        self._module, self._path = module, path

    def __getattr__(self, part: str):
        return self[part]

    def __getitem__(self, part):
        path = f"{self._path}.{part}"
        names = to_diffusers_keys(f"{path}.weight")
        if not names:
            return PartOfName(self._module, path)
        names = (name.removeprefix("transformer_blocks.0.").removesuffix(".weight") for name in names)
        layers = [self._module.get_submodule(name) for name in names]
        return layers[0] if len(layers) == 1 else FusedLayer(layers)


class FusedLayer:
    """Layers of ours that are one with the authors: a `forward` that is set acts on each, in its own rows."""

    def __init__(self, layers: list):
        self._layers = layers

    @property
    def weight(self) -> torch.Tensor:
        """Of the shape and dtype of all rows; without values."""
        first = self._layers[0].weight
        rows = sum(len(layer.weight) for layer in self._layers)
        return torch.empty(rows, *first.shape[1:], dtype=first.dtype, device="meta")

    @property
    def forward(self) -> tuple:
        return tuple(layer.forward for layer in self._layers)

    @forward.setter
    def forward(self, changed):
        """`changed` is the method of one of the host's hooks, or what `forward` was before."""
        if not isinstance(changed, tuple):
            adapter, start, total = changed.__self__.adapter, 0, len(self.weight)
            changed = []
            for layer in self._layers:
                _check_apart(adapter, len(layer.weight), total)
                rows = slice(start, start + len(layer.weight))
                changed.append(functools.partial(_forward_rows, adapter, layer.forward, rows, total))
                start = rows.stop
        for layer, forward in zip(self._layers, changed, strict=True):
            layer.forward = forward


def _check_apart(adapter, count: int, total: int) -> None:
    if not rows_are_apart(adapter, count, total):
        raise SigmaError(
            "This LoRA (DoRA by columns, or OFT) changes q, k and v as one matrix, whose rows depend on each "
            "other, which ComfyUI's bypass loaders can not do here. Load it with Load Σ LoRA or Load LoRA."
        )


def _forward_rows(adapter, original, rows: slice, total: int, x):
    """A layer's output where the adapter is for one of `total` rows, of which the layer has some."""

    def whole(x):
        made = original(x)
        padded = made.new_zeros(*made.shape[:-1], total)
        padded[..., rows] = made
        return padded

    return adapter.bypass_forward(whole, x)[..., rows]


def one_after_the_other(injections: list[PatcherInjection]) -> PatcherInjection:
    """Those of several LoRAs, of which the last is taken out first."""

    def inject(patcher):
        for injection in injections:
            injection.inject(patcher)

    def eject(patcher):
        for injection in reversed(injections):
            injection.eject(patcher)

    return PatcherInjection(inject=inject, eject=eject)


BYPASS = "bypass_lora"  # the host's name for these injections


def refuse_copies(injections: dict) -> None:
    """SigmaError where layers are changed of a MODEL that is copied to another device: the copy's are not."""
    if BYPASS in injections:
        raise SigmaError(
            "This MODEL has a LoRA from a bypass loader, which changes layers on one device alone, and is "
            "copied to another (MultiGPU CFG Split, Select Model Device). Load the LoRA with Load Σ LoRA or "
            "Load LoRA."
        )


class RefusedRows(str):
    """In the keys of a state dict, equal to the host's (name, rows) for a part of a fused weight.

    The bypass loaders look for that pair there and leave the part out, with a line in the log, where it is
    not found. All others look for the name, and this one is no name.
    """

    def __new__(cls, pair: tuple):
        made = super().__new__(cls)
        made.pair = pair
        return made

    def __hash__(self):
        return hash(self.pair)

    def __eq__(self, other):
        if isinstance(other, tuple) and other == self.pair:
            raise SigmaError(
                "This LoRA changes q, k and v each by itself, and ComfyUI's bypass loaders leave those parts "
                "out. Load it with Load LoRA, which does the same otherwise."
            )
        return self is other
