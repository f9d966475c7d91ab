"""Checks of single settings: each raises SettingError with the value seen and what to give instead."""

import math
import operator
from collections.abc import Iterable
from typing import Any

from .errors import SettingError

MAX_SEED = 2**64 - 1
MAX_COUNT = 4096  # as many as ComfyUI's latents; those of a run are all in memory
LAST_TIMESTEP = 999  # pure noise; 0 is the clean picture


def check_whole(name: str, value: Any, least: int, most: int | None, advice: str) -> int:
    """The value as a whole number within these limits. Raises SettingError."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise SettingError(name, value, advice)
    return number


def check_seed(seed: Any) -> int:
    """A whole number from 0 to 2^64 - 1. Raises SettingError."""
    return check_whole("seed", seed, 0, MAX_SEED, "give a whole number from 0 to 2^64 - 1")


def check_count(count: Any) -> int:
    """A whole number of pictures, from 1 to 4096. Raises SettingError."""
    return check_whole(
        "count", count, 1, MAX_COUNT, f"give a whole number of pictures, from 1 to {MAX_COUNT}"
    )


def is_finite(value: Any) -> bool:
    """Whether it is a number that is neither NaN nor infinite."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def check_timesteps(timesteps: Iterable[Any]) -> tuple[int, ...]:
    """Whole numbers from 999 to 0, descending. Raises SettingError."""
    values = tuple(timesteps)
    whole = all(is_finite(value) and value == int(value) and 0 <= value <= LAST_TIMESTEP for value in values)
    if not values or not whole or not _descends(values):
        raise SettingError("timesteps", list(values), "give whole numbers from 999 to 0, descending")
    return tuple(int(value) for value in values)


def check_sigmas(sigmas: Iterable[Any]) -> tuple[float, ...]:
    """At least two noise levels, descending; the last one is the end. Raises SettingError."""
    values = tuple(sigmas)
    levels = all(is_finite(value) and value >= 0 for value in values)
    if len(values) < 2 or not levels or not _descends(values):
        raise SettingError(
            "sigmas", list(values), "give at least two numbers, descending, of which the last is the end"
        )
    return tuple(float(value) for value in values)


def _descends(values: tuple) -> bool:
    return all(later < earlier for earlier, later in zip(values, values[1:], strict=False))


def check_word(settings, name: str, words: Iterable[str]) -> None:
    value = getattr(settings, name)
    if not isinstance(value, str) or value not in words:
        raise SettingError(name, repr(value), f"choose one of {', '.join(words)}")


def check_text(name: str, value: Any) -> str:
    """A text that can be encoded. Raises SettingError."""
    if not isinstance(value, str):
        raise SettingError(name, repr(value), "give one text")
    try:
        value.encode()
    except UnicodeEncodeError:  # as of an argument in another encoding than the terminal's
        raise SettingError(name, value, "it holds halves of characters, so give it in UTF-8") from None
    return value


def check_texts(settings, *names: str) -> None:
    for name in names:
        check_text(name, getattr(settings, name))


def check_switches(settings, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, bool):
            raise SettingError(name, repr(value), "give True or False")
