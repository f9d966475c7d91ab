"""Adapters' part for T5: what they do to the weights of one encoder."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .text.changes import WeightChanges
from .text.loading import find_encoder
from .text.weights import expected_shapes, read_t5
from .transformer.changes import make_changes
from .transformer.lora import Adapter


def text_changes(
    adapters: Iterable[tuple[Adapter, float]], text_encoder: Path | None
) -> tuple[WeightChanges | None, tuple[str, ...]]:
    """(what adapters, each with its strength, do to the T5 at a path, None where that is nothing; what of
    them is not used, for people).

    Weights that are saved in 8 or 4 bit can not be changed; all others can, also where they are quantised
    when they are loaded. Raises CheckpointError for what does not fit the encoder.
    """
    parts = [(adapter.text, strength) for adapter, strength in adapters if adapter.text and strength]
    if not parts:
        return None, ()
    if text_encoder is None:
        return None, tuple(part.left_out for part, _ in parts)
    path = find_encoder(text_encoder)
    config, weights, saved = read_t5(path)
    if saved:
        advice = f" {path.name} was saved in {saved}; use a T5 in bf16, which can be quantised as it loads."
        return None, tuple(part.left_out + advice for part, _ in parts)
    shapes = expected_shapes(config, path)
    steps = [(edit, strength) for part, strength in parts for edit in part.edits(shapes)]
    said = repr([(part.fingerprint, strength) for part, strength in parts])
    changes = make_changes(steps, weights.__getitem__)
    return WeightChanges(changes, hashlib.sha256(said.encode()).hexdigest()), ()
