"""From rows to the pictures of a batch: each with settings of its own and the name of its file.

Nothing here imports torch, so that a mistake is known at once.
"""

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import SettingError, SigmaError
from ..files.picture_files import name_of
from ..setting_checks import MAX_SEED, check_count
from ..settings import Settings
from .rows import Row

IN_NAMES = (
    "row", "seed", "prompt", "file", "width", "height", "steps", "guidance_scale", "scheduler",
)  # fmt: skip
DECIDES_EMBEDDINGS = ("prompt", "negative", "clean_caption", "max_sequence_length")
LONGEST_NAME = 200  # bytes; file systems take 255
# What Windows takes in no name, path separators among it.
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
MOST_SHOWN = 20  # bad rows in one message


@dataclass(frozen=True)
class Picture:
    """A picture of a batch: its row, the settings with nothing left open, and its file's name without the
    ending."""

    row: int
    settings: Settings
    file: str

    @property
    def texts(self) -> tuple:
        """What its prompts' embeddings are made of."""
        return tuple(getattr(self.settings, name) for name in DECIDES_EMBEDDINGS)

    @cached_property
    def digest(self) -> str:
        """Of all that decides it beside the models."""
        content = json.dumps(self.settings.as_dict(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be drawn, and why."""

    row: int
    error: str


# From what a row sets to its settings; SigmaError where that cannot be.
MakeSettings = Callable[[dict[str, Any]], Settings]


def make_pictures(
    rows: Iterable[Row], make_settings: MakeSettings, seeds: tuple[int, ...] = (), name: str | None = None
) -> tuple[list[Picture], list[BadRow]]:
    """The pictures of rows, in their order, and the rows that cannot be drawn.

    seeds: each row once with each of them, in place of its own. A row's count is as many pictures of seeds
    from its own on, each a run of one. name: of the files, with fields of IN_NAMES in braces; otherwise the
    row's number, the prompt's first words, and the seed where a row has several.
    Raises SigmaError for a name that does not tell the pictures apart.
    """
    if name is not None:
        _check_name(name)
    found: list[Picture] = []
    bad: list[BadRow] = []
    names: dict[str, int] = {}
    for row in rows:
        try:
            made = _pictures_of(row, make_settings, seeds, name)
        except SigmaError as error:
            bad.append(BadRow(row.number, str(error)))
            continue
        for picture in made:
            first = names.setdefault(picture.file.lower(), row.number)
            if len(names) == len(found):
                raise SigmaError(
                    f"Rows {first} and {row.number} would both be written to {picture.file}; give --name a "
                    "field that differs, such as {row} or {seed}."
                )
            found.append(picture)
    return found, bad


def say_bad(bad: list[BadRow]) -> str:
    """The rows and what is wrong with them, as one message."""
    listed = [f"row {one.row}: {one.error}" for one in bad[:MOST_SHOWN]]
    if len(bad) > MOST_SHOWN:
        listed.append(f"and {len(bad) - MOST_SHOWN} more")
    return "; ".join(listed)


def _pictures_of(
    row: Row, make_settings: MakeSettings, seeds: tuple[int, ...], pattern: str | None
) -> list[Picture]:
    if row.error:
        raise SigmaError(row.error)
    given = dict(row.given)
    file = given.pop("file", None)
    settings = make_settings(given)
    if not settings.prompt:
        raise SigmaError("it has no prompt")
    count = check_count(settings.count)
    if seeds and ("seed" in given or count > 1):
        chosen = "seed" if "seed" in given else "count"
        advice = "--seeds chooses the seeds; leave one of them out"
        raise SettingError(chosen, getattr(settings, chosen), advice)
    if settings.seed + count - 1 > MAX_SEED:
        raise SettingError("count", count, f"from seed {settings.seed} on there are not so many seeds")
    drawn = seeds or range(settings.seed, settings.seed + count)
    if file is not None:
        file = _check_file(str(file))
    if pattern is None:
        pattern = ("{row:05}_{prompt}" if file is None else "{file}") + ("" if len(drawn) == 1 else "_{seed}")
    each = [replace(settings, seed=seed, count=1) for seed in drawn]
    return [Picture(row.number, one, _name(pattern, row.number, one, file)) for one in each]


def _name(pattern: str, row: int, settings: Settings, file: str | None) -> str:
    fields = settings.as_dict() | {"row": row, "prompt": name_of(settings.prompt), "file": file or ""}
    try:
        return _check_file(pattern.format_map({name: fields[name] for name in IN_NAMES}))
    except (ValueError, TypeError) as error:
        if isinstance(error, SigmaError):
            raise
        raise SigmaError(f"--name is {pattern!r}, which cannot be filled in: {error}.") from None


def _check_name(pattern: str) -> None:
    """That it names fields alone, and none of their insides."""
    try:
        used = [field for _, field, *_ in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        raise SigmaError(f"--name is {pattern!r}, which cannot be read: {error}.") from None
    unknown = [field for field in used if field not in IN_NAMES]
    if unknown:
        fields = ", ".join(f"{{{field}}}" for field in IN_NAMES)
        raise SigmaError(f"--name has the field {{{unknown[0]}}}; there are {fields}.")


def _check_file(name: str) -> str:
    """The name, of a file in the batch's own folder on any system. Raises SigmaError."""
    if FORBIDDEN.search(name) or name != name.strip(" .") or not name:
        raise SigmaError(
            f"the file's name would be {name!r}; it may not have any of < > : \" / \\ | ? *, nor a dot or "
            "space at its ends"
        )
    if len(name.encode()) > LONGEST_NAME:
        raise SigmaError(
            f"the file's name would be {name[:40]!r}..., which is longer than {LONGEST_NAME} bytes"
        )
    return name
