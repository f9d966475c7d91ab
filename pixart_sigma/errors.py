"""The errors a user can cause; every message says what is wrong, the value seen, and what to do."""

import re
from typing import Any

MOST_SHOWN = 80  # characters of a value in a message
# Of a message, and of what has no space in it: names and keys come out of files, and may be of any length.
MOST_MESSAGE, MOST_WORD = 2000, 300
KEPT = "\n\t\u00a0\u3000"  # spaces that Python calls unprintable


def printable(text: str) -> str:
    """The text with what would command a terminal spelled out: control characters, those that turn the
    direction of writing, halves of characters."""
    return "".join(
        character
        if character.isprintable() or character in KEPT
        else character.encode("unicode_escape").decode()
        for character in text
    )


def shortened(text: str, most: int) -> str:
    """The text, of a longer one the beginning and the end."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]}[...]{text[-end:]}"


def tidy(message: str) -> str:
    """A message as it can be shown, whatever it quotes."""
    words = re.sub(rf"\S{{{MOST_WORD},}}", lambda word: shortened(word[0], MOST_WORD), message)
    return printable(shortened(words, MOST_MESSAGE))


class SigmaError(ValueError):
    """A user's mistake or an unusable file; the message is one or two plain sentences."""

    def __str__(self) -> str:
        return tidy(super().__str__())


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
        return tidy(f"{name} is {shown}; {self.advice}.")


class CheckpointError(SigmaError):
    """A file or folder that is not a usable PixArt-Σ checkpoint or component."""


# What a file that cannot be used raises.
UNUSABLE = (SigmaError, OSError)
