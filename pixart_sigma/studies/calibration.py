"""Calibration of what a checkpoint bears to be saved: whole runs are watched, measured and chosen from,
whoever makes them.

`calibrate` is the driver; first of KV compression alone, see `calibrator`, then of all savings together, see
`speed`. What makes the runs is a `Runs`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..choices import CALIBRATION_COSTS, CALIBRATION_REFERENCES
from ..errors import SigmaError
from ..pipeline import SigmaPipeline
from ..prompt_embeds import Prompts
from ..sampling.noise import get_noise
from ..settings import Settings
from ..transformer.calibration import Calibration, Choice, Point, fingerprint_of
from ..transformer.checkpoint import load_transformer_state_dict
from ..transformer.kv_rules import as_trained
from ..transformer.network import SigmaTransformer
from ..transformer.stage import Pass
from .calibrator import Calibrator, Progress
from .runs import EngineRuns, Ran, Runs
from .speed import MOST_RUNS, SpeedSearch

CONVERGED_STEPS = 80

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


def calibrate(
    runs: Runs,
    prompts: tuple[str, ...],
    settings: Settings,
    budget: float,
    *,
    reference: str = "own",
    cost: str = "multiply_adds",
    on_step: Progress = lambda done, total: None,
    on_run: Progress = lambda done, total: None,
) -> Calibration:
    """Measure what a model bears at the settings' size and steps.

    Prompt k is drawn from the seed + k. budget: the error allowed, a share of 1, from `reference`, of
    CALIBRATION_REFERENCES. cost: of CALIBRATION_COSTS. on_step(done, total) counts the steps that were
    repeated, on_run goes on from there with whole runs.
    Raises SigmaError for a budget that is no share, and for another word in place of those.
    """
    _check_words(reference, cost)
    width, height = settings.asked_size(runs.config.sample_size * 8)
    calibrator = Calibrator(runs.config, height, width, budget)
    base = Choice(as_trained(runs.config))
    full = [_watched(runs, index, base, calibrator) for index in range(len(prompts))]
    most = MOST_RUNS + (reference == "converged")
    count = _Count(on_run, calibrator.total, len(prompts) * most, settings.steps)
    rules, error, errors = base.rules, 0.0, {}
    if not base.rules:
        with torch.no_grad(), runs.repeating():
            errors = calibrator.measure(lambda done, total: on_step(done, count.total))
        rules, error = calibrator.choose(
            errors, lambda index, rules: runs.run(index, Choice(rules)).latents, count.steps
        )
    references = _references(runs, full, base, reference, count.run)
    search = SpeedSearch(runs, settings, calibrator, full, references, base, count.run)
    points = search.run_all(rules)
    count.done()
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
        reference=reference,
        speed=_cheapest(points, budget, cost),
        speed_in_place=_cheapest([point for point in points if point.choice.keeps_steps], budget, cost),
        points=tuple(points),
    )


def _check_words(reference: str, cost: str) -> None:
    named = {
        "reference": (reference, CALIBRATION_REFERENCES),
        "cost": (cost, CALIBRATION_COSTS),
    }
    for name, (word, words) in named.items():
        if word not in words:
            raise SigmaError(f"{name} is {word!r}; choose one of {', '.join(words)}.")


def _watched(runs: Runs, index: int, base: Choice, calibrator: Calibrator) -> Ran:
    """A run at full cost, of which the calibrator is told each step."""
    calibrator.start()
    ran = runs.run(index, base, calibrator.see)
    calibrator.finish(ran.latents)
    return ran


def _references(
    runs: Runs, full: list[Ran], base: Choice, reference: str, on_run: Callable[[], None]
) -> list[torch.Tensor]:
    """The latents (1, 4, h, w) of each prompt that errors are counted from."""
    if reference == "own":
        return [ran.latents.float() for ran in full]
    converged = []
    for index in range(len(full)):
        converged.append(runs.run(index, replace(base, steps=CONVERGED_STEPS)).latents.float())
        on_run()
    return converged


def _cheapest(points: list[Point], budget: float, cost: str) -> Point | None:
    """The cheapest point within the budget that saves anything."""
    within = [point for point in points if point.error <= budget and getattr(point, cost) < 1]
    return min(within, key=lambda point: getattr(point, cost), default=None)


class _Count:
    """One count of repeated steps and whole runs."""

    def __init__(self, on_progress: Progress, steps: int, runs: int, each: int):
        """steps: to be repeated at most, runs: whole ones at most, of `each` so many steps."""
        self.on_progress, self.finished, self.each = on_progress, 0, each
        self.total = steps + runs * each

    def steps(self, done: int, total: int) -> None:
        self.finished = done
        self.on_progress(done, self.total)

    def run(self) -> None:
        self.finished += self.each
        self.on_progress(min(self.finished, self.total), self.total)

    def done(self) -> None:
        self.on_progress(self.total, self.total)


def calibrate_pipeline(
    pipeline: SigmaPipeline,
    prompts: tuple[str, ...],
    settings: Settings,
    budget: float = 0.05,
    *,
    reference: str = "own",
    cost: str = "multiply_adds",
    on_progress: Progress = lambda done, total: None,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Calibration:
    """Calibrate the pipeline's transformer at exactly the settings' size; see `calibrate`.

    What `settings.speed` says is left aside. Raises SigmaError as `calibrate`.
    """
    settings = replace(settings.complete(pipeline.base_size), binning=False, speed=None)
    width, height = settings.made_size(pipeline.base_size)
    settings = replace(settings, width=width, height=height)
    on_stage("text encoder")
    (*encoded, negative), _, _ = pipeline.text.encode((*prompts, settings.negative), settings, pipeline.ways)
    on_stage("transformer")
    device, dtype = pipeline.device, pipeline.dtype
    channels = pipeline.checkpoint.config.in_channels
    fingerprint = fingerprint_of(load_transformer_state_dict(pipeline.checkpoint))

    def measure(transformer: SigmaTransformer, in_turn: bool) -> Calibration:
        unwanted = negative.prompt_embeds.to(device, dtype)
        starts = [
            (
                get_noise(1, height, width, settings.seed + index, dtype, device, channels),
                Prompts(prompt.prompt_embeds.to(device, dtype), negative_embeds=unwanted),
            )
            for index, prompt in enumerate(encoded)
        ]
        noise_schedule = pipeline.checkpoint.noise_schedule
        runs = EngineRuns(transformer, starts, settings, in_turn, noise_schedule, fingerprint)
        return calibrate(
            runs,
            prompts,
            settings,
            budget,
            reference=reference,
            cost=cost,
            on_step=on_progress,
            on_run=on_progress,
        )

    work = Pass(height, width, guided=settings.guided)
    return pipeline.transformer.run(measure, work, pipeline.ways)[0]
