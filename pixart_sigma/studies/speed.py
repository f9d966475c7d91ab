"""Which savings together cost the least for the error that is allowed, by measurement: every choice is
judged by whole runs.

Patterns of forecasts for the whole run, and of guidance, are run alone; fewer steps and other spacings of the
steps too, which are the line to beat. On the cheapest patterns within the budget guidance is put, then as
much KV compression as they leave room for, see `calibrator`; and the best of all that on other steps.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ..noise_schedule import SPACINGS
from ..schedule_part import SchedulePart
from ..setting_checks import LAST_TIMESTEP
from ..settings import Settings
from ..speed import FEW_STEPS, Saving, for_steps
from ..transformer.calibration import Choice, Point
from ..transformer.cost import multiply_adds
from ..transformer.kv_rules import KVCompression
from .calibrator import PROMPT_TOKENS, Calibrator, relative
from .runs import Ran, Runs

# (order, steps in a row) of forecasts, and of guidance.
FORECASTS = tuple((order, skipped) for order in (0, 1, 2) for skipped in (1, 2, 3))
GUIDANCE = ((0, 1), (1, 1), (0, 3))
# The first steps, from noise alone, decide most and follow no line.
BEGIN = 0.1
UNGUIDED_FROM = 0.75
# Shares of the user's own steps.
FEWER = (0.7, 0.5, 0.4, 0.3, 0.2)
# So many of the cheapest choices are gone on with, and so many KV compressions are tried on each.
KEPT, COMPRESSIONS = 3, 2
# How many whole runs of each prompt there are at most.
MOST_RUNS = (
    len(SPACINGS)
    + 2 * len(FEWER)
    + len(FORECASTS)
    + len(GUIDANCE)
    + 2
    + KEPT * (len(GUIDANCE) + 1 + COMPRESSIONS)
    + KEPT**2
)


class SpeedSearch:
    """`run_all` makes the `points`.

    full: the runs of each prompt without savings, references: the latents (1, 4, h, w) that errors are
    counted from. calibrator: has measured KV compression, unless the checkpoint was trained with it. base:
    what saves nothing. on_run(): called after each whole run.
    """

    def __init__(
        self,
        runs: Runs,
        settings: Settings,
        calibrator: Calibrator,
        full: list[Ran],
        references: list[torch.Tensor],
        base: Choice,
        on_run: Callable[[], None] = lambda: None,
    ):
        self.runs, self.settings, self.calibrator = runs, settings, calibrator
        self.full, self.references = full, references
        self.base, self.on_run = base, on_run
        self.points: list[Point] = []
        self._full_count = sum(self._count(one, base.rules) for one in full)

    def run_all(self, compression: tuple[KVCompression, ...]) -> list[Point]:
        """Every point; compression: what KV compression alone may be."""
        self._run_schedules()
        if self.settings.steps > FEW_STEPS:
            self._run_patterns()
        if self.calibrator.at_the_end:
            if compression:
                self.run("kv", replace(self.base, rules=compression))
            self._compress()
        self._run_on_schedules()
        return self.points

    def run(self, kind: str, choice: Choice) -> Point:
        """Whole runs with a choice; the point is kept."""
        ran = []
        for index in range(len(self.full)):
            ran.append(self.runs.run(index, choice))
            self.on_run()
        pairs = zip(ran, self.references, strict=True)
        point = Point(
            kind,
            choice,
            max(relative(one.latents.float(), reference) for one, reference in pairs),
            sum(self._count(one, choice.rules) for one in ran) / self._full_count,
            sum(one.seconds for one in ran) / sum(one.seconds for one in self.full),
        )
        self.points.append(point)
        return point

    def _run_schedules(self) -> None:
        """Fewer steps and other spacings, each alone; fewer steps also in the spacing that is nearest."""
        for spacing in self._other_spacings():
            self.run("spacing", replace(self.base, spacing=spacing))
        nearest = min(self.points, key=lambda point: point.error, default=None)
        own = self.settings.steps
        counts = sorted({round(share * own) for share in FEWER} - {0, own}, reverse=True)
        for schedule in [self.base] + ([nearest.choice] if nearest else []):
            for count in counts:
                self.run("steps", replace(schedule, steps=count))

    def _run_patterns(self) -> None:
        """Forecasts of steps and of guidance, each alone, and guidance on the cheapest forecasts; those also
        from the very first steps on."""
        part = SchedulePart(BEGIN, self._last_step())
        guidance = [Saving("guidance", *how, part) for how in GUIDANCE] if self.settings.guided else []
        for how in FORECASTS:
            self.run("forecast", replace(self.base, savings=(Saving("forecast", *how, part),)))
        for saving in guidance:
            self.run("guidance", replace(self.base, savings=(saving,)))
        if guidance:
            late = Saving("unguided", part=SchedulePart(UNGUIDED_FROM, 1.0))
            self.run("guidance", replace(self.base, savings=(late,)))
        for point in self._cheapest("forecast"):
            (forecast,) = point.choice.savings
            early = replace(forecast, part=SchedulePart(0.0, part.end))
            self.run("forecast", replace(self.base, savings=(early,)))
            for saving in guidance:
                self.run("together", replace(self.base, savings=(forecast, saving)))

    def _compress(self) -> None:
        """KV compression on top of the cheapest forecasts, for what they leave of the budget."""
        for point in self._cheapest("forecast", "guidance", "together"):

            def error_of(rules, choice=point.choice) -> float:
                return self.run("together", replace(choice, rules=rules)).error

            self.calibrator.search(error_of, point.error, COMPRESSIONS)

    def _run_on_schedules(self) -> None:
        """The cheapest choices on those other steps that are nearest to the reference."""
        others = [point for point in self.points if not point.choice.keeps_steps]
        nearest = sorted(others, key=lambda point: point.error)[:KEPT]
        chosen = self._cheapest("forecast", "guidance", "kv", "together")
        for schedule in (point.choice for point in nearest if point.error <= self.calibrator.budget):
            steps = schedule.steps or self.settings.steps
            for choice in (point.choice for point in chosen):
                savings = for_steps(choice.savings, self.settings.steps, steps)
                self.run("together", replace(schedule, rules=choice.rules, savings=savings))

    def _cheapest(self, *kinds: str) -> list[Point]:
        """The cheapest points of these kinds within the budget."""
        budget = self.calibrator.budget
        within = [point for point in self.points if point.kind in kinds and point.error <= budget]
        return sorted(within, key=lambda point: point.multiply_adds)[:KEPT]

    def _last_step(self) -> float:
        """Where it lies in the schedule; it is not forecast, as its error is that of the picture."""
        timesteps = [timestep for timestep, _ in self.full[0].asked]
        # So that its spelling leaves that step out too.
        return math.floor(1000 * (1 - min(timesteps) / LAST_TIMESTEP)) / 1000

    def _other_spacings(self) -> list[str]:
        schedule = self.runs.noise_schedule
        own = self.settings.spacing or schedule.sigma_spacing or schedule.timestep_spacing
        # Beta needs scipy, which is not required.
        return [] if schedule.is_flow else [spacing for spacing in SPACINGS if spacing not in (own, "beta")]

    def _count(self, ran: Ran, rules: tuple[KVCompression, ...]) -> int:
        """Multiply-adds of a run."""
        config = self.runs.config
        width, height = self.settings.asked_size(config.sample_size * 8)
        return sum(
            rows * multiply_adds(config, height, width, PROMPT_TOKENS, rules, timestep)
            for timestep, rows in ran.asked
        )
