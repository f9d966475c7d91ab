"""A digest of all that a large file holds, made once.

A T5 of 10 GB is read in some seconds from a fast disk, and has to be read to be loaded anyway, which then
finds it in the system's memory. The digest is kept with the user's caches by the file's place, size, time and
number, as build tools keep theirs: who changes a file and sets its time back is believed.
"""

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..errors import CheckpointError
from .reading import open_file
from .writing import write_beside

CHUNK = 16 * 2**20  # bytes that one thread reads at a time
THREADS = 4
DIGEST = re.compile(r"[0-9a-f]{64}")
LARGE = 10**9  # bytes from which a reading is logged
# A file that is changed again so soon may keep its time on a disk that counts whole seconds.
SETTLED = 2.0

_made: dict[str, str] = {}  # for this process too, where nothing can be written

Progress = Callable[[int, int], None]


def user_cache() -> Path:
    """The folder of what this pack keeps for a user: in $XDG_CACHE_HOME or ~/.cache, on Windows in
    %LOCALAPPDATA%."""
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    root = Path(os.environ.get(variable, ""))
    # A relative one counts as not set, says the XDG Base Directory Specification.
    return (root if root.is_absolute() else Path.home() / default) / "pixart_sigma"


def file_digest(path: Path, progress: Progress | None = None) -> str:
    """A SHA-256 of the SHA-256s of a file's chunks, in hexadecimal digits.

    progress: called as progress(bytes read, bytes to read), where the file has to be read; what it raises
    stops the reading. Raises CheckpointError for a file that cannot be read or is changed meanwhile.
    """
    with open_file(path) as file:
        status = os.fstat(file.fileno())
    known = [os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino]
    name = hashlib.sha256("\n".join(map(str, known)).encode("utf-8", "surrogateescape")).hexdigest()
    kept = user_cache() / "digests" / name
    found = _made.get(name) or _kept(kept)
    if not found:
        found = _read(path, status.st_size, progress)
        after = os.stat(path)
        if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise CheckpointError(f"{path} was changed while it was read. Wait until it is whole.")
        if time.time() - status.st_mtime > SETTLED:
            _made[name] = found
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_beside(kept, lambda file: file.write(found.encode()))
    return found


def _kept(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="ascii")
        if DIGEST.fullmatch(text):
            return text
    return ""


def _read(path: Path, size: int, progress: Progress | None) -> str:
    if size >= LARGE:
        logging.getLogger(__name__).info(f"{path} ({size / 1e9:.1f} GB) is read once, to be known again.")
    whole = hashlib.sha256()
    for done, chunk in enumerate(_chunks(path, size), start=1):
        whole.update(chunk)
        if progress is not None:
            progress(min(done * CHUNK, size), size)
    return whole.hexdigest()


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    """The digests of the chunks, in order; hashing and reading leave Python's lock to the other threads."""
    threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        yield from threads.map(partial(_chunk, path), range(0, size, CHUNK))
    finally:
        threads.shutdown(cancel_futures=True)


def _chunk(path: Path, start: int) -> bytes:
    with open_file(path) as file:
        file.seek(start)
        return hashlib.sha256(file.read(CHUNK)).digest()
