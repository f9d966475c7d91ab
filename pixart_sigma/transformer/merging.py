"""A transformer with others and adapters merged into it, and written as a file of its own."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SigmaError
from ..files.parts import FACTS
from ..files.quantised_weights import dequantised
from ..files.weight_files import facts_tensor, read_metadata
from ..files.weight_writing import write_safetensors
from ..files.writing import beside
from .checkpoint import Checkpoint, load_transformer_state_dict
from .config import expected_shapes
from .keys import to_original_keys
from .lora import Adapter, adapter_changes

MERGED = "pixart_sigma.merged"  # in the file's metadata: what was merged
# What a file's metadata say of how its numbers are stored, which others are then.
OF_STORAGE = ("format", "_quantization_metadata")
KEY_STYLES = ("diffusers", "original")


@dataclass(frozen=True)
class Merge:
    """What is merged: of `other` its share of the sum, the rest of `base`; then the adapters, in order."""

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...] = ()
    other: Checkpoint | None = None
    share: float = 0.0

    def __post_init__(self):
        if self.other is not None:
            _check_alike(self.base, self.other)

    @property
    def dtype(self) -> torch.dtype:
        """What the base is stored in; of quantised and float8 weights, whose scale a change may leave,
        bfloat16."""
        stored = self.base.dtype
        return torch.bfloat16 if self.base.quantised or stored.itemsize == 1 else stored

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All weights by diffusers' names, computed in float32 and rounded once.

        Raises SigmaError that names a weight which is not finite then.
        """
        base = load_transformer_state_dict(self.base)
        other = load_transformer_state_dict(self.other) if self.other is not None else None

        def summed(name: str) -> torch.Tensor:
            weight = dequantised(base[name])
            if other is None:
                return weight
            weight = weight.to(torch.float32)
            return weight + self.share * (dequantised(other[name]).to(torch.float32) - weight)

        changes = adapter_changes(self.adapters, summed)
        made = {}
        for name in base:
            weight = summed(name)
            if name in changes:
                weight = changes[name](weight.to(torch.float32))
            made[name] = weight.to(dtype)
            if not torch.isfinite(made[name]).all():
                raise SigmaError(
                    f"The merged {name} has numbers that are not finite in {_word(dtype)}: a file is "
                    "damaged, or a strength too large"
                    + (", or they are beyond float16: write bf16." if dtype == torch.float16 else ".")
                )
        return made

    def describe(self) -> str:
        """A line for people on each thing that is merged."""
        lines = [f"base            {self.base.path} ({self.base.storage})"]
        if self.other is not None:
            lines[0] += f": {1 - self.share:g} of it"
            lines.append(f"with            {self.other.path} ({self.other.storage}): {self.share:g} of it")
        for adapter, strength in self.adapters:
            changed = len({name for edit in adapter.edits for name in edit.names})
            lines.append(
                f"adapter         {adapter.source}: {changed} weights changed, strength {strength:g}"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """For the file's metadata."""
        said: dict = {"base": self.base.path.name}
        if self.other is not None:
            said |= {"with": self.other.path.name, "share": self.share}
        files = [{"name": one.source.name, "strength": strength} for one, strength in self.adapters]
        return said | {"adapters": files}


def write_merged(path: Path, merge: Merge, key_style: str, dtype: torch.dtype | None = None) -> str:
    """Write the merged transformer as .safetensors, and return what was written, in words.

    key_style: of KEY_STYLES. dtype: None for the base's. With it stand the base's size and noise schedule,
    which weights do not tell, and its metadata. Raises SigmaError as `Merge.weights`; then nothing is
    written.
    """
    dtype = dtype or merge.dtype
    weights = merge.weights(dtype)
    if key_style == "original":
        weights = {
            name: weights[parts[0]] if len(parts) == 1 else torch.cat([weights[part] for part in parts])
            for name, parts in to_original_keys(weights).items()
        }
    metadata = read_metadata(merge.base.components["transformer"])
    metadata = {name: text for name, text in metadata.items() if name not in OF_STORAGE}
    metadata |= {"format": "pt", MERGED: json.dumps(merge.as_dict())}
    said = {FACTS: facts_tensor(merge.base.facts)}
    with beside(path) as made:
        write_safetensors(made, weights | said, (weights | said).items(), metadata)
    size = sum(weight.nbytes for weight in weights.values())
    return f"{len(weights)} weights, {key_style} keys, {_word(dtype)} ({size / 1e6:,.1f} MB)"


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """SigmaError unless two transformers can be summed: weights of the same shapes, for the same size, noise
    and latents."""
    shapes, others = expected_shapes(first.config), expected_shapes(other.config)
    for name in sorted(shapes.keys() ^ others.keys()):
        lacking = other if name in shapes else first
        raise SigmaError(
            f"{lacking.path} has no {name}, and the other has one: transformers of different depth or kind "
            "can not be summed."
        )
    for name, shape in shapes.items():
        if others[name] != shape:
            raise SigmaError(
                f"{name} is {shape} in {first.path} and {others[name]} in {other.path}: transformers of "
                "different width can not be summed."
            )
    for words, one, another in (
        ("variant", first.variant, other.variant),
        ("interpolation_scale", first.config.interpolation_scale, other.config.interpolation_scale),
        ("latents", first.latent_format, other.latent_format),
        ("noise schedule", first.noise_schedule.describe(), other.noise_schedule.describe()),
    ):
        if one != another:
            raise SigmaError(
                f"The {words} of {first.path} is {one}, and that of {other.path} {another}: a sum of them "
                "draws neither." + (" Say --variant, if that is wrong." if words == "variant" else "")
            )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
