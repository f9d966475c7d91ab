"""What a run need not compute at each step, because it can be forecast from the steps before: in words.

- `forecast:ORDER:SKIPPED`: after each step that is computed so many are forecast.
- `guidance:ORDER:SKIPPED`: of the steps that are computed, after each one with the negative prompt so many
  are without it; the difference that it makes is forecast.
- `unguided`: without the negative prompt and without what it does.

A forecast continues a polynomial through the last ORDER + 1 computed values: 0 repeats the last, 1 goes on
along a line. Each can be bound to a part of the noise schedule, such as `forecast:1:2:20-90%`; of several of
one kind the first that acts counts. `sampling/forecast.py` does what is said here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .errors import SigmaError
from .schedule_part import SchedulePart

KINDS = ("forecast", "guidance", "unguided")
ORDERS = (0, 1, 2)
MOST_SKIPPED = 20
FEW_STEPS = 4  # of so many none is near enough to its neighbours
SPELLING = (
    "off, auto, a file of calibrate, or parts joined by +: forecast:ORDER:SKIPPED, guidance:ORDER:SKIPPED or "
    "unguided, each with :START-END% if it is for a part of the run, such as forecast:1:1:10-95%"
)


@dataclass(frozen=True)
class Saving:
    """One saving: of KINDS, the order of the forecast, and how many steps in a row are forecast.

    Raises SigmaError for another kind or order, and for less than one step.
    """

    kind: str
    order: int = 0
    skipped: int = 1
    part: SchedulePart = SchedulePart()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise SigmaError(f"Speed knows no {self.kind!r}. Write {SPELLING}.")
        if self.order not in ORDERS:
            raise SigmaError(f"The order of a forecast is 0, 1 or 2, not {self.order!r}.")
        if not 1 <= self.skipped <= MOST_SKIPPED:
            raise SigmaError(f"A forecast is for 1 to {MOST_SKIPPED} steps in a row, not {self.skipped!r}.")

    def __str__(self) -> str:
        words = self.kind if self.kind == "unguided" else f"{self.kind}:{self.order}:{self.skipped}"
        return words if self.part.whole else f"{words}:{self.part}"


Savings = tuple[Saving, ...]
# For a checkpoint that was not measured: of 20 steps of the reference schedule 11 are computed.
CAUTIOUS: Savings = (Saving("forecast", 1, 1, SchedulePart(0.1, 0.95)),)


def parse(text: str) -> Savings:
    """Read what `spell` writes; "off" is nothing. Raises SigmaError, with the value seen, for anything else,
    `auto` and files included: what those come to depends on the checkpoint."""
    text = text.strip().lower()
    return () if text == "off" else tuple(_parse_saving(part.strip()) for part in text.split("+"))


def spell(savings: Iterable[Saving]) -> str:
    """The spelling that `parse` reads."""
    return "+".join(map(str, savings)) or "off"


def acting(savings: Savings, kind: str, timestep: float) -> Saving | None:
    """The saving of this kind that acts at `timestep` (0 to 999), or None."""
    return next((one for one in savings if one.kind == kind and one.part.holds(timestep)), None)


def for_steps(savings: Savings, measured: int, steps: int) -> Savings:
    """What was measured with so many steps, for a run of others: forecasts reach as far in the schedule as
    they did, and what comes to less than one step is computed, as all is in a run of FEW_STEPS.

    Where the last step was computed it still is.
    """
    if steps == measured:
        return savings
    scaled = []
    last = math.floor(1000 * (1 - 1 / steps)) / 1000  # where the last step begins, as it can be spelled
    for one in savings if steps > FEW_STEPS else ():
        skipped = (
            one.skipped if one.kind == "unguided" else min(one.skipped * steps // measured, MOST_SKIPPED)
        )
        end = one.part.end if one.part.end == 1 else min(one.part.end, last)
        if skipped and one.part.start < end:
            scaled.append(replace(one, skipped=skipped, part=SchedulePart(one.part.start, end)))
    return tuple(scaled)


def _parse_saving(text: str) -> Saving:
    kind, *rest = (word.strip() for word in text.split(":"))
    numbers = 0 if kind == "unguided" else 2
    if kind not in KINDS or not numbers <= len(rest) <= numbers + 1:
        raise SigmaError(f"Speed {text!r} is not understood. Write {SPELLING}.")
    if not all(word.isascii() and word.isdigit() and len(word) < 4 for word in rest[:numbers]):
        raise SigmaError(f"Speed {text!r} needs whole numbers for ORDER and SKIPPED. Write {SPELLING}.")
    part = SchedulePart.parse(rest[numbers]) if len(rest) > numbers else SchedulePart()
    if not numbers:
        return Saving(kind, part=part)
    return Saving(kind, int(rest[0]), int(rest[1]), part)
