"""The text stage of a run: T5 is loaded for texts that the cache lacks, in a smaller way where it must."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..components import T5_PLACES
from ..errors import CheckpointError, SigmaError
from ..memory.stages import Stages, first_that_fits
from .cleaning import prepare_prompt
from .embeddings import EmbeddingCache, EncoderIdentity, cache_key, identify
from .encoder import Encoded, TextEncoder
from .streaming import STREAMED


@dataclass
class TextStage:
    """T5 by its files, the precision and the place (of T5_PLACES) it runs in, and the run's stages."""

    text_encoder: Path | None
    tokenizer: Path | None
    precision: str | None
    place: str
    device: torch.device
    stages: Stages = field(repr=False)
    _held: EncoderIdentity | None = field(default=None, repr=False)

    def encode(
        self,
        texts: tuple[str, ...],
        clean_caption: bool = False,
        cache: EmbeddingCache | None = None,
        precision: str | None = None,
        place: str | None = None,
    ) -> tuple[list[Encoded], EncoderIdentity]:
        """What T5 makes of each text, and which T5; it is loaded only for what `cache` lacks.

        T5 runs in the stage's precision and place unless others are given; where memory runs out it is
        streamed, and if that is not possible or not enough, it runs on the CPU.
        """
        precision, place = precision or self.precision, place or self.place
        encoder = self._held or self._identify(precision)
        keys: list[str | None] = [None] * len(texts)
        if cache is not None and encoder is not None:
            prepared = [prepare_prompt(text, clean_caption) for text in texts]
            keys = [cache_key(encoder, self._device_of(place), text=text) for text in prepared]
        found = [key and cache.get(key) for key in keys]
        if all(found):
            return found, encoder

        def encode_missing(text_encoder: TextEncoder):
            encoded = [
                known or text_encoder.encode(text, clean_caption=clean_caption)
                for text, known in zip(texts, found, strict=True)
            ]
            return encoded, text_encoder.precision

        def run_in(place: str):
            load = partial(self.load, precision, place)
            return self.stages.run("text encoder", load, encode_missing, on_cpu=place == "cpu")

        places = [place]
        if self.device.type != "cpu":
            streamable = encoder is None or encoder.precision in STREAMED
            smaller = ("stream", "cpu") if streamable else ("cpu",)
            places += [other for other in smaller if place not in (other, "cpu")]
        ways = {T5_PLACES[place]: partial(run_in, place) for place in places}
        encoded, loaded_precision = first_that_fits("text encoder", ways)
        encoder = encoder or EncoderIdentity("", loaded_precision)
        if self.stages.release != "free":
            self._held = encoder  # whatever its files are by the next run
        for key, known, new in zip(keys, found, encoded, strict=True):
            if key and known is None:
                cache.put(key, new)
        return encoded, encoder

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
        )

    def _identify(self, precision: str | None) -> EncoderIdentity | None:
        """The T5 that will be loaded; None where its files are unusable, which loading it says better."""
        if self.text_encoder is None:
            return None
        try:
            return identify(self.text_encoder, self.tokenizer, precision)
        except (SigmaError, OSError):
            return None

    def _device_of(self, place: str) -> torch.device:
        return torch.device("cpu") if place == "cpu" else self.device
