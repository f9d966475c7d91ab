"""A part of the noise schedule: from 0, pure noise (timestep 999), to 1, the clean picture (timestep 0)."""

import re
from dataclasses import dataclass

from .errors import SigmaError
from .setting_checks import LAST_TIMESTEP


@dataclass(frozen=True)
class SchedulePart:
    """From `start` up to `end`, which is left out unless it is 1. Bounds out of order raise SigmaError."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 0 <= self.start < self.end <= 1:
            raise SigmaError(
                f"A part of the schedule must start before it ends, within 0 and 1, not {self.start} to "
                f"{self.end}."
            )
        for name in ("start", "end"):  # so that what is spelled is read again as it was
            object.__setattr__(self, name, round(getattr(self, name), 6))

    def __str__(self) -> str:
        """The spelling that `parse` reads."""
        return f"{self.start * 100:g}-{self.end * 100:g}%"

    @classmethod
    def parse(cls, text: str) -> "SchedulePart":
        """Read START-END%. Raises SigmaError for anything else."""
        match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)-(\d{1,3}(?:\.\d+)?)%", text.strip())
        if match is None or not float(match[1]) < float(match[2]) <= 100:
            raise SigmaError(
                f"The part {text!r} of the schedule is not understood. Write one such as 20-80%."
            )
        return cls(float(match[1]) / 100, float(match[2]) / 100)

    @property
    def whole(self) -> bool:
        return (self.start, self.end) == (0, 1)

    def holds(self, timestep: float) -> bool:
        """Whether `timestep` (0 to 999) lies in it."""
        if self.whole:
            return True
        progress = 1 - min(timestep, LAST_TIMESTEP) / LAST_TIMESTEP
        return self.start <= progress < self.end or (self.end == 1 and progress >= 1)
