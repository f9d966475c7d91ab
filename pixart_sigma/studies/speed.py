"""Which savings together cost the least for the error that is allowed, by measurement.

What is forecast is known without a run: the steps of whole runs are repeated from what they predicted. How
much of such an error is left at the end differs from part to part of a run, so each part is measured once by
whole runs. Errors of parts and of savings are nearly independent, so that their squares add: with one price
for a squared error, each part of the run by itself takes the forecasts, the guidance and the compressed
layers that are worth it. The highest price with which whole runs end within the budget is looked for; the
last word has the run. Fewer steps and other spacings are measured beside it, alone, and then with the
savings on top.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from ..noise_schedule import SPACINGS
from ..sampling.forecast import ForecastRun
from ..schedule_part import SchedulePart
from ..setting_checks import LAST_TIMESTEP
from ..settings import Settings
from ..speed import FEW_STEPS, Saving, Savings, for_steps
from ..transformer.calibration import RATIOS, WINDOWS, Choice, Point
from ..transformer.cost import multiply_adds
from ..transformer.kv_rules import KVCompression
from .calibrator import OPERATOR, PROMPT_TOKENS, join, relative
from .runs import Ran, Runs, Seen

FORECASTS = tuple((order, skipped) for order in (0, 1, 2) for skipped in (1, 2, 3, 5))
GUIDANCE = ((0, 1), (0, 3), (1, 1))
# What is left of a part's errors at the end is measured with these, and taken to be the same share of others.
MILD_FORECAST, MILD_GUIDANCE = Saving("forecast", 1, 1), Saving("guidance", 0, 1)
# Of one pattern for the whole run but its first steps, and what guidance may have beside it.
PATTERNS = tuple((order, skipped) for order in (0, 1, 2) for skipped in (1, 2, 3))
PATTERNS_BEGIN = 0.1
BESIDE_PATTERNS = ((0, 1), (1, 1))
# So many of the cheapest patterns within the budget are gone on with.
KEPT_PATTERNS = 3
# Shares of the user's own steps.
FEWER = (0.7, 0.5, 0.4, 0.3, 0.2)
SEARCHES_ALONE, SEARCHES_TOGETHER, SEARCHES_ON_TOP = 3, 4, 2
BISECTIONS = 50
PRICES = (1e-12, 1e12)  # the lowest and the highest
NOTHING = Choice()


@dataclass(frozen=True)
class Option:
    """A part's savings: the error that is left of them at the end, and the share of the model's answers in
    this part that they still ask for."""

    savings: Savings
    error: float
    asked: float


class SpeedSearch:
    """Measures and chooses, see above. `measure` first, then `search`.

    recorded: the steps of each prompt's run at full cost, full: those runs. references: the latents (1, 4,
    h, w) that errors are counted from. compressed: of each window of the schedule, the errors[ratio][layer]
    that KV compression leaves at the end; None where it is not to be chosen. base: what saves nothing.
    on_run(): called after each whole run.
    """

    def __init__(
        self,
        runs: Runs,
        settings: Settings,
        budget: float,
        recorded: list[list[Seen]],
        full: list[Ran],
        references: list[torch.Tensor],
        compressed: list[dict[int, list[float]]] | None,
        base: Choice = NOTHING,
        on_run: Callable[[], None] = lambda: None,
    ):
        self.runs, self.settings, self.budget = runs, settings, budget
        self.recorded, self.full, self.references = recorded, full, references
        self.compressed, self.base, self.on_run = compressed, base, on_run
        self.points: list[Point] = []
        self.windows: list[list[Option]] = []

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

    def measure(self) -> None:
        """What each part's savings leave at the end."""
        for part in self._parts:
            forecasts = self._alone(
                part, [Saving("forecast", *how, part) for how in FORECASTS], MILD_FORECAST
            )
            guidance = [Saving("guidance", *how, part) for how in GUIDANCE] + [Saving("unguided", part=part)]
            reused = self._alone(part, guidance if self.settings.guided else [], MILD_GUIDANCE)
            self.windows.append(
                [
                    Option(savings, math.hypot(forecast.error, other.error), self._asked(part, savings))
                    for forecast, other in itertools.product(forecasts, reused)
                    for savings in [forecast.savings + other.savings]
                ]
            )

    def run_patterns(self) -> None:
        """One pattern for the whole run: what is chosen part by part does not know how parts meet."""
        part = SchedulePart(PATTERNS_BEGIN, self._parts[-1].end)
        for how in PATTERNS:
            self.run("forecast", replace(self.base, savings=(Saving("forecast", *how, part),)))
        if not self.settings.guided:
            return
        for point in self._within("forecast")[:KEPT_PATTERNS]:
            for how in BESIDE_PATTERNS:
                savings = (*point.choice.savings, Saving("guidance", *how, part))
                self.run("together", replace(point.choice, savings=savings))

    def _within(self, *kinds: str) -> list[Point]:
        """The points of these kinds within the budget, the cheapest first."""
        within = [point for point in self.points if point.kind in kinds and point.error <= self.budget]
        return sorted(within, key=lambda point: point.multiply_adds)

    def compress_the_best(self) -> None:
        """KV compression on top of the cheapest forecasts, for what they leave of the budget."""
        for point in self._within("forecast", "together")[:KEPT_PATTERNS]:
            if not point.choice.rules and self.compressed is not None:
                self.search("together", ("kv",), SEARCHES_ON_TOP, point)

    def search(
        self, kind: str, kinds: tuple[str, ...], searches: int, top_of: Point | None = None
    ) -> Point | None:
        """The cheapest choice of these kinds of savings within the budget, or None; KV compression is "kv".

        top_of: other steps than the user's own or forecasts, as they were measured, that stay.
        """
        already = top_of.error if top_of else self._base_error
        room = math.sqrt(max(self.budget**2 - already**2, 0))
        low, high, limit = *PRICES, room
        best, within = None, {self._choose(0.0, kinds)[0]: True}
        for _ in range(searches):
            price = self._price(kinds, limit, low, high)
            found, expected = self._choose(price, kinds)
            for _ in range(BISECTIONS):  # to one that has not been run
                if found not in within:
                    break
                low, high = (price, high) if within[found] else (low, price)
                price = math.sqrt(low * high)
                found, expected = self._choose(price, kinds)
            else:
                break
            point = self.run(kind, self._on(top_of.choice, found) if top_of else found)
            within[found] = point.error <= self.budget
            if within[found]:
                low = price
                best = point if best is None or point.multiply_adds < best.multiply_adds else best
            else:
                high = price
            added = math.sqrt(max(point.error**2 - already**2, 0))
            limit = expected * room / added if added else math.inf
        return best

    def run_schedules(self) -> list[Point]:
        """Fewer steps and other spacings, each alone."""
        own = self.settings.steps
        spaced = [
            self.run("spacing", replace(self.base, spacing=spacing)) for spacing in self._other_spacings
        ]
        better = min(spaced, key=lambda point: point.error, default=None)
        spacings = [None] + ([better.choice.spacing] if better else [])
        counts = sorted({round(share * own) for share in FEWER} - {0, own}, reverse=True)
        return spaced + [
            self.run("steps", replace(self.base, steps=count, spacing=spacing))
            for spacing in spacings
            for count in counts
        ]

    def on_schedules(self, schedules: list[Point]) -> None:
        """The best choices so far on top of the other steps that are nearest to the reference."""
        best = self._within("forecast", "guidance", "kv", "together")[:SEARCHES_ON_TOP]
        nearest = [point for point in schedules if point.error <= self.budget]
        nearest.sort(key=lambda point: point.error)
        for schedule in nearest[:SEARCHES_ON_TOP]:
            for point in best:
                self.run("together", self._on(schedule.choice, point.choice))

    @cached_property
    def _base_error(self) -> float:
        pairs = zip(self.full, self.references, strict=True)
        return max(relative(one.latents.float(), reference) for one, reference in pairs)

    @cached_property
    def _full_count(self) -> int:
        return sum(self._count(one, self.base.rules) for one in self.full)

    @property
    def _other_spacings(self) -> list[str]:
        schedule = self.runs.noise_schedule
        own = self.settings.spacing or schedule.sigma_spacing or schedule.timestep_spacing
        return [] if schedule.is_flow else [spacing for spacing in SPACINGS if spacing not in (own, "beta")]

    def _count(self, ran: Ran, rules: tuple[KVCompression, ...]) -> int:
        """Multiply-adds of a run."""
        return sum(rows * self._multiply_adds(rules, timestep) for timestep, rows in ran.asked)

    def _multiply_adds(self, rules: tuple[KVCompression, ...], timestep: float) -> int:
        width, height = self.settings.asked_size(self.runs.config.sample_size * 8)
        return multiply_adds(self.runs.config, height, width, PROMPT_TOKENS, rules, timestep)

    @cached_property
    def _parts(self) -> list[SchedulePart]:
        """The quarters of the schedule. The last step is not in them: its error is that of the picture."""
        last = 1 - min(seen.timestep for seen in self.recorded[0]) / LAST_TIMESTEP
        last = math.floor(1000 * last) / 1000  # so that its spelling leaves that step out too
        starts = [window / WINDOWS for window in range(WINDOWS)]
        ends = [*starts[1:], last if last > starts[-1] else 1.0]
        return [SchedulePart(start, end) for start, end in zip(starts, ends, strict=True)]

    @cached_property
    def _weights(self) -> list[float]:
        """The share of each part in the multiply-adds of a run."""
        steps = [seen.timestep for seen in self.recorded[0]]
        return [sum(part.holds(timestep) for timestep in steps) / len(steps) for part in self._parts]

    @cached_property
    def _gains(self) -> dict[int, float]:
        """The share of a step's multiply-adds that one compressed layer saves, by ratio."""
        full = self._multiply_adds((), 0)
        return {
            ratio: 1 - self._multiply_adds((KVCompression(OPERATOR, ratio, (0,)),), 0) / full
            for ratio in RATIOS
        }

    def _alone(self, part: SchedulePart, listed: list[Saving], mild: Saving) -> list[Option]:
        """Each of these by itself in a part, nothing first; with its error as it is left at the end."""
        nothing = Option((), 0.0, 1.0)
        if self.settings.steps <= FEW_STEPS or not listed:
            return [nothing]
        mild = replace(mild, part=part)
        error, left = self._error(part, mild), 1.0
        if error > 0:
            ended = self.run("part", replace(self.base, savings=(mild,)))
            left = math.sqrt(max(ended.error**2 - self._base_error**2, 0)) / error
        return [nothing, *(Option((one,), left * self._error(part, one), 1.0) for one in listed)]

    def _error(self, part: SchedulePart, saving: Saving) -> float:
        """What the steps of this part predict with a saving, the root of their squared errors' sum; of the
        prompt with the largest. What is without guidance errs in one direction, so that errors add."""
        sums = []
        for steps in self.recorded:
            run, errors = ForecastRun((saving,)), []
            for seen in steps:
                run.step(seen.timestep, seen.sigma)
                values = run.ask(partial(_answer, seen.values), len(seen.values))
                if part.holds(seen.timestep):
                    guided = values[0] if len(values) == 1 else self._guided(*values)
                    errors.append(relative(guided, seen.guided))
            sums.append(sum(errors) if saving.kind == "unguided" else math.hypot(*errors, 0.0))
        return max(sums)

    def _asked(self, part: SchedulePart, savings: Savings) -> float:
        """The share of the model's answers in this part that are still asked for."""
        steps = self.recorded[0]
        rows = sum(rows for timestep, rows in self._simulated(savings) if part.holds(timestep))
        full = sum(len(seen.values) for seen in steps if part.holds(seen.timestep))
        return rows / full if full else 1.0

    def _simulated(self, savings: Savings) -> list[tuple[float, int]]:
        """What a run asks the model, without the model."""
        run, nothing = ForecastRun(savings), torch.zeros(1)
        for seen in self.recorded[0]:
            run.step(seen.timestep, seen.sigma)
            run.ask(partial(_answer, [nothing] * len(seen.values)), len(seen.values))
        return run.computed

    def _guided(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return negative + self.settings.guidance * (positive - negative)

    def _price(self, kinds: tuple[str, ...], limit: float, low: float, high: float) -> float:
        """The highest price between these two with which no larger error is expected."""
        for _ in range(BISECTIONS):
            price = math.sqrt(low * high)
            if self._choose(price, kinds)[1] <= limit:
                low = price
            else:
                high = price
        return low

    def _choose(self, price: float, kinds: tuple[str, ...]) -> tuple[Choice, float]:
        """What costs the least where all multiply-adds of a run are worth this squared error; and the error
        that is expected of it."""
        chosen, ratios, squares = [], [], 0.0
        for window, options in enumerate(self.windows):
            worth = price * self._weights[window]
            best = min(
                (
                    self._with_layers(option, worth, window, kinds)
                    for option in options
                    if _is_of(option, kinds)
                ),
                key=lambda found: found[0],
            )
            _, option, layers, added = best
            chosen.append(option.savings)
            ratios.append(layers)
            squares += added
        rules = join(self.runs.config.num_layers, ratios) if "kv" in kinds and self.compressed else ()
        return replace(self.base, rules=rules or self.base.rules, savings=_joined(chosen)), math.sqrt(squares)

    def _with_layers(self, option: Option, worth: float, window: int, kinds: tuple[str, ...]):
        """(cost and error, the option, the ratios of layers, squared error) with those layers compressed that
        are worth it."""
        layers, squares, saved = {}, option.error**2, 0.0
        if "kv" in kinds and self.compressed is not None:
            for layer in range(self.runs.config.num_layers):
                gain, ratio, error = max(
                    (worth * option.asked * self._gains[ratio] - errors[layer] ** 2, ratio, errors[layer])
                    for ratio, errors in self.compressed[window].items()
                )
                if gain >= 0 and worth > 0:
                    layers[layer] = ratio
                    squares += error**2
                    saved += self._gains[ratio]
        return squares + worth * option.asked * (1 - saved), option, layers, squares

    def _on(self, below: Choice, above: Choice) -> Choice:
        """One choice on top of another, which has the steps."""
        steps = below.steps
        savings = for_steps(above.savings, self.settings.steps, steps) if steps else above.savings
        return replace(below, rules=above.rules, savings=savings or below.savings)


def _answer(values: list[torch.Tensor], alone: bool) -> list[torch.Tensor]:
    return values[:1] if alone else values


def _is_of(option: Option, kinds: tuple[str, ...]) -> bool:
    return all(("guidance" if one.kind == "unguided" else one.kind) in kinds for one in option.savings)


def _joined(windows: list[Savings]) -> Savings:
    """The savings of a whole run: what goes on in the next part is one."""
    joined: list[Saving] = []
    for savings in windows:
        for saving in savings:
            before = next((one for one in joined if _goes_on(one, saving)), None)
            if before:
                joined.remove(before)
                saving = replace(saving, part=SchedulePart(before.part.start, saving.part.end))
            joined.append(saving)
    return tuple(joined)


def _goes_on(before: Saving, saving: Saving) -> bool:
    return before.part.end == saving.part.start and replace(before, part=saving.part) == saving
