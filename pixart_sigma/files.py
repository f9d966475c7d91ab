"""Writing files whole or not at all."""

import os
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
