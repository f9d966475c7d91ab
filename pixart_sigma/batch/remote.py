"""The folder of a batch on another file system, such as s3://bucket/folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .folder import ENTRIES, MADE_WITH, MANIFEST, WORK, BatchFolder
from .storage import Storage

KEPT = (MANIFEST, f"{WORK}/{MADE_WITH}")


class RemoteFolder(BatchFolder):
    """A folder of objects, to which nothing can be appended: its manifest is on this machine while the batch
    runs, and goes there when it ends, however it ends. Meanwhile an object for each picture says what became
    of it, so that a batch whose driver was killed goes on.

    Two batches at once in one such folder are not noticed.
    """

    def __init__(self, uri: str):
        self._here = tempfile.TemporaryDirectory(prefix="pixart_sigma_batch_")
        super().__init__(self._here.name)
        self.name, self.storage = uri, Storage(uri)
        self._taken: list[str] = []

    @contextmanager
    def held(self, made_with: dict[str, Any]) -> Iterator[None]:
        self.work.mkdir(exist_ok=True)
        for name in KEPT:
            content = self.storage.read(name)
            if content is not None:
                Path(self.path, name).write_bytes(content)
        with super().held(made_with):
            self.storage.write(KEPT[1], Path(self.path, KEPT[1]).read_bytes())
            try:
                yield
            finally:
                self._send()

    def _forget_entry(self, name: str) -> None:
        self._taken.append(name)

    def _send(self) -> None:
        """The manifest goes there, then what it has is no more needed by itself."""
        if self.manifest.path.exists():
            self.storage.write(MANIFEST, self.manifest.path.read_bytes())
        for name in self._taken:
            self.storage.remove(f"{ENTRIES}/{name}")
        self._taken.clear()
