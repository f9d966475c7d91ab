"""The errors a user can cause; every message says what is wrong, the value seen, and what to do."""

from typing import Any

MOST_SHOWN = 80  # characters of a value in a message


class SigmaError(ValueError):
    """A user's mistake or an unusable file; the message is one or two plain sentences."""


class SettingError(SigmaError):
    """A setting with a value that cannot be: its name, the value, and what to give instead."""

    def __init__(self, name: str, value: Any, advice: str):
        super().__init__(name, value, advice)
        self.name, self.value, self.advice = name, value, advice

    def __str__(self) -> str:
        return self.called(self.name)

    def called(self, name: str) -> str:
        """The message where the setting has another name, as an option of a command."""
        value = str(self.value)
        shown = value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}..."
        return f"{name} is {shown}; {self.advice}."


class CheckpointError(SigmaError):
    """A file or folder that is not a usable PixArt-Σ checkpoint or component."""
