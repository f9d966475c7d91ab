"""Figures as they come, one line of JSON each, so that a part that is stopped leaves those it has made; and
all of them as JSON and as tables."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A figure: of which part, of what, how much, in GB (10^9 bytes), seconds or another unit.

    predicted: what `plan` says. reference: what somebody else's code needs. failed: why there is no figure.
    """

    part: str
    what: str
    value: float | None
    unit: str = "GB"
    predicted: float | None = None
    reference: float | None = None
    note: str = ""
    failed: str = ""

    @property
    def ratio(self) -> float | None:
        """To the prediction, or else to the reference."""
        other = self.predicted if self.predicted is not None else self.reference
        return self.value / other if self.value is not None and other else None


class Report:
    """The rows of one part, appended to a file."""

    def __init__(self, part: str, file: Path):
        self.part, self.file = part, file

    def add(self, what: str, value: float | None, unit: str = "GB", **more) -> None:
        row = Row(self.part, what, value, unit, **more)
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(line_of(row), flush=True)

    def size(self, what: str, nbytes: float, predicted: float | None = None, **more) -> None:
        self.add(what, nbytes / 1e9, predicted=None if predicted is None else predicted / 1e9, **more)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails in here is a row that says so, and what follows goes on."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            self.add(what, None, failed=f"{said[:300]} ({Path(where.filename).name}:{where.lineno})")
            traceback.clear_frames(error.__traceback__)


def read_rows(file: Path) -> list[Row]:
    if not file.exists():
        return []
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()]


def line_of(row: Row) -> str:
    """A row of a table: what, figure, predicted, reference, ratio."""
    if row.failed:
        return f"| {row.what} | **failed**: {row.failed} | | | |"
    shown = (_number(row.value, row.unit), _number(row.predicted, row.unit), _number(row.reference, row.unit))
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    return f"| {row.what} | {' | '.join(shown)} | {ratio} |" + (f" {row.note}" if row.note else "")


def tables(rows: list[Row], told: dict[str, str]) -> str:
    """All rows as Markdown, a table for each part, the memory table of the README first."""
    lines = [
        f"Measured on {told['device']}, {', '.join(f'{k} {v}' for k, v in told.items() if k != 'device')}."
    ]
    memory = readme_rows(rows)
    if memory:
        lines += ["", "| picture | limit | T5-XXL | transformer | VAE decode | peak of the run | seconds |"]
        lines += ["|---" * 7 + "|", *memory]
    for part in dict.fromkeys(row.part for row in rows):
        lines += [
            "",
            f"## {part}",
            "",
            "| what | measured | predicted | reference | ratio |",
            "|---|---|---|---|---|",
        ]
        lines += [line_of(row) for row in rows if row.part == part]
    return "\n".join(lines) + "\n"


def readme_rows(rows: list[Row]) -> list[str]:
    """Rows of the README's memory table, from those of runs within a limit."""
    made = []
    for whole in (row for row in rows if row.part == "limits" and row.unit == "GB" and ": run" in row.what):
        name = whole.what.removesuffix(": run")
        own = {row.what.removeprefix(name + ": "): row for row in rows if row.what.startswith(name + ": ")}
        cells = []
        for stage in ("text encoder", "transformer", "VAE decode"):
            found = own.get(stage)
            cells.append(
                f"{found.note}: {found.value:.2f} GB" if found and found.value is not None else "failed"
            )
        seconds = own.get("seconds")
        size, _, limit = name.partition(" within ")
        cells += [f"{whole.value:.2f} GB" if whole.value is not None else f"failed: {whole.failed}"]
        cells += [f"{seconds.value:.1f} s" if seconds and seconds.value is not None else ""]
        made.append(f"| {size} | {limit} | {' | '.join(cells)} |")
    return made


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 4 if unit == "s" and value < 1 else 3 if value < 10 else 1
    return f"{value:.{digits}f} {unit}"
