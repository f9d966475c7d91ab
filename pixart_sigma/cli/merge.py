"""`pixart-sigma merge`: a transformer with adapters, or another transformer, merged into it."""

import math
from pathlib import Path

from .. import BUILT_IN
from ..choices import DTYPES
from ..errors import SigmaError
from ..files.writing import say
from .checks import check_new, tell, tell_guess


def merge(arguments) -> int:
    out, adapters = Path(arguments.out), arguments.adapters or []
    other, share = parse_share_of(arguments.other) if arguments.other else (None, 0.0)
    check_new(out, ".safetensors", "a merged transformer")
    if not arguments.other and not any(adapter.strength for adapter in adapters):
        raise SigmaError(
            "There is nothing to merge: give an adapter with --lora FILE[:STRENGTH], of a strength other "
            "than 0, or another transformer with --with FILE:SHARE."
        )

    import torch

    from ..transformer.checkpoint import inspect
    from ..transformer.lora import read_adapter
    from ..transformer.merging import Merge, write_merged

    base = inspect(BUILT_IN.get(arguments.transformer, arguments.transformer), arguments.variant)
    tell_guess(base)
    second = inspect(BUILT_IN.get(other, other), arguments.variant) if other else None
    read = [(read_adapter(one.path, base.config), one.strength) for one in adapters if one.strength]
    for adapter, _ in read:
        if not adapter.edits:
            raise SigmaError(f"{adapter.source} changes T5 alone: it has nothing to merge here.")
        for notice in adapter.notices:
            tell(notice)
        if adapter.text:
            tell(adapter.text.left_out)
    for checkpoint in filter(None, (base, second)):
        if checkpoint.quantised:
            tell(f"{checkpoint.path.name} is quantised ({checkpoint.storage}): it is dequantised first.")
    made = Merge(base, tuple(read), second, share)
    named = DTYPES[arguments.dtype]
    written = write_merged(out, made, arguments.keys, getattr(torch, named) if named else None)
    say(f"{made.describe()}\nwritten         {written}\n{out}")
    return 0


def parse_share_of(text: str) -> tuple[str, float]:
    """("other.safetensors", 0.3) from "other.safetensors:0.3"."""
    file, _, number = text.rpartition(":")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not file or not math.isfinite(share) or not share:
        raise SigmaError(
            f"--with is {text!r}; give FILE:SHARE, such as other.safetensors:0.3 for 0.3 of it and 0.7 of "
            "the first."
        )
    return file, share
