"""The transformer's stage of a run: noise and embeddings in, latents out, in a smaller way where it must."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import SigmaError
from ..memory.stages import Stages, first_that_fits
from ..sampling.denoise import denoise, get_noise
from ..studies.calibration import calibrate
from ..text.encoder import Encoded, pad_embeds
from .checkpoint import Checkpoint, load_transformer_state_dict
from .kv_calibration import Calibration, find_calibrated, fingerprint_of
from .kv_rules import KVCompression, resolve
from .loading import load_transformer


@dataclass
class TransformerStage:
    """The transformer by its files, the place (of TRANSFORMER_PLACES), device and dtype it runs in, and the
    run's stages."""

    checkpoint: Checkpoint
    place: str
    device: torch.device
    dtype: torch.dtype
    stages: Stages = field(repr=False)
    _held_place: str = field(default="", repr=False)

    def denoise(
        self,
        noise: torch.Tensor,
        prompt: Encoded,
        negative: Encoded | None,
        generator: torch.Generator,
        place: str | None = None,
        guidance_in_turn: bool = False,
        **settings,
    ) -> torch.Tensor:
        """The clean latents (B, 4, h, w) that unit noise of that shape becomes; `settings` of `denoise`.

        Without `negative` there is no guidance. The transformer runs in the stage's place unless another is
        given. Where memory runs out, prompt and negative prompt take turns, and then it is streamed.
        """
        embeds, mask = self._batch(prompt, len(noise))
        negative_embeds, negative_mask = self._batch(negative, len(noise)) if negative else (None, None)
        state = generator.get_state()

        def run(place: str, in_turn: bool) -> torch.Tensor:
            def use(transformer):
                return denoise(
                    transformer,
                    noise,
                    embeds,
                    mask,
                    negative_embeds,
                    negative_mask,
                    generator=generator.set_state(state),
                    guidance_in_turn=in_turn,
                    **settings,
                )

            return self._run(place, use)

        ways = self._ways(run, place or self.place, guidance_in_turn, negative is not None)
        return first_that_fits("transformer", ways)

    def calibrate(
        self,
        prompts: tuple[str, ...],
        encoded: list[Encoded],
        negative: Encoded,
        width: int,
        height: int,
        seed: int,
        **settings,
    ) -> Calibration:
        """Measure KV compression at a size in pixels, each prompt from a seed of its own; `settings` of
        `calibrate`."""
        channels = self.checkpoint.config.in_channels
        unwanted, _ = self._batch(negative, 1)

        def measure(transformer) -> Calibration:
            runs = [
                (
                    get_noise(1, height, width, seed + index, self.dtype, self.device, channels),
                    self._batch(prompt, 1)[0],
                    unwanted,
                )
                for index, prompt in enumerate(encoded)
            ]
            return calibrate(transformer, runs, prompts, **settings)

        return self._run(self.place, measure)

    def load(self, place: str):
        """Load the transformer for a place."""
        return load_transformer(
            self.checkpoint, dtype=self.dtype, device=self.device, stream=place == "stream"
        )

    def kv_compression(self, setting: str | None, width: int, height: int) -> tuple[KVCompression, ...]:
        """The rules of a run at a size in pixels; None is as the checkpoint was trained.

        Raises SigmaError where the setting does not fit the checkpoint.
        """
        checkpoint = self.checkpoint

        def fingerprint():
            return fingerprint_of(load_transformer_state_dict(checkpoint))

        if setting is not None and setting.endswith(".json"):
            calibration = Calibration.read(Path(setting))
            if not calibration.fits(fingerprint()):
                raise SigmaError(
                    f"{setting} was measured on another checkpoint than {checkpoint.path}; calibrate it."
                )
            return resolve(calibration.rules, checkpoint.config, height, width)
        calibrated = find_calibrated(checkpoint.path, fingerprint) if setting == "auto" else None
        return resolve(setting, checkpoint.config, height, width, calibrated)

    def _batch(self, encoded: Encoded, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        embeds, mask = pad_embeds([encoded.prompt_embeds] * count)
        return embeds.to(self.device, self.dtype), mask

    def _ways(
        self, run: Callable[[str, bool], torch.Tensor], place: str, in_turn: bool, guided: bool
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """run(place, guidance in turn) as it is asked for, then in smaller ways."""
        ways = {}
        for other in dict.fromkeys((place, place if self.device.type == "cpu" else "stream")):
            suffix = ", streamed" if other == "stream" else ""
            if not (guided and in_turn and other == place):
                ways["one pass" + suffix] = partial(run, other, False)
            if guided:
                ways["prompt and negative in turn" + suffix] = partial(run, other, True)
        return ways

    def _run(self, place: str, use: Callable[[Any], Any]) -> Any:
        """use(transformer), the transformer in this place, also where another run left it in another one."""
        if self._held_place != place:
            self.stages.drop("transformer")
        self._held_place = place
        return self.stages.run("transformer", partial(self.load, place), use)
