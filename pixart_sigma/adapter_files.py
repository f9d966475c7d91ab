"""Which adapters (LoRA and its kin) a user chooses, and how strongly."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import SettingError


@dataclass(frozen=True)
class AdapterFile:
    """An adapter by its file or folder. strength: 1 is as it was trained, 0 is exactly off, below it acts the
    other way round. Raises SettingError for one that is no number."""

    path: str | Path
    strength: float = 1.0

    def __post_init__(self):
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float):
            raise SettingError("adapter strength", self.strength, "give a number, such as 0.8")
        if not math.isfinite(self.strength):
            raise SettingError("adapter strength", self.strength, "give a finite number, such as 0.8")


def parse_adapter(text: str) -> AdapterFile:
    """FILE or FILE:STRENGTH. What stands behind the last colon is a strength only where it is a number and no
    file has the whole name: a path of Windows has a colon too."""
    path, colon, strength = text.rpartition(":")
    if colon and path and not os.path.lexists(text):
        try:
            return AdapterFile(path, float(strength))
        except ValueError as error:
            if isinstance(error, SettingError):
                raise SettingError("--lora", text, error.advice) from None
    return AdapterFile(text)
