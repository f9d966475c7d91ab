"""The text stage of a run: T5 is loaded for texts that the cache lacks, in a smaller way where it must; and
the ways it has."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..choices import DEFAULT_T5_PRECISION, MAX_SEQUENCE_LENGTH, T5_PRECISIONS
from ..devices import half_precision
from ..errors import UNUSABLE, CheckpointError
from ..memory.stages import Stages
from ..memory.ways import Needs, Way, first_that_fits
from ..prompt_embeds import Encoded
from ..settings import Settings, Ways
from .cache import EmbeddingCache, cache_key
from .changes import WeightChanges
from .cleaning import prepare_prompt, refuse_embeddings
from .encoder import TextEncoder
from .identity import EncoderIdentity, identify
from .needs import EncoderShapes

# The places from the fastest to the smallest, in words for people.
PLACES = {"auto": "", "stream": ", streamed", "cpu": " on the CPU"}


def list_ways(
    precisions: Iterable[str], places: Iterable[str], needs: Callable[[str, str], Needs]
) -> Iterator[Way]:
    """The ways to run T5 in one of these precisions, the best first, and in one of these places of
    T5_DEVICES: on the device in each precision, streamed in the best, on the CPU in the smallest.

    needs(precision, place): what a way needs.
    """
    best, *smaller = precisions
    tried = [(name, "auto") for name in (best, *smaller)]
    if T5_PRECISIONS[best].streams:
        tried.append((best, "stream"))
    tried.append(((best, *smaller)[-1], "cpu"))
    for precision, place in tried:
        if place in places:
            yield _way(precision, place, needs)


def _way(precision: str, place: str, needs: Callable[[str, str], Needs]) -> Way:
    chosen = {"t5_precision": precision, "t5_device": place}
    return Way(f"T5 in {precision}{PLACES[place]}", chosen, partial(needs, precision, place))


def _asked(text: str, settings: Settings) -> dict[str, str | int]:
    """What decides a text's embeddings, for `cache_key`. The usual length is left out, as it was when there
    was no other."""
    asked: dict[str, str | int] = {"text": prepare_prompt(text, settings.clean_caption)}
    if settings.max_sequence_length != MAX_SEQUENCE_LENGTH:
        asked["max_sequence_length"] = settings.max_sequence_length
    return asked


@dataclass
class TextStage:
    """T5 by its files, the device and the run's stages, and what adapters do to its weights."""

    text_encoder: Path | None
    tokenizer: Path | None
    device: torch.device
    stages: Stages = field(repr=False)
    changes: WeightChanges | None = field(default=None, repr=False)
    _held: EncoderIdentity | None = field(default=None, repr=False)
    _held_way: tuple[str, str] = field(default=("", ""), repr=False)

    def encode(
        self,
        texts: tuple[str, ...],
        settings: Settings,
        ways: Ways,
        cache: EmbeddingCache | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Encoded], EncoderIdentity, Ways]:
        """What T5 makes of each text, which T5, and the ways as it ran; it is loaded only for what `cache`
        lacks. How texts are cleaned and cut is in `settings`.

        A streamed T5 reads its blocks once for many texts: give it as many as there are. progress: called as
        progress(blocks done, blocks to do) between them; what it raises stops the encoding.
        Where memory runs out T5 is streamed, and if that is not possible or not enough, it runs on the CPU.
        """
        for text in texts:
            refuse_embeddings(text)
        if self._held and ways.t5_precision not in (None, self._held.precision):
            self._held = None  # another run was in another precision
        encoder = self._held or self.identify(ways.t5_precision)
        keys: list[str | None] = [None] * len(texts)
        if cache is not None and encoder is not None:
            device = self._device_of(ways.t5_device)
            keys = [cache_key(encoder, device, **_asked(text, settings)) for text in texts]
        found = [cache.get(key) if cache is not None and key else None for key in keys]
        known = [one for one in found if one is not None]
        if encoder is not None and len(known) == len(texts):
            self._hold(encoder)
            return known, encoder, replace(ways, t5_precision=encoder.precision)

        precision = encoder.precision if encoder else ways.t5_precision or DEFAULT_T5_PRECISION

        missing = list(dict.fromkeys(text for text, one in zip(texts, found, strict=True) if one is None))

        def encode_missing(text_encoder: TextEncoder) -> tuple[list[Encoded], str]:
            made = text_encoder.encode_all(
                missing, settings.clean_caption, settings.max_sequence_length, progress
            )
            by_text = dict(zip(missing, made, strict=True))
            encoded = [one or by_text[text] for text, one in zip(texts, found, strict=True)]
            return encoded, text_encoder.precision

        def run(way: Way) -> tuple[list[Encoded], str]:
            place = way.chosen["t5_device"]
            if (precision, place) != self._held_way:  # another run, or the way that did not fit, left it so
                self.stages.drop("text encoder")
            self._held_way = precision, place
            load = partial(self.load, ways.t5_precision, place)
            return self.stages.run("text encoder", load, encode_missing, on_cpu=place == "cpu")

        (encoded, made_in), way = first_that_fits("text encoder", self._ways(precision, ways.t5_device), run)
        encoder = encoder or EncoderIdentity("", made_in)
        self._hold(encoder)
        for key, one, new in zip(keys, found, encoded, strict=True):
            if cache is not None and key and one is None:
                cache.put(key, new)
        return encoded, encoder, replace(ways, t5_precision=made_in, t5_device=way.chosen["t5_device"])

    def _hold(self, encoder: EncoderIdentity) -> None:
        """Which T5 it is, whatever its files are by the next run."""
        if self.stages.release != "free":
            self._held = encoder

    def load(self, precision: str | None, place: str) -> TextEncoder:
        """Load T5 in a precision for a place. Raises CheckpointError if the run has no T5."""
        if self.text_encoder is None:
            raise CheckpointError("This pipeline has no text encoder; give it encoded prompts.")
        return TextEncoder.load(
            self.text_encoder,
            tokenizer=self.tokenizer,
            precision=precision,
            device=self._device_of(place),
            stream=place == "stream",
            changes=self.changes,
        )

    def identify(self, precision: str | None) -> EncoderIdentity | None:
        """The T5 that will be loaded; None where its files are unusable, which loading it says better."""
        if self.text_encoder is None:
            return None
        try:
            return identify(self.text_encoder, self.tokenizer, precision, self.changes)
        except UNUSABLE:
            return None

    def _ways(self, precision: str, place: str) -> list[Way]:
        """As it is asked for, then in smaller ways."""
        places = list(PLACES)
        smaller = [] if self.device.type == "cpu" else places[places.index(place) + 1 :]
        return [
            _way(precision, place, self._needs),
            *list_ways((precision,), smaller, self._needs),
        ]

    def _needs(self, precision: str, place: str) -> Needs:
        if self.text_encoder is None:
            raise CheckpointError("This pipeline has no text encoder; give it encoded prompts.")
        return EncoderShapes.read(self.text_encoder).needs(precision, place, half_precision(self.device))

    def _device_of(self, place: str) -> torch.device:
        return torch.device("cpu") if place == "cpu" else self.device
