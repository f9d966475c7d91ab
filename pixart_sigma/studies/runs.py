"""Whole runs of a model with chosen savings, as calibration asks for them, whoever makes them: `EngineRuns`
here, the host's with the nodes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..noise_schedule import PUBLISHED, NoiseSchedule
from ..prompt_embeds import Prompts
from ..sampling.denoise import denoise
from ..sampling.guidance import Predict, guide
from ..sampling.predictions import predict_clean
from ..sampling.schedulers import scheduler_for
from ..settings import Settings
from ..speed import spell as spell_speed
from ..transformer.calibration import Choice, fingerprint_of
from ..transformer.config import TransformerConfig
from ..transformer.kv_rules import KVCompression, spell
from ..transformer.network import SigmaTransformer

Rules = tuple[KVCompression, ...]


# (timestep, the clean latents (1, 4, h, w) that a step predicted, the same by other rules of KV compression),
# see `Calibrator.see`.
See = Callable[[float, torch.Tensor, Callable[[Rules], torch.Tensor]], None]


@dataclass(frozen=True)
class Ran:
    """What a run ended with, latents (1, 4, h, w), how long it took, and each time that the model was asked:
    the timestep and for how many rows."""

    latents: torch.Tensor
    seconds: float
    asked: list[tuple[float, int]]


class Runs(Protocol):
    """Whole runs of one model at one size, one for each prompt.

    config: the model's. fingerprint: some of its weights, see `fingerprint_of`. noise_schedule: the
    checkpoint's.
    """

    config: TransformerConfig
    fingerprint: tuple[float, ...]
    noise_schedule: NoiseSchedule

    def run(self, index: int, choice: Choice, see: See | None = None) -> Ran:
        """The run of prompt `index`; `see` is told the steps of one without forecasts."""
        ...

    def repeating(self):
        """A context in which steps that were seen can be repeated."""
        ...


@dataclass
class EngineRuns:
    """Runs of a `SigmaTransformer`, from the noise (1, 4, h, w) and the prompts of each.

    fingerprint: the checkpoint's, which a transformer with adapters or quantised weights does not have.
    """

    transformer: SigmaTransformer
    starts: list[tuple[torch.Tensor, Prompts]]
    settings: Settings
    in_turn: bool = False
    noise_schedule: NoiseSchedule = PUBLISHED
    fingerprint: tuple[float, ...] = ()

    def __post_init__(self):
        self.config = self.transformer.sigma_config
        self.fingerprint = self.fingerprint or fingerprint_of(self.transformer.state_dict())

    def run(self, index: int, choice: Choice, see: See | None = None) -> Ran:
        noise, prompts = self.starts[index]
        asked: list[tuple[float, int]] = []

        def counted(latents, timestep, *arguments, **named):
            asked.append((float(timestep), len(latents)))
            return self.transformer(latents, timestep, *arguments, **named)

        settings = self._settings(choice)
        predict = guide(counted, prompts, settings, self.in_turn, self.noise_schedule)
        if see:
            predict = self._watched(counted, index, choice.rules, see)
        started = time.perf_counter()
        latents = denoise(predict, noise, settings, noise_schedule=self.noise_schedule)
        # Steps that are repeated later count no more.
        return Ran(latents, time.perf_counter() - started, asked.copy())

    @contextmanager
    def repeating(self) -> Iterator[None]:
        yield

    def _settings(self, choice: Choice) -> Settings:
        return replace(
            self.settings,
            kv_compression=spell(choice.rules),
            speed=spell_speed(choice.savings),
            steps=choice.steps or self.settings.steps,
            spacing=choice.spacing or self.settings.spacing,
        )

    def _watched(
        self, transformer: Callable[..., torch.Tensor], index: int, rules: Rules, see: See
    ) -> Predict:
        settings, prompts = self.settings, self.starts[index][1]
        scheduler = scheduler_for(settings, self.noise_schedule)

        def watched(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            def predict(others: Rules) -> torch.Tensor:
                compressed = replace(settings, kv_compression=spell(others))
                return guide(transformer, prompts, compressed, self.in_turn)(latents, timestep)

            def clean(noise: torch.Tensor) -> torch.Tensor:
                return predict_clean(scheduler, latents, noise, timestep)

            noise = predict(rules)
            see(float(timestep), clean(noise), lambda others: clean(predict(others)))
            return noise

        return watched
