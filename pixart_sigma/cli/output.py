"""Where pictures are written: to the file that --out names, or under new names in a folder."""

import os
from contextlib import suppress
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
        if _is_folder(out):
            path, all_said = _write_new(Path(out), name_of(result.metadata.settings.prompt), picture, said)
        else:
            path = Path(out)
            if len(result.images) > 1:
                path = path.with_name(f"{path.stem}_{number}{path.suffix}")
            all_said = write_picture(path, picture, said)
        if not all_said:
            tell(f"{path} does not say how it was made, which is too long for a JPEG; a PNG can hold it.")
        say(path)


def _is_folder(out: str) -> bool:
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


def _write_new(folder: Path, name: str, picture, said: str) -> tuple[Path, bool]:
    """Write a picture under the next number that is free; its path, and what `write_picture` returns."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        path = folder / f"{name}_{number:04}.png"
        if not path.exists():
            with suppress(FileExistsError):  # another process has taken it meanwhile
                return path, write_picture(path, picture, said, new=True)
    raise AssertionError("count() does not end")
