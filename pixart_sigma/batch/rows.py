"""The rows of a batch: a text file with a prompt in each line, CSV, JSON lines or Parquet.

Nothing here imports torch, so that a mistake is known at once.
"""

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from ..errors import SigmaError
from ..files.reading import parse_json
from ..setting_checks import MAX_SEED
from ..settings import Settings
from .storage import is_remote

WHOLE = {"width", "height", "count", "seed", "steps", "max_sequence_length"}
NUMBERS = {"guidance_scale", "eta", "strength", "nag_scale", "refiner_start"}
SWITCHES = {"binning", "clean_caption"}
# What an option of the terminal calls what Settings calls otherwise.
OTHER_NAMES = {"guidance": "guidance_scale", "nag": "nag_scale"}
COLUMNS = {field.name for field in fields(Settings)} | {"size", "aspect", "file"}
TRUE, FALSE = {"true", "yes", "1"}, {"false", "no", "0"}
MOST_LINE = 2**20  # characters
MOST_SEEDS = 10**6
PARQUET = ".parquet"
TEXT = {"encoding": "utf-8-sig", "newline": ""}


@dataclass(frozen=True)
class Row:
    """A row as it was read: its number, from 1, which in a text file is the line's; what it sets, by columns;
    or what is wrong with it."""

    number: int
    given: dict[str, Any]
    error: str = ""


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a file, by its ending: .csv, .tsv, .jsonl, .parquet; any other is text with a prompt in
    each line. It is a path, or a URI that fsspec opens; "-" is standard input, which may be text or JSON
    lines.

    Empty lines and empty cells say nothing. Raises SigmaError for a file that can not be read as what it is,
    and for columns that no row can set.
    """
    ending = Path(source).suffix.lower()
    if ending == PARQUET:
        yield from _read_parquet(source)
        return
    name = "standard input" if source == "-" else source
    opened = nullcontext(sys.stdin) if source == "-" else _open(source, "rt", **TEXT)
    with opened as file:
        try:
            if ending in (".csv", ".tsv"):
                yield from _read_table(name, file, "\t" if ending == ".tsv" else ",")
            else:
                yield from _read_lines(name, file, None if source == "-" else ending == ".jsonl")
        except UnicodeDecodeError as error:
            raise SigmaError(f"{name} is not text in UTF-8 (byte {error.start}); save it as UTF-8.") from None


def _open(source: str, mode: str, **text: Any) -> Any:
    """A path or a URI, to be read."""
    if not is_remote(source):
        return open(source, mode, **text)
    import fsspec

    try:
        return fsspec.open(source, mode, **text)
    except (ImportError, ValueError) as error:
        raise SigmaError(f"{source} can not be opened here: {error}") from error


def parse_seeds(text: str) -> tuple[int, ...]:
    """(0, 1, 2, 7) from "0-2,7". Raises SigmaError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})\s*(?:-\s*(\d{1,20})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > MAX_SEED or len(found) + last - first >= MOST_SEEDS:
            raise SigmaError(f"--seeds is {text!r}; give whole numbers and ranges such as 0-9 or 1,5,20-29.")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise SigmaError(f"--seeds {text} names a seed twice; each would be the same picture again.")
    return tuple(found)


def _read_lines(name: str, file: TextIO, as_json: bool | None) -> Iterator[Row]:
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise SigmaError(f"Line {number} of {name} is longer than {MOST_LINE} characters; shorten it.")
        text = line.strip()
        if not text:
            continue
        if as_json is None:  # the first line decides
            as_json = text.startswith("{")
        yield _of_json(number, text) if as_json else Row(number, {"prompt": text})


def _of_json(number: int, text: str) -> Row:
    try:
        content = parse_json(text)
    except ValueError as error:
        return Row(number, {}, f"this is not JSON: {error}")
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict):
        return Row(
            number, {}, f'this is a {type(content).__name__}; give an object such as {{"prompt": ...}}'
        )
    return _row(number, content)


def _read_table(name: str, file: TextIO, delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(file, delimiter=delimiter)
    try:
        _check_columns(name, reader.fieldnames or ())
        for number, cells in enumerate(reader, 1):
            if None in cells or None in cells.values():
                yield Row(number, {}, "it has more or fewer cells than there are columns")
            elif any(map(str.strip, cells.values())):
                yield _row(number, cells)
    except csv.Error as error:
        raise SigmaError(f"{name} is not a table that can be read: {error}.") from None


def _read_parquet(source: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SigmaError(f"{source} is Parquet, which pyarrow reads: pip install pyarrow.") from None
    try:
        with _open(source, "rb") as opened, ParquetFile(opened) as file:
            _check_columns(source, file.schema_arrow.names)
            number = 0
            for part in file.iter_batches(batch_size=1024):
                for cells in part.to_pylist():
                    number += 1
                    yield _row(number, cells)
    except (ArrowException, ArrowInvalid) as error:
        raise SigmaError(f"{source} can not be read as Parquet: {error}") from None


def _check_columns(name: str, columns: Iterable[str]) -> None:
    unknown = [column for column in columns if _field(column) not in COLUMNS]
    if unknown:
        known = ", ".join(sorted(COLUMNS))
        raise SigmaError(f"{name} has the column {unknown[0]!r}; there are {known}. Remove or rename it.")


def _row(number: int, cells: dict[str, Any]) -> Row:
    """The row of cells, of which text is read as what it is for."""
    given: dict[str, Any] = {}
    for column, cell in cells.items():
        name = _field(column)
        if cell is None or isinstance(cell, str) and not cell.strip():
            continue
        if name not in COLUMNS:
            return Row(number, {}, f"there is no setting {column!r}; there are {', '.join(sorted(COLUMNS))}")
        try:
            given[name] = _value(name, cell)
        except ValueError:
            return Row(number, {}, f"{column} is {str(cell)[:80]!r}, which is no {_kind(name)}")
    return Row(number, given)


def _field(column: str | None) -> str:
    name = (column or "").strip().lower().replace("-", "_")
    return OTHER_NAMES.get(name, name)


def _value(name: str, cell: Any) -> Any:
    """ValueError for text that is not of its kind; what is no text is for Settings to check."""
    if name in ("timesteps", "sigmas") and isinstance(cell, list):
        return tuple(cell)
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if name in WHOLE:
        return int(text)
    if name in NUMBERS:
        return float(text)
    if name == "sigmas":
        return tuple(map(float, text.split(",")))
    if name in SWITCHES:
        if text.lower() not in TRUE | FALSE:
            raise ValueError(text)
        return text.lower() in TRUE
    return text


def _kind(name: str) -> str:
    if name in SWITCHES:
        return "true or false"
    return "whole number" if name in WHOLE else "number"
