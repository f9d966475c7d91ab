"""The folder of a batch: its pictures and manifest, and in `.batch` what is between two stages."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import SigmaError
from ..files.writing import write_beside
from ..prompt_embeds import Encoded
from ..text.cache import EmbeddingCache
from ..text.embeddings import write_tensors
from .manifest import NO_SEED, Entry, Manifest
from .pictures import BadRow, Picture

MANIFEST, WORK = "manifest.jsonl", ".batch"


class KeptEmbeddings(EmbeddingCache):
    """Embeddings of a batch: none goes before it is over, and one that cannot be written ends it."""

    def put(self, key: str, encoded: Encoded) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(
            self._path(key),
            {"prompt_embeds": encoded.prompt_embeds},
            {"key": key, "truncated": encoded.truncated},
        )


@dataclass(frozen=True)
class Drawn:
    """The latents (1, 4, h, w) of a picture, and what is known of how they were made, ready for JSON."""

    latents: torch.Tensor
    said: dict[str, Any]


class BatchFolder:
    """A folder that one process at a time works in."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
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
                f"Another batch works in {self.path}; wait for it, or choose another --out."
            ) from None
        try:
            self._check_made_with(made_with)
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
        entries = self.manifest.read()
        left = []
        for picture in pictures:
            entry = entries.get((picture.row, picture.settings.seed))
            if entry and entry.file and entry.digest != picture.digest:
                raise SigmaError(
                    f"{self.path} has another batch: its row {entry.row} was drawn as {entry.file} with "
                    "other settings than now. Choose another folder with --out, or give it the same rows and "
                    "options; new rows go to the end."
                )
            if not (entry and self._is_finished(entry)):
                left.append(picture)
        return left

    def _is_finished(self, entry: Entry) -> bool:
        if not entry.file:
            return False
        file = self.path / entry.file
        return file.is_file() and file.stat().st_size == entry.size

    def keep(self, picture: Picture, drawn: Drawn) -> None:
        """The latents of a picture, until it is decoded."""
        path = self._latents_path(picture)
        path.parent.mkdir(exist_ok=True)
        content = save({"latents": drawn.latents.contiguous()}, {"said": json.dumps(drawn.said)})
        write_beside(path, lambda file: file.write(content))

    def has_latents(self, picture: Picture) -> bool:
        return self._latents_path(picture).is_file()

    def latents_of(self, picture: Picture) -> Drawn | None:
        """What `keep` was given; None where it is not there, or damaged."""
        path = self._latents_path(picture)
        try:
            with safe_open(path, "pt") as file:
                return Drawn(file.get_tensor("latents"), json.loads((file.metadata() or {})["said"]))
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def forget_latents(self, picture: Picture) -> None:
        self._latents_path(picture).unlink(missing_ok=True)

    def clear(self) -> None:
        """What was between the stages of a batch that is done."""
        for name in ("embeddings", "latents"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def _latents_path(self, picture: Picture) -> Path:
        # By its row too: another one may ask for the same picture.
        return self.work / "latents" / f"{picture.row}_{picture.digest}.safetensors"

    def _check_made_with(self, made_with: dict[str, Any]) -> None:
        path = self.work / "made_with.json"
        if not path.exists():
            write_beside(path, lambda file: file.write(json.dumps(made_with, indent=2).encode()))
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
        other = [name for name, value in made_with.items() if known.get(name) != value]
        if other:
            raise SigmaError(
                f"The pictures in {self.path} were made with another {other[0]} "
                f"({_short(known.get(other[0]))}; now {_short(made_with[other[0]])}). Choose another folder "
                "with --out, or give what they were made with."
            )


def _short(value: Any) -> str:
    text = str(value) or "none"
    return text if len(text) <= 20 else f"{text[:17]}..."
