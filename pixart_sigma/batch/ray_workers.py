"""The stages of a batch as Ray runs them: each in processes of its own, which hand tables of pictures on.

Nothing here needs Ray: a worker is made once in its process, and called with table after table.
"""

import json
import platform
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyarrow
import torch

from ..errors import SigmaError
from ..prompt_embeds import Encoded
from ..settings import Settings
from ..text.cache import CACHE_BYTES, EmbeddingCache
from .folder import ENTRIES, entry_name, read_entry
from .opening import Opening, made_with
from .pictures import Picture
from .storage import Storage
from .work import Asked, Drawn, PictureWork, Settled

# A picture on its way: what it is, as JSON; what the last stage made of it; why it cannot be made; and why
# none can be made any more. The last stage hands on the manifest's line.
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("picture", pyarrow.string()),
        ("carried", pyarrow.binary()),
        ("error", pyarrow.string()),
        ("fatal", pyarrow.string()),
    ]
)


@dataclass(frozen=True)
class Order:
    """What all workers of a batch are told, as plain data.

    made_with: what the pipeline that they open must come to. out: a path or URI. threads: of a process that
    computes on the CPU.
    """

    opening: Opening
    made_with: dict[str, str]
    out: str
    ending: str = ".png"
    together: int = 1
    threads: int = 1


def identify(picture: Picture) -> str:
    """A name for the picture within its batch."""
    return f"{picture.row}_{picture.settings.seed}"


def as_table(pictures: list[Picture]) -> pyarrow.Table:
    """Pictures at the start of their way."""
    return pyarrow.Table.from_pylist([_Row(picture).as_dict() for picture in pictures], SCHEMA)


@dataclass
class _Row:
    picture: Picture
    carried: bytes = b""
    error: str = ""
    fatal: str = ""
    done: bool = False  # by this stage

    def finish(self, result: bytes | SigmaError) -> None:
        """What it carries on, or why it cannot be made."""
        self.done = True
        if isinstance(result, SigmaError):
            self.error = str(result)
        else:
            self.carried = result

    def finish_by(self, make: Callable[["_Row"], bytes]) -> None:
        """Finish it with what `make` makes of it, or raises as SigmaError."""
        try:
            self.finish(make(self))
        except SigmaError as error:
            self.finish(error)

    def as_dict(self) -> dict[str, Any]:
        content = {
            "row": self.picture.row,
            "settings": self.picture.settings.as_dict(),
            "file": self.picture.file,
        }
        return {
            "id": identify(self.picture),
            "picture": json.dumps(content),
            "carried": b"" if self.error or self.fatal else self.carried,
            "error": self.error,
            "fatal": self.fatal,
        }

    @classmethod
    def read(cls, row: dict[str, Any]) -> "_Row":
        content = json.loads(row["picture"])
        picture = Picture(content["row"], Settings.from_dict(content["settings"]), content["file"])
        return cls(picture, row["carried"], row["error"], row["fatal"])


class Worker(ABC):
    """A stage in a process of its own, with a pipeline whose model stays loaded."""

    name: ClassVar[str]

    def __init__(self, order: Order):
        """Raises SigmaError where this machine's files are not those of the batch."""
        torch.set_num_threads(order.threads)
        pipeline = order.opening.open()
        found = made_with(pipeline)
        other = [name for name, value in order.made_with.items() if found.get(name) != value]
        if other:
            raise SigmaError(
                f"{platform.node()} has another {other[0]} ({found.get(other[0])!r}) than the batch is made "
                f"with ({order.made_with[other[0]]!r}); give all machines the same files and options."
            )
        self.work = PictureWork(pipeline, Settled(pipeline), order.ending)
        self.order = order

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """The table with what this stage makes of each picture that is still to be made."""
        rows = [_Row.read(row) for row in table.to_pylist()]
        ready = [row for row in rows if not (row.error or row.fatal)]
        try:
            self.do(ready)
        except OSError as error:  # of the place to write to: no other picture fares better
            for row in ready:
                if not row.done:
                    row.fatal = f"{platform.node()}: {error}"
        except Exception as error:  # nobody foresaw it, and no other picture shall be lost with it
            for row in ready:
                if not row.done:
                    row.error = f"{type(error).__name__}: {error}"
        return pyarrow.Table.from_pylist([row.as_dict() for row in rows], SCHEMA)

    @abstractmethod
    def do(self, rows: list[_Row]) -> None:
        """Carry out the stage: `finish` each row with what it carries on, or with why it cannot be made."""


class EncodeWorker(Worker):
    """T5. Texts that came lately are not encoded again."""

    name = "t5"

    def __init__(self, order: Order):
        super().__init__(order)
        self._recent = RecentEmbeddings()

    def do(self, rows: list[_Row]) -> None:
        self.work.encode_ahead([row.picture for row in rows], self._recent)
        for row in rows:
            row.finish_by(self._encode)

    def _encode(self, row: _Row) -> bytes:
        asked = self.work.encode(row.picture.settings, self._recent)
        return asked.to_bytes(self.work.pipeline.dtype)


class DenoiseWorker(Worker):
    """The transformer."""

    name = "transformer"

    def do(self, rows: list[_Row]) -> None:
        by_picture = {id(row.picture): row for row in rows}

        def asked(picture: Picture) -> Asked:
            return Asked.from_bytes(by_picture[id(picture)].carried)

        pictures = [row.picture for row in rows]
        for picture, drawn in self.work.draw_all(pictures, asked, self.order.together):
            by_picture[id(picture)].finish(drawn if isinstance(drawn, SigmaError) else drawn.to_bytes())


class DecodeWorker(Worker):
    """The VAE, which writes each picture, and beside it the manifest's line, until the driver has it."""

    name = "vae"

    def __init__(self, order: Order):
        super().__init__(order)
        self._storage = Storage(order.out)

    def do(self, rows: list[_Row]) -> None:
        for row in rows:
            row.finish_by(self._decode)

    def _decode(self, row: _Row) -> bytes:
        picture = row.picture
        name = entry_name(picture.row, picture.settings.seed)
        entry = read_entry(self._storage, name)
        if entry is None or entry["digest"] != picture.digest:  # else another worker died after it
            finished = self.work.finish(picture, Drawn.from_bytes(row.carried))
            entry = finished.entry
            self._storage.write(entry["file"], finished.content)
            self._storage.write(f"{ENTRIES}/{name}", json.dumps(entry).encode())
        return json.dumps(entry).encode()


STAGES = (EncodeWorker, DenoiseWorker, DecodeWorker)


class RecentEmbeddings(EmbeddingCache):
    """Embeddings in memory; the least recently used go beyond `max_bytes`."""

    def __init__(self, max_bytes: int = CACHE_BYTES):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    def get(self, key: str) -> Encoded | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, encoded: Encoded) -> None:
        self._kept[key] = replace(encoded, prompt_embeds=encoded.prompt_embeds.cpu())
        while sum(one.prompt_embeds.nbytes for one in self._kept.values()) > self.max_bytes:
            self._kept.popitem(last=False)
