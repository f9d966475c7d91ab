"""Which layers, ratios and steps of a checkpoint bear KV compression without trained weights, by measurement.

At a few points of uncompressed runs each layer is compressed by itself, and the picture that the step then
predicts is compared with the uncompressed one: after guidance, which multiplies errors. What remains of such
an error at the end differs from part to part of a run, so each part is measured once by whole runs, with one
layer compressed. The errors are nearly independent, so that their squares add: of all choices with the same
sum, the one that saves most is the one in which every further layer costs the same per multiply-add saved.
The largest such choice is taken with which all whole runs end within the budget.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable

import torch

from ..errors import SigmaError
from ..setting_checks import LAST_TIMESTEP
from ..transformer.calibration import RATIOS, WINDOWS
from ..transformer.config import TransformerConfig
from ..transformer.cost import multiply_adds
from ..transformer.kv_rules import KVCompression

Progress = Callable[[int, int], None]

# The one for weights that were not trained with compression.
OPERATOR = "mean"
# Of choices that whole runs are made with; each comes several times nearer to the budget.
SEARCHES = 6
PROMPT_TOKENS = 300


class Calibrator:
    """Collects points of uncompressed runs and measures: `start` a run, `see` its steps, `finish` it; then
    `measure` the layers and `choose` among them.
    """

    def __init__(self, config: TransformerConfig, height: int, width: int, budget: float):
        """height, width: of the pictures, in pixels. budget: the relative L2 error that is allowed."""
        if not 0 < budget < 1:
            raise SigmaError(f"The error budget is {budget}; give a share between 0 and 1, such as 0.05.")
        self.config, self.height, self.width = config, height, width
        self.budget = budget
        self.points: list[tuple[int, Callable, torch.Tensor]] = []
        self.finished = 0  # how many of them are of earlier runs
        self.nearest: dict[int, float] = {}  # of this run: the timestep in each window
        self.ended: list[torch.Tensor] = []
        self.steps = 0  # of all runs
        self.at_the_end: list[
            dict[int, list[float]]
        ] = []  # of each window the errors[ratio][layer], once chosen

    def start(self) -> None:
        """Call it before each run."""
        self.finished, self.nearest = len(self.points), {}

    def see(self, timestep: float, predicted: torch.Tensor, predict: Callable) -> None:
        """Offer one step: the clean latents it predicted uncompressed, and `predict(rules)` to repeat it.

        Of each window the steps of the timestep nearest to its middle are kept.
        """
        self.steps += 1
        progress = 1 - min(timestep, LAST_TIMESTEP) / LAST_TIMESTEP
        window = min(int(progress * WINDOWS), WINDOWS - 1)
        nearest = self.nearest.get(window)
        middle = LAST_TIMESTEP * (1 - (window + 0.5) / WINDOWS)
        if nearest is not None and timestep != nearest:
            if abs(timestep - middle) >= abs(nearest - middle):
                return
            this_run = self.points[self.finished :]
            self.points[self.finished :] = [point for point in this_run if point[0] != window]
        self.nearest[window] = timestep
        self.points.append((window, predict, predicted.float()))

    def finish(self, latents: torch.Tensor) -> None:
        """Call it after each run, with the clean latents it ended with."""
        self.ended.append(latents.float())

    @property
    def total(self) -> int:
        """How many steps `measure` and `choose` repeat at most."""
        return len(self.points) * self.config.num_layers * len(RATIOS) + (WINDOWS + SEARCHES) * self.steps

    def measure(self, on_progress: Progress = lambda done, total: None) -> dict[int, list[list[float]]]:
        """errors[ratio][layer][window] of each layer by itself; infinite where no step was seen.

        `on_progress(done, total)` counts steps that were repeated, of `total`.
        """
        if not self.points:
            raise SigmaError("No step was run, so there is nothing to measure.")
        done = 0

        def error_in(window, rules) -> float:
            nonlocal done
            found = []
            for _, predict, predicted in (point for point in self.points if point[0] == window):
                found.append(relative(predict(rules).float(), predicted))
                done += 1
                on_progress(done, self.total)
            return sum(found) / len(found) if found else math.inf

        return {
            ratio: [
                [error_in(window, self._rules({layer: ratio})) for window in range(WINDOWS)]
                for layer in range(self.config.num_layers)
            ]
            for ratio in RATIOS
        }

    def choose(
        self,
        errors: dict[int, list[list[float]]],
        run: Callable[[int, tuple[KVCompression, ...]], torch.Tensor],
        on_progress: Progress = lambda done, total: None,
    ) -> tuple[tuple[KVCompression, ...], float]:
        """The rules and their error, from the `errors` of `measure`.

        `run(index, rules)` repeats a whole run, counted from 0, and returns the latents it ends with.
        `on_progress` goes on from where it was in `measure`.
        """
        done = self.total - (WINDOWS + SEARCHES) * self.steps

        def error_of(rules: tuple[KVCompression, ...]) -> float:
            nonlocal done
            found = []
            for index, latents in enumerate(self.ended):
                found.append(relative(run(index, rules).float(), latents))
                done += self.steps // len(self.ended)
                on_progress(done, self.total)
            return max(found)

        windows = [
            self._at_the_end(
                window, {ratio: [layer[window] for layer in errors[ratio]] for ratio in RATIOS}, error_of
            )
            for window in range(WINDOWS)
        ]
        self.at_the_end = windows
        found = self.search(error_of)
        on_progress(self.total, self.total)
        return found

    def _at_the_end(self, window: int, alone: dict[int, list[float]], error_of) -> dict[int, list[float]]:
        """The errors of the layers in a window, as large as they are at the end of a run.

        Measured with the layer that errs least, lightly compressed, and taken to be in proportion for others.
        """
        lightly = alone[RATIOS[0]]
        layer = min(range(len(lightly)), key=lightly.__getitem__)
        if not 0 < lightly[layer] < math.inf:
            return alone
        only = [{layer: RATIOS[0]} if other == window else {} for other in range(WINDOWS)]
        times = error_of(join(self.config.num_layers, only)) / lightly[layer]
        return {ratio: [times * error for error in layers] for ratio, layers in alone.items()}

    def search(
        self,
        error_of: Callable[[tuple[KVCompression, ...]], float],
        already: float = 0.0,
        searches: int = SEARCHES,
    ) -> tuple[tuple[KVCompression, ...], float]:
        """The largest choice, in each window a ratio for some layers, whose error is within the budget, and
        that error; after `choose`.

        error_of(rules): of whole runs. already: what other savings in those runs take of the budget.
        """
        windows, room = self.at_the_end, math.sqrt(max(self.budget**2 - already**2, 0.0))
        prices = sorted(set().union(*map(self._prices, windows)))

        def choose(price):
            return [self._choose(alone, price) for alone in windows]

        def expected(chosen) -> float:
            return math.hypot(
                *(
                    alone[ratio][layer]
                    for alone, ratios in zip(windows, chosen, strict=True)
                    for layer, ratio in ratios.items()
                )
            )

        within: tuple[KVCompression, ...] = ()
        error, limit = already, room
        low, high = 0, len(prices) + 1  # so many prices are within the budget, and so many are not
        for _ in range(searches):
            if high - low < 2:
                break
            affordable = bisect.bisect_right(prices, limit, key=lambda price: expected(choose(price)))
            affordable = min(max(affordable, low + 1), high - 1)
            chosen = choose(prices[affordable - 1])
            rules = join(self.config.num_layers, chosen)
            measured = error_of(rules)
            if measured <= self.budget:
                low, within, error = affordable, rules, measured
            else:
                high = affordable
            # The expectation was too high or too low by this much, and will be again nearby.
            added = math.sqrt(max(measured**2 - already**2, 0.0))
            limit = expected(chosen) * room / added if added else math.inf
        return within, error

    def saved(self, rules: tuple[KVCompression, ...]) -> float:
        """The share of multiply-adds that the rules save over the whole schedule."""
        middles = [LAST_TIMESTEP * (1 - (window + 0.5) / WINDOWS) for window in range(WINDOWS)]
        count = [self._count(rules, timestep) for timestep in middles]
        return 1 - sum(count) / (WINDOWS * self._count((), 0))

    def _count(self, rules, timestep: float) -> int:
        return multiply_adds(self.config, self.height, self.width, PROMPT_TOKENS, rules, timestep)

    def _gain(self, ratio: int) -> int:
        """Multiply-adds that one layer saves."""
        return self._count((), 0) - self._count(self._rules({0: ratio}), 0)

    def _rules(self, ratios: dict[int, int]) -> tuple[KVCompression, ...]:
        """The rules that compress each of these layers by its ratio."""
        named = {ratio: tuple(layer for layer in ratios if ratios[layer] == ratio) for ratio in RATIOS}
        return tuple(KVCompression(OPERATOR, ratio, named[ratio]) for ratio in RATIOS if named[ratio])

    def _prices(self, alone: dict[int, list[float]]) -> set[float]:
        """The squared errors per multiply-add at which some layer takes a further ratio."""
        prices = set()
        for layer in range(self.config.num_layers):
            steps = [(0, 0.0), *((self._gain(ratio), alone[ratio][layer] ** 2) for ratio in RATIOS)]
            for (gain, error), (further, worse) in itertools.combinations(steps, 2):
                if worse < math.inf:
                    prices.add(max(0.0, worse - error) / (further - gain))
        return prices

    def _choose(self, alone: dict[int, list[float]], price: float) -> dict[int, int]:
        """The ratio that saves most where a multiply-add may cost `price`, for each layer that has one."""
        price *= 1 + 1e-9  # rounding must not decide whether a layer is worth its own price

        def worth(layer, ratio):
            return price * self._gain(ratio) - alone[ratio][layer] ** 2

        best = {
            layer: max(RATIOS, key=functools.partial(worth, layer)) for layer in range(self.config.num_layers)
        }
        return {layer: ratio for layer, ratio in best.items() if worth(layer, ratio) >= 0}


def join(num_layers: int, chosen: list[dict[int, int]]) -> tuple[KVCompression, ...]:
    """The rules of the whole run, from the ratios of layers chosen in each window."""
    layers: dict[tuple[int, int, int], list[int]] = {}
    for layer in range(num_layers):
        window = 0
        for ratio, stretch in itertools.groupby(ratios.get(layer) for ratios in chosen):
            end = window + len(list(stretch))
            if ratio is not None:
                layers.setdefault((ratio, window, end), []).append(layer)
            window = end
    return tuple(
        KVCompression(OPERATOR, ratio, tuple(named), start / WINDOWS, end / WINDOWS)
        for (ratio, start, end), named in sorted(layers.items())
    )


def relative(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """The relative L2 error."""
    return float((latents - reference).norm() / reference.norm())
