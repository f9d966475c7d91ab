"""A transformer written in another form, a tensor at a time, and what each layer loses by it."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..choices import TRANSFORMER_FORMS
from ..errors import CheckpointError
from ..files.parts import FACTS
from ..files.quantised_weights import QuantisedWeight, dequantised
from ..files.quantising import QUANTISE, layer_facts
from ..files.weight_files import facts_tensor
from ..files.weight_writing import write_gguf, write_safetensors
from ..files.writing import beside
from .checkpoint import Checkpoint, load_transformer_state_dict
from .keys import to_original_keys

BLOCK_SIZE = 32  # of the types of GGUF that are written
NO_INPUTS: Mapping[str, torch.Tensor] = MappingProxyType({})
# Where diffusers' names of the layers begin that are quantised. The others see the timestep, the prompt or
# the tokens of the picture before and after all blocks. They are 3 % of the numbers; in 4 bits they would
# add 18 to 38 % to the demo's error for three of four prompts, in 8 nothing that could be measured.
QUANTISED = "transformer_blocks."


@dataclass(frozen=True)
class LayerError:
    """What a layer lost, in relative L2: of its weight, and of what comes out of it for given inputs, None
    where there were none. name: in the file."""

    name: str
    form: str
    weight: float
    output: float | None


def convert(
    checkpoint: Checkpoint,
    to: str,
    out: Path,
    inputs: Mapping[str, torch.Tensor] = NO_INPUTS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerError]:
    """Write a checkpoint's transformer to `out` as one of TRANSFORMER_FORMS, whole or not at all.

    inputs: of layers by diffusers' names, (n, in), which their outputs' errors are measured on. Quantised
    weights are dequantised first. No more than one tensor is in memory beside the mapped file. The names are
    the authors', by which ComfyUI's own loader knows PixArt-Sigma. Raises CheckpointError for numbers that
    are not finite.
    """
    conversion = _Conversion(checkpoint, to, inputs, on_progress)
    with beside(out) as made:
        conversion.write(made)
    return conversion.errors


@dataclass
class _Conversion:
    checkpoint: Checkpoint
    to: str
    inputs: Mapping[str, torch.Tensor]
    on_progress: Callable[[int, int], None]
    errors: list[LayerError] = field(default_factory=list)

    def write(self, path: Path) -> None:
        weights = load_transformer_state_dict(self.checkpoint)
        names = to_original_keys(weights)
        outline = {}
        for name, parts in names.items():
            rows = [torch.empty(tuple(weights[part].shape), device="meta") for part in parts]
            outline[name] = _store(parts[0], torch.cat(rows), self.to)
        facts = _certain(self.checkpoint)
        if TRANSFORMER_FORMS[self.to] == ".gguf":
            tensors = ((name, _blocks(stored)) for name, stored in self._convert(weights, names))
            write_gguf(path, outline, tensors, self.to.upper(), {FACTS: json.dumps(facts)})
            return
        said = {FACTS: facts_tensor(facts)}
        layers = (_layers([pair]).items() for pair in self._convert(weights, names))
        planned = said | _layers(outline.items())
        write_safetensors(path, planned, chain(said.items(), chain.from_iterable(layers)))

    def _convert(self, weights: dict, names: dict) -> Iterator[tuple[str, Any]]:
        """What is stored of each weight, by its name in the file."""
        for done, (name, parts) in enumerate(names.items()):
            self.on_progress(done, len(names))
            weight = torch.cat([dequantised(weights[part]).float() for part in parts])
            if not weight.isfinite().all():
                raise CheckpointError(
                    f"{self.checkpoint.path} has numbers in {name} that are not finite. It is damaged, or "
                    "was trained so: choose another file."
                )
            stored = _store(parts[0], weight, self.to)
            if weight.ndim == 2 and name.endswith(".weight"):
                self.errors.append(self._measure(name, parts[0], weight, stored))
            yield name, stored
        self.on_progress(len(names), len(names))

    def _measure(self, name: str, part: str, weight: torch.Tensor, stored) -> LayerError:
        off = dequantised(stored).float() - weight
        seen = self.inputs.get(part)
        output = None
        if seen is not None:
            seen = seen.float()
            output = _relative(seen @ off.T, seen @ weight.T)
        form = stored.form if isinstance(stored, QuantisedWeight) else str(stored.dtype)
        return LayerError(name, form.removeprefix("torch."), _relative(off, weight), output)


def _relative(off: torch.Tensor, of: torch.Tensor) -> float:
    size = of.norm()
    return float(off.norm() / size) if size else 0.0


def _store(part: str, weight: torch.Tensor, to: str) -> torch.Tensor | QuantisedWeight:
    """What is stored of a weight in float32; part: diffusers' name of it, or of one that it joins."""
    if to == "bf16":
        return weight.bfloat16()
    if weight.ndim != 2 or not part.endswith(".weight"):
        return weight  # biases, tables and the patch convolution, 0.2 % of all
    in_blocks = TRANSFORMER_FORMS[to] == ".gguf"
    if not part.startswith(QUANTISED) or (in_blocks and weight.shape[1] % BLOCK_SIZE):
        return weight.bfloat16()
    return QUANTISE[to](weight)


def _blocks(stored: torch.Tensor | QuantisedWeight) -> torch.Tensor:
    return stored.parts["weight"] if isinstance(stored, QuantisedWeight) else stored


def _layers(stored) -> dict[str, torch.Tensor]:
    """The tensors of weights as ComfyUI names them, of quantised ones with their scales and facts."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in stored:
        if isinstance(weight, QuantisedWeight):
            layer = name.removesuffix(".weight")
            tensors |= {name: weight.parts["weight"], f"{layer}.weight_scale": weight.parts["scale"]}
            tensors[f"{layer}.comfy_quant"] = layer_facts(weight)
        else:
            tensors[name] = weight
    return tensors


def _certain(checkpoint: Checkpoint) -> dict:
    """The checkpoint's facts without those that were guessed, so that they are guesses in the file too."""
    facts = dict(checkpoint.facts)
    if checkpoint.variant_source == "default":
        left = ("sample_size", "interpolation_scale")
        facts["config"] = {name: value for name, value in facts["config"].items() if name not in left}
    if not checkpoint.noise_schedule.source:
        del facts["noise_schedule"]
    return facts
