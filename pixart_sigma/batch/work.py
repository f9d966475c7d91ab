"""What is done for the pictures of a batch: their prompts are encoded, their latents denoised and decoded. In
which order, and where the results wait, is a driver's affair."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load, save

from ..errors import SigmaError
from ..files.picture_files import picture_bytes
from ..files.reading import parse_json, parsing
from ..pipeline import SigmaPipeline
from ..prompt_embeds import Encoded
from ..run_inputs import Prompted
from ..runs import Run
from ..settings import Settings, Ways
from ..text.cache import EmbeddingCache
from .pictures import Picture

# What plays no part in how a picture is computed.
OWN = ("prompt", "negative", "seed", "count")
T5_WAYS = ("t5_precision", "t5_device")  # fields of Ways that T5 decides as it runs


def kind_of(settings: Settings) -> Settings:
    """Settings as those of all that are computed in one way."""
    return replace(settings, **{name: getattr(Settings, name) for name in OWN})


class Settled:
    """Settings with nothing left open and the ways they run in, found once for all that differ in prompts and
    seed alone; see `SigmaPipeline.settle`."""

    def __init__(self, pipeline: SigmaPipeline):
        self._pipeline = pipeline
        self._found: dict[Settings, tuple[Settings, Ways] | SigmaError] = {}

    def settle(self, settings: Settings) -> Settings:
        """Raises SigmaError for settings that cannot run."""
        found = self._look(kind_of(settings))
        self._found.setdefault(found[0], found)
        own = {name: getattr(settings, name) for name in OWN}
        return replace(found[0], **own)

    def ways(self, settings: Settings) -> Ways:
        """How settled settings run. Raises SigmaError where they cannot."""
        return self._look(kind_of(settings))[1]

    def ran(self, settings: Settings, ways: Ways) -> None:
        """That settled settings ran in these ways: what did not fit once is not tried for each picture."""
        kind = kind_of(settings)
        self._found[kind] = kind, ways

    def _look(self, kind: Settings) -> tuple[Settings, Ways]:
        if kind not in self._found:
            try:
                self._found[kind] = self._pipeline.settle(kind)
            except SigmaError as error:
                self._found[kind] = error
        found = self._found[kind]
        if isinstance(found, SigmaError):
            raise found
        return found


@dataclass(frozen=True)
class Asked:
    """The prompts of a picture, encoded, and how T5 ran, by names of `Ways`."""

    prompted: Prompted
    t5_ways: dict[str, Any]

    def to_bytes(self, dtype: torch.dtype) -> bytes:
        """As a safetensors file. dtype: what the transformer computes in; embeddings that are wider are
        narrowed to it, as it would do itself."""
        embeds = {}
        texts = {"positive": self.prompted.positive, "negative": self.prompted.negative}
        for name, encoded in texts.items():
            if encoded is not None:
                narrower = dtype.itemsize < encoded.prompt_embeds.dtype.itemsize
                embeds[name] = encoded.prompt_embeds.to(dtype if narrower else None).contiguous()
        said = {
            "truncated": {name: encoded.truncated for name, encoded in texts.items() if encoded},
            "fingerprint": self.prompted.fingerprint,
            "tokenizer": self.prompted.tokenizer,
            "t5_ways": self.t5_ways,
        }
        return save(embeds | {"said": _as_tensor(said)})

    @classmethod
    def from_bytes(cls, content: bytes) -> "Asked":
        """What `to_bytes` wrote. Raises SigmaError for anything else."""
        embeds, said = _read(content)
        encoded = {name: Encoded(embeds[name], said["truncated"][name]) for name in embeds}
        prompted = Prompted(
            encoded["positive"], encoded.get("negative"), said["fingerprint"], said["tokenizer"]
        )
        return cls(prompted, said["t5_ways"])


@dataclass(frozen=True)
class Drawn:
    """The latents (1, 4, h, w) of a picture, and what is known of how they were made, ready for JSON."""

    latents: torch.Tensor
    said: dict[str, Any]

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return save({"latents": self.latents.contiguous(), "said": _as_tensor(self.said)})

    @classmethod
    def from_bytes(cls, content: bytes) -> "Drawn":
        """What `to_bytes` wrote. Raises SigmaError for anything else."""
        tensors, said = _read(content)
        return cls(tensors["latents"], said)


def _as_tensor(said: dict[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


def _read(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with parsing("What was between two stages", "is damaged", "Run the batch again.", SigmaError):
        tensors = load(content)
        return tensors, parse_json(tensors.pop("said").numpy().tobytes())


@dataclass(frozen=True)
class Finished:
    """A picture's file and its line of the manifest, whose `file` names it."""

    content: bytes
    entry: dict[str, Any]


@dataclass
class PictureWork:
    """The stages of a pipeline that keeps its models, for one picture or several that are alike.

    ending: of the files. Each method raises SigmaError for a picture that cannot be made.
    """

    pipeline: SigmaPipeline
    settled: Settled
    ending: str = ".png"

    def encode(self, settings: Settings, cache: EmbeddingCache) -> Asked:
        """The prompts of settled settings; T5 is loaded for what the cache lacks."""
        prompted, ways = self.pipeline.encode(settings, self.settled.ways(settings), cache)
        self.settled.ran(settings, ways)
        return Asked(prompted, {name: getattr(ways, name) for name in T5_WAYS})

    def encode_ahead(
        self,
        pictures: Sequence[Picture],
        cache: EmbeddingCache,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Put the prompts of pictures into the cache where T5 is streamed, which then is read once for all of
        them; they take a few MB each meanwhile. What fails is left to `encode`, which says why.

        progress(done, total) is called between T5's blocks.
        """
        groups: dict[tuple, list[Settings]] = {}
        for picture in pictures:
            with contextlib.suppress(SigmaError):
                settings, ways = picture.settings, self.settled.ways(picture.settings)
                if ways.t5_device == "stream":
                    key = settings.clean_caption, settings.max_sequence_length, ways
                    groups.setdefault(key, []).append(settings)
        for (*_, ways), group in groups.items():
            texts = [text for settings in group for text in settings.texts]
            with contextlib.suppress(SigmaError):
                self.pipeline.text.encode(tuple(dict.fromkeys(texts)), group[0], ways, cache, progress)

    def draw_all(
        self,
        pictures: Sequence[Picture],
        asked: Callable[[Picture], Asked],
        together: int = 1,
    ) -> Iterator[tuple[Picture, Drawn | SigmaError]]:
        """Each picture, in groups of those that are alike, with its latents or with why there are none.

        together: pictures that go through the transformer at once; of 1 each is bit for bit what `generate`
        makes of its settings.
        """
        for group in _groups(pictures, together):
            try:
                yield from zip(group, self._draw(group, asked), strict=True)
                continue
            except SigmaError as error:
                if len(group) == 1:
                    yield group[0], error
                    continue
            for picture in group:  # one of them was to blame
                yield from self.draw_all([picture], asked)

    def _draw(self, group: Sequence[Picture], asked: Callable[[Picture], Asked]) -> list[Drawn]:
        began = time.perf_counter()
        settings = group[0].settings
        given = [asked(picture) for picture in group]
        runs = [Run(picture.settings, one.prompted) for picture, one in zip(group, given, strict=True)]
        ways = replace(self.settled.ways(settings), **given[0].t5_ways)
        latents, ways = self.pipeline.denoise(runs, ways)
        self.settled.ran(settings, ways)
        seconds = (time.perf_counter() - began) / len(group)
        said = [
            {
                "ways": ways.as_dict(),
                "encoder": run.prompted.fingerprint,
                "tokenizer": run.prompted.tokenizer,
                "truncated": run.prompted.positive.truncated,
                "seconds": seconds,
            }
            for run in runs
        ]
        return [Drawn(*each) for each in zip(latents.cpu().split(1), said, strict=True)]

    def finish(self, picture: Picture, drawn: Drawn) -> Finished:
        """The picture's file, with how it was made inside, and its line of the manifest."""
        began = time.perf_counter()
        said, settings = drawn.said, picture.settings
        images, ways = self.pipeline.decode(drawn.latents, settings, Ways.from_dict(said["ways"]))
        ways = replace(ways, release=Ways.release)  # as `generate` says it, for one picture
        models = self._fingerprints | {"text_encoder": said["encoder"]}
        metadata = self.pipeline.describe(settings, ways, models, said["tokenizer"])
        content = picture_bytes(images[0], self.ending, metadata.as_json())
        entry = {
            "row": picture.row,
            "seed": settings.seed,
            "file": f"{picture.file}{self.ending}",
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "seconds": round(said["seconds"] + time.perf_counter() - began, 3),
            "truncated": said["truncated"],
            "digest": picture.digest,
            "settings": settings.as_dict(),
        }
        return Finished(content, entry)

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return self.pipeline.fingerprints()


def failure(picture: Picture, error: str) -> dict[str, Any]:
    """The manifest's line of a picture that could not be made."""
    return {
        "row": picture.row,
        "seed": picture.settings.seed,
        "error": error,
        "digest": picture.digest,
        "settings": picture.settings.as_dict(),
    }


def _groups(pictures: Sequence[Picture], together: int) -> Iterator[list[Picture]]:
    alike: dict[Settings, list[Picture]] = {}
    for picture in pictures:
        group = alike.setdefault(picture.settings.alike, [])
        group.append(picture)
        if len(group) == together:
            yield alike.pop(picture.settings.alike)
    yield from alike.values()
