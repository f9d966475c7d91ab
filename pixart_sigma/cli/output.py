"""Where pictures are written: to the file that --out names, or under new names in a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ..errors import SigmaError
from ..files.picture_files import check_ending, name_of, write_picture
from ..files.writing import say
from .checks import check_folder, check_writable, tell


def check_out(out: str) -> None:
    """SigmaError unless pictures can be written there, to a file of a kind that is known or to a folder."""
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


def write_pictures(result, out: str) -> None:
    """Write the pictures of a `Result`, each with how it was made, and print their names.

    Several that are for one file get numbers. In a folder, which is made if need be, they are named after the
    prompt, with the next number that is free: nothing there is overwritten.
    """
    said = result.metadata.as_json()
    for number, picture in enumerate(result.images, 1):
        with _place(out, result.metadata.settings.prompt, number, len(result.images)) as path:
            if not write_picture(path, picture, said):
                tell(f"{path} does not say how it was made, which is too long for a JPEG; a PNG can hold it.")
        say(path)


def _is_folder(out: str) -> bool:
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


@contextmanager
def _place(out: str, prompt: str, number: int, total: int) -> Iterator[Path]:
    """The path of a picture; if it is not written within this block, no file of that name is left behind."""
    if not _is_folder(out):
        path = Path(out)
        yield path if total == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = claim(folder, name_of(prompt), ".png")
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def claim(folder: Path, name: str, ending: str) -> Path:
    """A new empty file with the next free number, so that nobody else takes it before it is written."""
    for number in count(1):
        path = folder / f"{name}_{number:04}{ending}"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("count() does not end")
