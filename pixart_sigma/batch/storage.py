"""Where the pictures of a batch go: a folder, which all machines may see, or a place that fsspec opens."""

from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import SigmaError
from ..files.writing import write_beside


def is_remote(place: str | Path) -> bool:
    """Whether this is a URI, such as s3://bucket/folder, and no path."""
    return "://" in str(place)


class Storage:
    """Files by their names under a place: a path, or a URI such as s3://bucket/folder.

    Each file appears whole or not at all: beside and by rename on a path, by one request to a store of
    objects. Raises OSError as files do.
    """

    def __init__(self, place: str | Path):
        self.place = str(place)
        self.is_remote = is_remote(place)

    def write(self, name: str, content: bytes) -> None:
        if self.is_remote:
            self._files.pipe_file(self._path(name), content)
            return
        path = Path(self.place, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda file: file.write(content))

    def read(self, name: str) -> bytes | None:
        """None where there is none."""
        try:
            return (
                self._files.cat_file(self._path(name))
                if self.is_remote
                else Path(self.place, name).read_bytes()
            )
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The names and bytes of the files directly in a folder."""
        if not self.is_remote:
            found = Path(self.place, folder)
            files = found.iterdir() if found.is_dir() else ()
            return {file.name: file.stat().st_size for file in files if file.is_file()}
        try:
            self._files.invalidate_cache()
            found = self._files.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {Path(one["name"]).name: one["size"] for one in found if one["type"] == "file"}

    def remove(self, name: str) -> None:
        """It is gone, whether it was there or not."""
        if not self.is_remote:
            Path(self.place, name).unlink(missing_ok=True)
            return
        try:
            self._files.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def check(self) -> None:
        """Raise SigmaError for a URI that nothing here can open."""
        if self.is_remote:
            self._path("")

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self._opened[1].rstrip("/"), name) if part)

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise SigmaError(f"{self.place} can not be opened here: {error}") from error
