"""Writing files whole or not at all, and to a standard output that may be closed early."""

import os
import sys
import tempfile
from pathlib import Path


def write_beside(path: Path, write) -> None:
    """Call `write(file)` on a binary file beside `path`, then rename that; if it fails nothing is left."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def say(text) -> None:
    """Print `text`; where nobody reads on, as after `| head -1`, it and all that follows is dropped."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Not only this text: what is left in the buffer would fail again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
