"""What an adapter's file has for T5, in the names of any trainer."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import CheckpointError
from .changes import Edit
from .lora_kinds import edits_of
from .lora_layers import group_layers
from .lora_names import TEXT_DOTTED, TEXT_FLATTENED, LayerNames
from .lora_scaling import Scaling

MOST_NAMED = 3  # of names in a message


@dataclass(frozen=True)
class TextPart:
    """The tensors for the text encoder in an adapter's file, and how strong they are."""

    source: Path
    tensors: dict[str, torch.Tensor] = field(repr=False)
    scaling: Scaling
    fingerprint: str

    @property
    def left_out(self) -> str:
        """What to tell people where it is not used."""
        return (
            f"{self.source.name} also changes the text encoder ({len(self.tensors)} tensors), which is not "
            "done here: prompts are encoded as without it."
        )

    def edits(self, shapes: dict[str, tuple[int, ...]]) -> tuple[Edit, ...]:
        """What it does to a T5 whose weights, by transformers' names, have these shapes.

        Raises CheckpointError for what is damaged, or was made for another encoder.
        """
        grouped = group_layers(self.tensors, LayerNames(shapes, TEXT_DOTTED, TEXT_FLATTENED), self.source)
        if grouped.unmatched:
            more = f" and {len(grouped.unmatched) - MOST_NAMED} more"
            named = ", ".join(grouped.unmatched[:MOST_NAMED]) + more * (len(grouped.unmatched) > MOST_NAMED)
            raise CheckpointError(
                f"{self.source} changes what this text encoder does not have: {named}. It was made for "
                "another one."
            )
        return tuple(
            edit for layer in grouped.layers for edit in edits_of(layer, shapes, self.scaling, self.source)
        )
