"""Writing files and folders whole or not at all, and to a standard output that may be closed early."""

import contextlib
import functools
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import printable

if os.name == "posix":
    import fcntl

# What is being written has a hidden name that ends so, which no loader offers.
UNFINISHED = ".pixart-sigma-unfinished"
DAY = 86400  # seconds


@contextmanager
def beside(path: Path, new: bool = False) -> Iterator[Path]:
    """A file to write to, in place and by its name, which takes the place of `path` at the end of this block;
    if that fails nothing is left of it.

    new: FileExistsError, at the end, where `path` is there already. Its mode is what the umask gives. Where
    `path` is a link, the file that it points to is replaced. A device, a pipe or this process' own output is
    not replaced: it gets what was written, at the end. What killed processes left in the folder is cleared.
    """
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / path.name
            yield made
            with open(made, "rb") as file, open(_open_special(path), "wb") as special:
                shutil.copyfileobj(file, special)
        return
    path = Path(os.path.realpath(path))
    with _unfinished(path.parent, _make_file) as made:
        yield made
        if new:
            _name(made, path)
        else:
            os.replace(made, path)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end of this block: a new name, or an empty folder.
    If that fails nothing is left of it. What is in it gets the mode that the umask gives."""
    path = Path(os.path.realpath(path))
    with _unfinished(path.parent, _make_folder) as made:
        yield made
        mode = made.stat().st_mode & 0o666  # as the umask has it; some libraries write for one user alone
        for file in made.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        if path.exists():
            path.rmdir()  # empty; Windows does not rename onto a folder
        os.replace(made, path)


def write_beside(path: Path, write, new: bool = False) -> None:
    """Call `write(file)` on a binary file beside `path`, then rename that; if it fails nothing is left."""
    with beside(path, new) as made, open(made, "wb") as file:
        write(file)


def is_special(path: Path) -> bool:
    """Whether it is there and neither a regular file nor a folder, or is this process' own output."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return True
    return _output_of(found) is not None


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes were writing in this folder; what a running one writes stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(UNFINISHED):
                with contextlib.suppress(OSError):
                    _clear(entry)


def _clear(entry: os.DirEntry) -> None:
    if os.name != "posix":
        if time.time() - entry.stat().st_mtime > DAY:
            _remove(Path(entry.path))
        return
    # Nor may a link lead to a file of somebody else's, or a pipe make us wait.
    handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever writes it holds this until it ends
        _remove(Path(entry.path))
    finally:
        os.close(handle)


@contextmanager
def _unfinished(folder: Path, make) -> Iterator[Path]:
    """What `make(path)` makes under a hidden name, for this block. Locked until it is renamed or this process
    ends, however it ends, so that nobody takes it for something that was left behind."""
    clear_once(folder)
    while True:
        made = folder / f".{secrets.token_hex(8)}{UNFINISHED}"
        handle = make(made)
        if handle is not None:
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is cleared either
                fcntl.flock(handle, fcntl.LOCK_EX)
        if made.exists():  # nobody was faster with the lock, and cleared it
            break
        os.close(handle)
    try:
        yield made
    except BaseException:
        _remove(made)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _name(made: Path, path: Path) -> None:
    """Give what was made this name, if nothing has it. Raises FileExistsError."""
    try:
        os.link(made, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(made, path)
    else:
        made.unlink()


def _make_file(path: Path) -> int | None:
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    if os.name == "posix":
        return handle
    os.close(handle)
    return None


def _make_folder(path: Path) -> int | None:
    path.mkdir()
    return os.open(path, os.O_RDONLY) if os.name == "posix" else None


# Once in a process: a folder of many pictures takes long to look through.
clear_once = functools.cache(clear_unfinished)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _open_special(path: Path) -> int:
    """Neither made, should it be gone by now, nor cut. Standard output goes on where it is."""
    output = _output_of(os.stat(path))
    return os.open(path, os.O_WRONLY) if output is None else os.dup(output)


def _output_of(found: os.stat_result) -> int | None:
    """Which of standard output and standard error this is."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # one that is closed
            if os.path.samestat(found, os.fstat(number)):
                return number
    return None


def say(text) -> None:
    """Print `text`; where nobody reads on, as after `| head -1`, it and all that follows is dropped.

    On a terminal, characters that would command it are spelled out.
    """
    try:
        print(printable(str(text)) if sys.stdout.isatty() else text, flush=True)
    except BrokenPipeError:
        # Not only this text: what is left in the buffer would fail again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
