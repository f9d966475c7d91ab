"""A batch on one machine, stage by stage: each model is loaded once, used for all pictures, and released."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..errors import SigmaError
from ..files.picture_files import write_picture
from ..pipeline import SigmaPipeline
from ..run_inputs import Prompted
from ..runs import Run
from ..settings import Settings, Ways
from .folder import BatchFolder, Drawn
from .pictures import Picture

DISK = 10e9  # bytes for what is between two stages
MOST_TOGETHER = 32
DECIDES_EMBEDDINGS = ("prompt", "negative", "clean_caption", "max_sequence_length")


class Settled:
    """Settings with nothing left open and the ways they run in, found once for all that differ in prompts and
    seed alone; see `SigmaPipeline.settle`."""

    def __init__(self, pipeline: SigmaPipeline):
        self._pipeline = pipeline
        self._found: dict[Settings, tuple[Settings, Ways] | SigmaError] = {}

    def settle(self, settings: Settings) -> Settings:
        """Raises SigmaError for settings that cannot run."""
        kind = kind_of(settings)
        if kind not in self._found:
            try:
                self._found[kind] = self._pipeline.settle(kind)
            except SigmaError as error:
                self._found[kind] = error
        found = self._found[kind]
        if isinstance(found, SigmaError):
            raise found
        self._found.setdefault(found[0], found)
        own = {name: getattr(settings, name) for name in OWN}
        return replace(found[0], **own)

    def ways(self, settings: Settings) -> Ways:
        """How settled settings run."""
        found = self._found[kind_of(settings)]
        if isinstance(found, SigmaError):
            raise found
        return found[1]

    def ran(self, settings: Settings, ways: Ways) -> None:
        """That settled settings ran in these ways: what did not fit once is not tried for each picture."""
        kind = kind_of(settings)
        self._found[kind] = kind, ways


# What plays no part in how a picture is computed.
OWN = ("prompt", "negative", "seed", "count")


def kind_of(settings: Settings) -> Settings:
    """Settings as those of all that are computed in one way."""
    return replace(settings, **{name: getattr(Settings, name) for name in OWN})


def most_together(pipeline: SigmaPipeline, settings: Settings) -> int:
    """How many pictures go through the transformer at once, within the budget of the pipeline's ways and as
    fast as one does alone: a power of two. Raises SigmaError without a budget, and where none fits."""

    def ways(count: int) -> tuple[str, bool]:
        planned = pipeline.plan(replace(settings, count=count)).ways
        return planned.transformer_device, planned.guidance_in_turn

    alone, count = ways(1), 1
    while count < MOST_TOGETHER:
        try:
            if ways(2 * count) != alone:
                break
        except SigmaError:
            break
        count *= 2
    return count


@dataclass
class LocalBatch:
    """Pictures drawn by a pipeline that keeps its models, into a folder that is held.

    together: pictures that go through the transformer at once; of 1 each is bit for bit what `generate`
    makes of its settings. ending: of the files. disk: bytes for what is between two stages, by which a long
    batch is done in parts. on_stage(name) is called before a stage, on_count(done, total) after pictures.
    """

    pipeline: SigmaPipeline
    folder: BatchFolder
    settled: Settled
    together: int = 1
    ending: str = ".png"
    disk: float = DISK
    on_stage: Callable[[str], None] = lambda name: None
    on_count: Callable[[int, int], None] = lambda done, total: None
    failed: set[Picture] = field(default_factory=set, init=False)

    def run(self, pictures: Sequence[Picture]) -> None:
        """Draw them. One that fails is written down and is then in `failed`. An OSError, as where the disk is
        full, ends the batch; it goes on from there when it is run again."""
        if not pictures:
            return
        fingerprints, size = self.pipeline.fingerprints(), self.part_size(pictures)
        for first in range(0, len(pictures), size):
            part = pictures[first : first + size]
            self._encode([picture for picture in part if not self.folder.has_latents(picture)])
            self._denoise([picture for picture in part if not self.folder.has_latents(picture)])
            self._decode(part, fingerprints)
        if not self.failed:
            self.folder.clear()

    def part_size(self, pictures: Sequence[Picture]) -> int:
        """Of how many pictures all that is between two stages fits on the disk."""
        return max(int(self.disk / self.most_bytes(pictures)), 1)

    def most_bytes(self, pictures: Sequence[Picture]) -> int:
        """The most that is between two stages for one of the pictures: float32, and prompts as long as can
        be."""
        config = self.pipeline.checkpoint.config

        def of(settings: Settings) -> int:
            width, height = settings.made_size(self.pipeline.base_size)
            embeddings = 2 * settings.max_sequence_length * config.caption_channels  # of both prompts
            return 4 * (embeddings + config.in_channels * width * height // 64)

        return max(map(of, {kind_of(picture.settings) for picture in pictures}))

    def _encode(self, pictures: list[Picture]) -> None:
        """T5 for all texts, each once."""
        known: set[tuple] = set()
        with self._stage("text encoder"):
            for number, picture in enumerate(pictures, 1):
                settings = picture.settings
                texts = tuple(getattr(settings, name) for name in DECIDES_EMBEDDINGS)
                if texts not in known:
                    with self._may_fail(picture):
                        self._prompted(settings)
                        known.add(texts)
                self.on_count(number, len(pictures))

    def _denoise(self, pictures: list[Picture]) -> None:
        """The transformer for all that were encoded, in groups of those that are alike."""
        ready = [picture for picture in pictures if picture not in self.failed]
        done = 0
        with self._stage("transformer"):
            for group in self._groups(ready):
                try:
                    self._draw(group)
                except SigmaError:  # of one of them
                    for picture in group:
                        with self._may_fail(picture):
                            self._draw([picture])
                done += len(group)
                self.on_count(done, len(ready))

    def _decode(self, pictures: Sequence[Picture], fingerprints: dict[str, str]) -> None:
        ready = [picture for picture in pictures if picture not in self.failed]
        with self._stage("VAE decode"):
            for number, picture in enumerate(ready, 1):
                with self._may_fail(picture):
                    self._write(picture, fingerprints)
                self.on_count(number, len(ready))

    def _prompted(self, settings: Settings) -> tuple[Prompted, Ways]:
        prompted, ways = self.pipeline.encode(settings, self.settled.ways(settings), self.folder.embeddings)
        self.settled.ran(settings, ways)
        return prompted, ways

    def _groups(self, pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
        alike: dict[Settings, list[Picture]] = {}
        for picture in pictures:
            group = alike.setdefault(picture.settings.alike, [])
            group.append(picture)
            if len(group) == self.together:
                yield alike.pop(picture.settings.alike)
        yield from alike.values()

    def _draw(self, group: list[Picture]) -> None:
        began = time.perf_counter()
        encoded = [self._prompted(picture.settings) for picture in group]
        runs = [
            Run(picture.settings, prompted) for picture, (prompted, _) in zip(group, encoded, strict=True)
        ]
        latents, ways = self.pipeline.denoise(runs, encoded[0][1])
        self.settled.ran(group[0].settings, ways)
        seconds = (time.perf_counter() - began) / len(group)
        for picture, run, latent in zip(group, runs, latents.cpu().split(1), strict=True):
            said = {
                "ways": ways.as_dict(),
                "encoder": run.prompted.fingerprint,
                "tokenizer": run.prompted.tokenizer,
                "truncated": run.prompted.positive.truncated,
                "seconds": seconds,
            }
            self.folder.keep(picture, Drawn(latent, said))

    def _write(self, picture: Picture, fingerprints: dict[str, str]) -> None:
        began = time.perf_counter()
        drawn = self.folder.latents_of(picture)
        if drawn is None:
            raise SigmaError("its latents are gone or damaged; run the batch again")
        said, settings = drawn.said, picture.settings
        images, ways = self.pipeline.decode(drawn.latents, settings, Ways.from_dict(said["ways"]))
        ways = replace(ways, release=Ways.release)  # as `generate` says it, for one picture
        models = fingerprints | {"text_encoder": said["encoder"]}
        metadata = self.pipeline.describe(settings, ways, models, said["tokenizer"])
        path = self.folder.path / f"{picture.file}{self.ending}"
        write_picture(path, images[0], metadata.as_json())
        content = path.read_bytes()
        self.folder.manifest.add(
            row=picture.row,
            seed=settings.seed,
            file=path.name,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            seconds=round(said["seconds"] + time.perf_counter() - began, 3),
            truncated=said["truncated"],
            digest=picture.digest,
            settings=settings.as_dict(),
        )
        self.folder.forget_latents(picture)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """A stage's model stays from its first use to the end of this block."""
        self.on_stage(name)
        try:
            yield
        finally:
            for used in (name, "text encoder", "refiner"):
                self.pipeline.stages.drop(used)

    @contextmanager
    def _may_fail(self, picture: Picture) -> Iterator[None]:
        """A SigmaError within this block is the picture's alone."""
        try:
            yield
        except SigmaError as error:
            self.failed.add(picture)
            self.folder.forget_latents(picture)
            self.folder.manifest.add(
                row=picture.row,
                seed=picture.settings.seed,
                error=str(error),
                digest=picture.digest,
                settings=picture.settings.as_dict(),
            )
