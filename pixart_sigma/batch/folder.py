"""The folder of a batch: its pictures and manifest, and in `.batch` what is between two stages."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import SigmaError
from ..files.reading import read_json
from ..files.writing import write_beside
from ..prompt_embeds import Encoded
from ..text.cache import EmbeddingCache
from ..text.embeddings import write_tensors
from .manifest import NO_SEED, Manifest
from .pictures import BadRow, Picture
from .storage import Storage
from .work import Drawn, Finished, failure

MANIFEST, WORK, MADE_WITH = "manifest.jsonl", ".batch", "made_with.json"
# Lines of the manifest by workers that write pictures elsewhere than where the manifest is.
ENTRIES = f"{WORK}/entries"


class KeptEmbeddings(EmbeddingCache):
    """Embeddings of a batch: none goes before it is over, and one that cannot be written ends it."""

    def put(self, key: str, encoded: Encoded) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(
            self._path(key),
            {"prompt_embeds": encoded.prompt_embeds},
            {"key": key, "truncated": encoded.truncated},
        )


class BatchFolder:
    """A folder that one process at a time works in. Its pictures may be written by others, see `collect`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = str(path)
        self.storage = Storage(path)
        self.work = self.path / WORK
        self.manifest = Manifest(self.path / MANIFEST)

    @contextmanager
    def held(self, made_with: dict[str, Any]) -> Iterator[None]:
        """The folder, made if need be, is this process' alone within this block.

        made_with: what all its pictures are made with, ready for JSON. Raises SigmaError where another
        process works there, and where the pictures that are there were made with something else.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise SigmaError(
                f"Another batch works in {self.name}; wait for it, or choose another --out."
            ) from None
        try:
            self._check_made_with(made_with)
            self.collect()
            yield
        finally:
            lock.release()

    @cached_property
    def embeddings(self) -> KeptEmbeddings:
        """The prompts' embeddings, until the batch is done."""
        return KeptEmbeddings(self.work / "embeddings")

    def set_aside(self, bad: list[BadRow]) -> None:
        """Write down the rows that cannot be drawn, each once."""
        known = self.manifest.read()
        for one in bad:
            entry = known.get((one.row, NO_SEED))
            if not (entry and entry.error == one.error):
                self.manifest.add(row=one.row, error=one.error)

    def todo(self, pictures: list[Picture]) -> list[Picture]:
        """Those that are not finished. Raises SigmaError where one of the folder has other settings: it is of
        another batch."""
        entries, sizes = self.manifest.read(), self.storage.sizes()
        left = []
        for picture in pictures:
            entry = entries.get((picture.row, picture.settings.seed))
            if entry and entry.file and entry.digest != picture.digest:
                raise SigmaError(
                    f"{self.name} has another batch: its row {entry.row} was drawn as {entry.file} with "
                    "other settings than now. Choose another folder with --out, or give it the same rows and "
                    "options; new rows go to the end."
                )
            if not (entry and entry.file and sizes.get(entry.file) == entry.size):
                left.append(picture)
        return left

    def finish(self, picture: Picture, finished: Finished) -> None:
        """Write a picture's file, then its line of the manifest."""
        self.storage.write(finished.entry["file"], finished.content)
        self.manifest.add(**finished.entry)
        self.forget_latents(picture)

    def fail(self, picture: Picture, error: str) -> None:
        """Write down why there is no picture."""
        self.forget_latents(picture)
        self.manifest.add(**failure(picture, error))

    def take(self, entry: dict[str, Any]) -> None:
        """Write down the line of a picture that a worker wrote."""
        self.manifest.add(**entry)
        self._forget_entry(entry_name(entry["row"], entry["seed"]))

    def collect(self) -> None:
        """Write down what workers finished while nobody listened."""
        known = self.manifest.read()
        for name in sorted(self.storage.sizes(ENTRIES)):
            entry = read_entry(self.storage, name)
            old = entry and known.get((entry["row"], entry["seed"]))
            if entry and not (old and old.file and old.digest == entry["digest"]):
                self.manifest.add(**entry)
            self._forget_entry(name)

    def _forget_entry(self, name: str) -> None:
        self.storage.remove(f"{ENTRIES}/{name}")

    def keep(self, picture: Picture, drawn: Drawn) -> None:
        """The latents of a picture, until it is decoded."""
        path, content = self._latents_path(picture), drawn.to_bytes()
        path.parent.mkdir(exist_ok=True)
        write_beside(path, lambda file: file.write(content))

    def has_latents(self, picture: Picture) -> bool:
        return self._latents_path(picture).is_file()

    def latents_of(self, picture: Picture) -> Drawn:
        """What `keep` was given. Raises SigmaError where it is not there, or damaged."""
        try:
            return Drawn.from_bytes(self._latents_path(picture).read_bytes())
        except FileNotFoundError:
            raise SigmaError("its latents are gone; run the batch again") from None

    def forget_latents(self, picture: Picture) -> None:
        self._latents_path(picture).unlink(missing_ok=True)

    def clear(self) -> None:
        """What was between the stages of a batch that is done."""
        for name in ("embeddings", "latents", Path(ENTRIES).name):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def _latents_path(self, picture: Picture) -> Path:
        # By its row too: another one may ask for the same picture.
        return self.work / "latents" / f"{picture.row}_{picture.digest}.safetensors"

    def _check_made_with(self, made_with: dict[str, Any]) -> None:
        path = self.work / MADE_WITH
        if not path.exists():
            write_beside(path, lambda file: file.write(json.dumps(made_with, indent=2).encode()))
            return
        try:
            known = read_json(path)
        except SigmaError:
            known = {}
        other = [name for name, value in made_with.items() if known.get(name) != value]
        if other:
            raise SigmaError(
                f"The pictures in {self.name} were made with another {other[0]} "
                f"({_short(known.get(other[0]))}; now {_short(made_with[other[0]])}). Choose another folder "
                "with --out, or give what they were made with."
            )


def entry_name(row: int, seed: int) -> str:
    """Of the file under ENTRIES with a picture's line of the manifest."""
    return f"{row}_{seed}.json"


def read_entry(storage: Storage, name: str) -> dict[str, Any] | None:
    """The line of the manifest in a file under ENTRIES; None where there is none that is whole."""
    content = storage.read(f"{ENTRIES}/{name}")
    try:
        entry = json.loads(content or b"")
        return entry if {"row", "seed", "digest", "file"} <= entry.keys() else None
    except (ValueError, AttributeError):
        return None


def _short(value: Any) -> str:
    text = str(value) or "none"
    return text if len(text) <= 20 else f"{text[:17]}..."
