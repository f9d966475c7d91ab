"""What became of each picture of a batch: a line of JSON each, as they are finished."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import SigmaError
from ..files.reading import parse_json

NO_SEED = -1


@dataclass(frozen=True)
class Entry:
    """A line, as much of it as says what is left to do: the picture's row and seed (none for a row that could
    not be read), the digest of its settings, its file with its bytes, or its error."""

    row: int
    seed: int = NO_SEED
    digest: str = ""
    file: str = ""
    size: int = 0
    error: str = ""


DEFAULTS = {entry.name: entry.default for entry in fields(Entry)} | {"row": None}


class Manifest:
    """The file `manifest.jsonl`. A line that a killed process left unfinished is dropped."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[tuple[int, int], Entry]:
        """The last entry of each picture, by row and seed. Raises SigmaError for another kind of file."""
        found: dict[tuple[int, int], Entry] = {}
        self._drop_unfinished()
        if not self.path.exists():
            return found
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    content = parse_json(line)
                    entry = Entry(**{name: content.get(name, default) for name, default in DEFAULTS.items()})
                    found[int(content["row"]), int(entry.seed)] = entry
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise SigmaError(
                        f"Line {number} of {self.path} is not of a batch; choose another folder with --out."
                    ) from None
        return found

    def add(self, **content: Any) -> None:
        """A line at the end, in one write."""
        line = json.dumps(content, ensure_ascii=False) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())

    def _drop_unfinished(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            keep = end
            while keep:  # back to the end of the last whole line
                step = min(keep, 2**16)
                file.seek(keep - step)
                newline = file.read(step).rfind(b"\n")
                keep -= step
                if newline >= 0:
                    keep += newline + 1
                    break
            if keep < end:
                file.truncate(keep)
