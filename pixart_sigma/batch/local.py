"""A batch on one machine, stage by stage: each model is loaded once, used for all pictures, and released."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..errors import SigmaError
from ..pipeline import SigmaPipeline
from ..settings import Settings
from .folder import BatchFolder
from .pictures import Picture
from .work import Asked, PictureWork, kind_of

DISK = 10e9  # bytes for what is between two stages
MOST_TOGETHER = 32
TEXTS_AHEAD = 64  # pictures whose prompts a streamed T5 takes at once, and a killed batch encodes again


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
    """Pictures drawn in this process, into a folder that it holds.

    together: pictures that go through the transformer at once. disk: bytes for what is between two stages, by
    which a long batch is done in parts. on_stage(name) is called before a stage, on_count(done, total) after
    pictures.
    """

    work: PictureWork
    folder: BatchFolder
    together: int = 1
    disk: float = DISK
    on_stage: Callable[[str], None] = lambda name: None
    on_count: Callable[[int, int], None] = lambda done, total: None
    failed: set[Picture] = field(default_factory=set, init=False)

    def run(self, pictures: Sequence[Picture]) -> None:
        """Draw them. One that fails is written down and is then in `failed`. An OSError, as where the disk is
        full, ends the batch; it goes on from there when it is run again."""
        if not pictures:
            return
        size = self.part_size(pictures)
        for first in range(0, len(pictures), size):
            part = pictures[first : first + size]
            self._encode([picture for picture in part if not self.folder.has_latents(picture)])
            self._denoise([picture for picture in part if not self.folder.has_latents(picture)])
            self._decode(part)
        if not self.failed:
            self.folder.clear()

    def part_size(self, pictures: Sequence[Picture]) -> int:
        """Of how many pictures all that is between two stages fits on the disk."""
        return max(int(self.disk / self.most_bytes(pictures)), 1)

    def most_bytes(self, pictures: Sequence[Picture]) -> int:
        """The most that is between two stages for one of the pictures: float32, and prompts as long as can
        be."""
        pipeline = self.work.pipeline
        config = pipeline.checkpoint.config

        def of(settings: Settings) -> int:
            width, height = settings.made_size(pipeline.base_size)
            embeddings = 2 * settings.max_sequence_length * config.caption_channels  # of both prompts
            return 4 * (embeddings + config.in_channels * width * height // 64)

        return max(map(of, {kind_of(picture.settings) for picture in pictures}))

    def _encode(self, pictures: list[Picture]) -> None:
        """T5 for all texts, each once."""
        known: set[tuple] = set()
        with self._stage("text encoder"):
            for number, picture in enumerate(pictures):
                if number % TEXTS_AHEAD == 0:
                    self._encode_ahead(pictures, number)
                if picture.texts not in known:
                    with self._may_fail(picture):
                        self._asked(picture)
                        known.add(picture.texts)
                self.on_count(number + 1, len(pictures))

    def _encode_ahead(self, pictures: list[Picture], first: int) -> None:
        part = pictures[first : first + TEXTS_AHEAD]

        def count(done: int, total: int) -> None:
            self.on_count(first + len(part) * done // total, len(pictures))

        self.work.encode_ahead(part, self.folder.embeddings, count)

    def _denoise(self, pictures: list[Picture]) -> None:
        """The transformer for all that were encoded, in groups of those that are alike."""
        ready = self._ready(pictures)
        with self._stage("transformer"):
            for number, (picture, drawn) in enumerate(
                self.work.draw_all(ready, self._asked, self.together), 1
            ):
                if isinstance(drawn, SigmaError):
                    self._fail(picture, drawn)
                else:
                    self.folder.keep(picture, drawn)
                self.on_count(number, len(ready))

    def _decode(self, pictures: Sequence[Picture]) -> None:
        ready = self._ready(pictures)
        with self._stage("VAE decode"):
            for number, picture in enumerate(ready, 1):
                with self._may_fail(picture):
                    finished = self.work.finish(picture, self.folder.latents_of(picture))
                    self.folder.finish(picture, finished)
                self.on_count(number, len(ready))

    def _asked(self, picture: Picture) -> Asked:
        return self.work.encode(picture.settings, self.folder.embeddings)

    def _ready(self, pictures: Sequence[Picture]) -> list[Picture]:
        return [picture for picture in pictures if picture not in self.failed]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """A stage's model stays from its first use to the end of this block."""
        self.on_stage(name)
        try:
            yield
        finally:
            for used in (name, "text encoder", "refiner"):
                self.work.pipeline.stages.drop(used)

    @contextmanager
    def _may_fail(self, picture: Picture) -> Iterator[None]:
        """A SigmaError within this block is the picture's alone."""
        try:
            yield
        except SigmaError as error:
            self._fail(picture, error)

    def _fail(self, picture: Picture, error: SigmaError) -> None:
        self.failed.add(picture)
        self.folder.fail(picture, str(error))
