"""Many prompts: from a text or a file of the input folder, one after the other with the host's progress."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import comfy.utils
import folder_paths

from ...pixart_sigma.batch.rows import Row, read_rows
from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.setting_checks import check_seed

Item = TypeVar("Item")
Made = TypeVar("Made")

NO_FILE = "none"
ENDINGS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
READ = {"prompt", "negative", "seed"}  # of what a row can set


@dataclass(frozen=True)
class ListedPrompt:
    """A prompt of a list, with its negative prompt and its seed."""

    prompt: str
    negative: str
    seed: int


def choices() -> list[str]:
    """The files of prompts in the input folder, and no file."""
    return [NO_FILE, *_offered()]


def find(choice: str) -> Path:
    """The file of a choice, which comes out of a workflow and is never joined to a path. ValueError for one
    that is not offered."""
    offered = _offered()
    if choice not in offered:
        raise ValueError(
            f"There is no file {choice!r} in the input folder. Put it there, press R, and choose it again."
        )
    return offered[choice]


def read(text: str, choice: str, negative: str, seed: int) -> list[ListedPrompt]:
    """The prompts of a choice, or of the lines of a text where that is no file. What a row does not say is
    the negative prompt given, and a seed that counts on from the one given.

    Raises SigmaError that names each row that cannot be used.
    """
    if choice == NO_FILE:
        rows = [
            Row(number, {"prompt": line.strip()})
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    else:
        rows = list(read_rows(str(find(choice))))
    if not rows:
        raise SigmaError("There is no prompt; write one in each line.")
    if wrong := [f"row {row.number}: {said}" for row in rows if (said := _wrong(row))]:
        raise SigmaError("; ".join(wrong[:20]))
    return [
        ListedPrompt(
            row.given["prompt"], row.given.get("negative", negative), row.given.get("seed", seed + number)
        )
        for number, row in enumerate(rows)
    ]


def with_progress(items: list[Item], make: Callable[[Item], Made]) -> Iterator[Made]:
    """make(item) of each; between two of them the host can interrupt."""
    bar = comfy.utils.ProgressBar(len(items))
    for number, item in enumerate(items, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield make(item)
        bar.update_absolute(number)


def _offered() -> dict[str, Path]:
    return {name: path for name, path in _files(Path(folder_paths.get_input_directory()))}


def _files(folder: Path) -> Iterable[tuple[str, Path]]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        path = folder / name
        if path.suffix.lower() in ENDINGS and path.is_file():
            yield name, path


def _wrong(row: Row) -> str:
    """What is wrong with a row, or ""."""
    if row.error:
        return row.error
    unread = sorted(row.given.keys() - READ)
    if unread:
        return f"it sets {unread[0]}, which the nodes behind decide; only prompt, negative and seed are read"
    if not str(row.given.get("prompt", "")).strip():
        return "it has no prompt"
    try:
        check_seed(row.given.get("seed", 0))
    except SigmaError as error:
        return str(error)
    return ""
