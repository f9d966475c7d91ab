"""Where pictures are written: to the file that --out names, or under new names in a folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from ..errors import SigmaError
from ..files.picture_files import check_ending, name_of, picture_bytes, write_picture
from ..files.writing import say
from .checks import check_folder, check_writable, tell

DEFAULT = "picture"  # the name of a picture that nobody named
STANDARD_OUTPUT = "-"


def check_out(out: str) -> None:
    """SigmaError unless pictures can be written there, to a file of a kind that is known or to a folder."""
    if out == STANDARD_OUTPUT:
        return
    if not _is_folder(out):
        check_picture_file(out)
        return
    folder = Path(out)
    while not folder.exists():
        folder = folder.parent
    check_folder(folder)


def check_folder_out(out: str) -> None:
    """SigmaError unless this is a folder to write into, or can be made one."""
    if Path(out).exists() and not Path(out).is_dir():
        raise SigmaError(f"{out} is a file; give a folder for the pictures.")
    check_out(f"{out}/")


def check_picture_file(out: str) -> None:
    """SigmaError unless a picture can be written to this file."""
    check_writable(Path(out))
    check_ending(Path(out))


def write_pictures(result, out: str | None) -> None:
    """Write the pictures of a `Result`, each with how it was made, and print their names.

    Several that are for one file get numbers. In a folder, which is made if need be, they are named after the
    prompt, with the next number that is free: nothing there is overwritten. So is it without `out`, here,
    after DEFAULT; "-" is standard output, as PNG. One that cannot be written keeps no other from it; the
    first error is raised at the end.
    """
    failed: OSError | None = None
    for number, picture in enumerate(result.images, 1):
        index = number if len(result.images) > 1 else 0
        said = replace(result.metadata, index=index).as_json()
        try:
            path, all_said = _write(picture, said, out, index, name_of(result.metadata.settings.prompt))
        except OSError as error:
            failed = failed or error
            continue
        if not all_said:
            tell(f"{path} does not say how it was made, which is too long for a JPEG; a PNG can hold it.")
        if path:
            say(path)
    if failed:
        raise failed


def _write(picture, said: str, out: str | None, index: int, name: str) -> tuple[Path | None, bool]:
    """Where a picture went, and what `write_picture` returns."""
    if out == STANDARD_OUTPUT:
        sys.stdout.buffer.write(picture_bytes(picture, ".png", said))
        sys.stdout.buffer.flush()
        return None, True
    if out is None:
        names = (f"{DEFAULT}.png" if number == 1 else f"{DEFAULT}_{number}.png" for number in count(1))
        return _write_new(Path(), names, picture, said)
    if _is_folder(out):
        return _write_new(Path(out), (f"{name}_{number:04}.png" for number in count(1)), picture, said)
    path = Path(out)
    if index:
        path = path.with_name(f"{path.stem}_{index}{path.suffix}")
    return path, write_picture(path, picture, said)


def _is_folder(out: str) -> bool:
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


def _write_new(folder: Path, names: Iterator[str], picture, said: str) -> tuple[Path, bool]:
    """Write a picture under the first name that is free; its path, and what `write_picture` returns."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            with suppress(FileExistsError):  # another process has taken it meanwhile
                return path, write_picture(path, picture, said, new=True)
    raise AssertionError("the names do not end")
