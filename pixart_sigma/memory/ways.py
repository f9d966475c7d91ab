"""The ways in which a stage can run, the fastest first: the planner picks from them, and a run that is out of
memory goes on to the next."""

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import SigmaError
from .out_of_memory import is_out_of_memory

Result = TypeVar("Result")


@dataclass(frozen=True)
class Needs:
    """Bytes that a stage needs on the device at its peak, its weights among them, and in RAM for what waits
    there."""

    peak: int
    weights: int
    ram: int = 0


@dataclass(frozen=True)
class Way:
    """One way: in words for people, as fields of `Ways`, and what predicts its needs, once a plan asks for
    them."""

    how: str
    chosen: dict[str, Any]
    predict: Callable[[], Needs] = field(repr=False, compare=False)

    @functools.cached_property
    def needs(self) -> Needs:
        """What it needs."""
        return self.predict()


def first_that_fits(
    stage: str, ways: Iterable[Way], run: Callable[[Way], Result], advice: str = ""
) -> tuple[Result, Way]:
    """What `run` gives in the first way that does not run out of memory, and that way; SigmaError after the
    last, with the advice."""
    remaining = list(ways)
    while remaining:
        way = remaining.pop(0)
        try:
            return run(way), way
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            following = f" It is released and runs again: {remaining[0].how}." if remaining else ""
            logging.getLogger(__name__).warning(f"Memory ran out in the {stage} ({way.how}).{following}")
    advice = advice or (
        "Close other programs or make a smaller picture; `pixart-sigma plan` says what each stage needs."
    )
    raise SigmaError(f"Memory ran out in the {stage}. {advice}")
