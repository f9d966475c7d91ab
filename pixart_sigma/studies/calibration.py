"""Calibration of KV compression: whole runs are watched, measured and chosen from, whoever makes them.

`calibrate` is the driver. What makes the runs is a `Runs`: the engine's is here, the host's with the nodes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..noise_schedule import PUBLISHED, NoiseSchedule
from ..pipeline import SigmaPipeline
from ..prompt_embeds import Prompts
from ..sampling.denoise import denoise
from ..sampling.guidance import Predict, guide
from ..sampling.noise import get_noise
from ..sampling.predictions import predict_clean
from ..sampling.schedulers import scheduler_for
from ..settings import Settings
from ..transformer.config import TransformerConfig
from ..transformer.kv_calibration import Calibration, fingerprint_of
from ..transformer.kv_rules import KVCompression, spell
from ..transformer.network import SigmaTransformer
from ..transformer.stage import Pass
from .calibrator import Calibrator, Progress

Rules = tuple[KVCompression, ...]
# (timestep, the clean latents that a step predicted, the same by other rules), see `Calibrator.see`.
See = Callable[[float, torch.Tensor, Callable[[Rules], torch.Tensor]], None]

# Different enough in content that no single picture decides.
PROMPTS = (
    "a portrait of an old fisherman with a grey beard, soft window light",
    "a busy street market at night, neon signs, many small details",
    "a red circle on a blue background",
    "a snowy mountain valley with a winding river, seen from above",
)
# Words that the demo model knows.
DEMO_PROMPTS = (
    "a large yellow star on a blue background",
    "a small red circle in the top left on a green background",
    "a pink square above a cyan triangle on white",
    "a medium black circle on an orange background",
)


class Runs(Protocol):
    """Whole runs of one model at one size, one for each prompt.

    config: the model's. fingerprint: some of its weights, see `fingerprint_of`.
    """

    config: TransformerConfig
    fingerprint: tuple[float, ...]

    def run(self, index: int, rules: Rules, see: See | None = None) -> torch.Tensor:
        """The latents that the run of prompt `index` ends with, compressed by the rules; `see` is told its
        steps."""
        ...

    def repeating(self):
        """A context in which steps that were seen can be repeated."""
        ...


def calibrate(
    runs: Runs,
    prompts: tuple[str, ...],
    settings: Settings,
    budget: float,
    *,
    on_step: Progress = lambda done, total: None,
    on_run: Progress = lambda done, total: None,
) -> Calibration:
    """Measure how much KV compression a model bears at the settings' size, see `calibrator`.

    Prompt k is drawn from the seed + k. budget: the error allowed, a share of 1. on_step(done, total) counts
    the steps that were repeated, on_run goes on from there with whole runs.
    """
    width, height = settings.asked_size(runs.config.sample_size * 8)
    calibrator = Calibrator(runs.config, height, width, budget)
    for index in range(len(prompts)):
        calibrator.start()
        calibrator.finish(runs.run(index, (), calibrator.see))
    with torch.no_grad(), runs.repeating():
        errors = calibrator.measure(on_step)
    rules, error = calibrator.choose(errors, runs.run, on_run)
    return Calibration(
        rules=rules,
        error=error,
        budget=budget,
        saved=calibrator.saved(rules),
        width=width,
        height=height,
        steps=settings.steps,
        prompts=prompts,
        errors=errors,
        fingerprint=runs.fingerprint,
    )


@dataclass
class EngineRuns:
    """Runs of a `SigmaTransformer`, from the noise (1, 4, h, w) and the prompts of each."""

    transformer: SigmaTransformer
    starts: list[tuple[torch.Tensor, Prompts]]
    settings: Settings
    in_turn: bool = False
    noise_schedule: NoiseSchedule = PUBLISHED

    def __post_init__(self):
        self.config = self.transformer.sigma_config
        self.fingerprint = fingerprint_of(self.transformer.state_dict())

    def run(self, index: int, rules: Rules, see: See | None = None) -> torch.Tensor:
        noise, _ = self.starts[index]
        predict = self._predict(index, rules)
        watched = self._watch(index, predict, see) if see else predict
        return denoise(watched, noise, self.settings, noise_schedule=self.noise_schedule)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        yield

    def _predict(self, index: int, rules: Rules) -> Predict:
        settings = replace(self.settings, kv_compression=spell(rules))
        return guide(self.transformer, self.starts[index][1], settings, self.in_turn, self.noise_schedule)

    def _watch(self, index: int, predict: Predict, see: See) -> Predict:
        scheduler = scheduler_for(self.settings, self.noise_schedule)

        def watched(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            def clean(noise: torch.Tensor) -> torch.Tensor:
                return predict_clean(scheduler, latents, noise, timestep)

            noise = predict(latents, timestep)
            see(
                float(timestep),
                clean(noise),
                lambda rules: clean(self._predict(index, rules)(latents, timestep)),
            )
            return noise

        return watched


def calibrate_pipeline(
    pipeline: SigmaPipeline,
    prompts: tuple[str, ...],
    settings: Settings,
    budget: float = 0.05,
    *,
    on_progress: Progress = lambda done, total: None,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Calibration:
    """Calibrate the pipeline's transformer at exactly the settings' size; see `calibrate`.

    Raises SigmaError for a budget that is no share, and for a checkpoint that was trained with KV
    compression.
    """
    settings = replace(settings.complete(pipeline.base_size), binning=False)
    width, height = settings.made_size(pipeline.base_size)
    settings = replace(settings, width=width, height=height)
    on_stage("text encoder")
    (*encoded, negative), _, _ = pipeline.text.encode((*prompts, settings.negative), settings, pipeline.ways)
    on_stage("transformer")
    device, dtype = pipeline.device, pipeline.dtype
    channels = pipeline.checkpoint.config.in_channels

    def measure(transformer: SigmaTransformer, in_turn: bool) -> Calibration:
        unwanted = negative.prompt_embeds.to(device, dtype)
        starts = [
            (
                get_noise(1, height, width, settings.seed + index, dtype, device, channels),
                Prompts(prompt.prompt_embeds.to(device, dtype), negative_embeds=unwanted),
            )
            for index, prompt in enumerate(encoded)
        ]
        runs = EngineRuns(transformer, starts, settings, in_turn, pipeline.checkpoint.noise_schedule)
        return calibrate(runs, prompts, settings, budget, on_step=on_progress, on_run=on_progress)

    work = Pass(height, width, guided=settings.guided)
    return pipeline.transformer.run(measure, work, pipeline.ways)[0]
