"""The tensors of a file by where their bytes are: mapped to the file, or read where that is not wanted."""

import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .locating import find_weight_files
from .reading import open_file

LINE = 64  # bytes
_mapped = True


def map_files(wanted: bool) -> None:
    """Whether weights stay mapped to their files, as they do by default; else they are read into RAM.

    For systems where mapped files are slow, or are cut off while they are used. ComfyUI has --disable-mmap.
    """
    global _mapped
    _mapped = wanted


def files_are_mapped() -> bool:
    """What `map_files` was told."""
    return _mapped


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its shape, its dtype or how it is quantised, and where its bytes are."""

    shape: tuple[int, ...]
    dtype: Any
    start: int
    nbytes: int


def stored_bytes(path: Path, entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """The bytes (uint8) of each tensor, in memory of its own or of the mapped file.

    Raises CheckpointError for a file that ends before them.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        short = next((entry for entry in entries.values() if entry.start + entry.nbytes > size), None)
        if short is not None:
            raise _cut_off(path, size, short)
        if not _mapped:
            return {name: read_entry(file, entry, path) for name, entry in entries.items()}
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    return {name: _slice(storage, entry) for name, entry in entries.items()}


def read_tensor(path: Path, entry: Entry) -> torch.Tensor:
    """A tensor, read from its file into RAM. Raises CheckpointError where the file ends before it."""
    with open_file(path) as file:
        return read_entry(file, entry, path).view(entry.dtype).view(entry.shape)


def read_entry(file: BufferedReader, entry: Entry, path: Path) -> torch.Tensor:
    """The bytes of a tensor, read from an open file.

    They lie in memory as they would in a mapped file, to the cache line: some CPUs round a product otherwise
    where it begins elsewhere.
    """
    room = torch.empty(entry.nbytes + LINE, dtype=torch.uint8)
    begin = (entry.start - room.data_ptr()) % LINE
    found = _slice(room.untyped_storage(), Entry(entry.shape, entry.dtype, begin, entry.nbytes))
    file.seek(entry.start)
    if entry.nbytes and file.readinto(found.numpy().data) != entry.nbytes:
        raise _cut_off(path, file.seek(0, 2), entry)
    return found


def _slice(storage: Any, entry: Entry) -> torch.Tensor:
    if not entry.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.asarray(storage[entry.start : entry.start + entry.nbytes], dtype=torch.uint8)


def _cut_off(path: Path, size: int, entry: Entry) -> CheckpointError:
    return CheckpointError(
        f"{path} is cut off: {size} of {entry.start + entry.nbytes} bytes are there. Download it again."
    )


class Whole:
    """The files that weights are mapped to, held open so that it can be asked whether they still hold them.

    Reading a mapped file beyond its end kills the process. A file that another one took the place of is
    whole: what was mapped to it stays there.
    """

    def __init__(self, path: Path):
        """path: what the weights were read from, see `locating`. Where nothing is mapped there is no file."""
        self._held: list[tuple[int, int, Path]] = []
        for file in find_weight_files(path) if files_are_mapped() else ():
            opened = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, opened)
            self._held.append((opened, os.fstat(opened).st_size, file))

    def check(self, *_: Any) -> None:
        """CheckpointError for a file that was cut off; cheap enough to be asked before every use."""
        for opened, size, file in self._held:
            left = os.fstat(opened).st_size
            if left < size:
                raise CheckpointError(
                    f"{file} was cut off while its weights are in use: {left} of {size} bytes are left. "
                    "Download it again, and load the model anew."
                )

    def __deepcopy__(self, memo: dict) -> "Whole":
        return self  # for as long as any copy of the weights


class Unchanged:
    """Files as they were when they were first read, for what reads them again and again."""

    def __init__(self, files: Iterable[Path], user: str):
        self._user = user
        self._stamps = {file: _stamp(file) for file in files}

    def check(self) -> None:
        """CheckpointError for a file that is gone or is not what it was."""
        for file, stamp in self._stamps.items():
            try:
                now = _stamp(file)
            except OSError:
                raise CheckpointError(
                    f"{file} is gone, and {self._user} reads from it. Put it back, or load another one."
                ) from None
            if now != stamp:
                raise CheckpointError(f"{file} was changed, and {self._user} reads from it. Load it again.")


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
