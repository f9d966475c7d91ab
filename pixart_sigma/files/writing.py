"""Writing files whole or not at all, and to a standard output that may be closed early."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end of this block; if that fails nothing
    is left of it."""
    handle, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(made)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(made, 0o666 & ~mask)
        os.replace(made, path)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise


def write_beside(path: Path, write) -> None:
    """Call `write(file)` on a binary file beside `path`, then rename that; if it fails nothing is left."""
    with beside(path) as made, open(made, "wb") as file:
        write(file)


def say(text) -> None:
    """Print `text`; where nobody reads on, as after `| head -1`, it and all that follows is dropped."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Not only this text: what is left in the buffer would fail again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
