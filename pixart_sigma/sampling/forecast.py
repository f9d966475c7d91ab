"""Steps that are forecast from those before: the model is asked at some calls of a run, and at the others its
answer is continued from the last ones.

What is forecast are clean latents, as the model predicts them, over the logarithm of the noise level. Unlike
the predicted noise they change little where a sampler adds fresh noise, so one forecast serves every sampler.
What another prompt adds to them is the same for all fresh noise; it is forecast as noise, which goes
straighter. Related: TaylorSeer (arXiv 2503.06923) continues features in the same way.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..speed import ORDERS, Saving, Savings, acting

Compute = Callable[[bool], Sequence[torch.Tensor]]
# Noise levels beyond these are as good as pure noise and as none.
LEAST_SIGMA, MOST_SIGMA = 1e-4, 1e3
# Logarithms of noise levels that are nearer are one: some samplers come to a level on two ways.
NEAR = 1e-3


class History:
    """The last computed values of something that changes smoothly with the noise level."""

    def __init__(self):
        self.points: list[tuple[float, torch.Tensor]] = []

    def add(self, position: float, value: torch.Tensor) -> None:
        """A computed value. It takes the place of those at the same position and beyond: a run that goes back
        towards noise begins anew there."""
        before = [point for point in self.points if point[0] < position - NEAR]
        self.points = [*before[1 - len(ORDERS) :], (position, value)]

    def reaches(self, order: int, position: float = math.inf) -> bool:
        """Whether there are enough values for a forecast of this order, and `position` is not before them."""
        return len(self.points) > order and position >= self.points[-order - 1][0] - NEAR

    def is_near(self, position: float, order: int, skipped: int) -> bool:
        """Whether a forecast for `position` goes at most twice as far as `skipped` steps that are as long as
        the shortest one between its values. Beyond, it is mostly by what those are wrong."""
        places = [place for place, _ in self.points[-order - 1 :]]
        shortest = min((after - before for before, after in pairwise(places)), default=math.inf)
        return position - places[-1] <= 2 * skipped * shortest

    def at(self, position: float, order: int) -> torch.Tensor:
        """The value at a position of the polynomial through the last order + 1 ones (Lagrange's form)."""
        points = self.points[-(order + 1) :]
        total = torch.zeros_like(points[-1][1])
        for index, (place, value) in enumerate(points):
            others = (other for number, (other, _) in enumerate(points) if number != index)
            total += math.prod((position - other) / (place - other) for other in others) * value
        return total


@dataclass
class _Past:
    """What one caller was answered: the first clean latents, and by what noise the others differed.

    about: of what the answers were, that these can be told from answers of something else.
    """

    about: Hashable
    first: History
    differences: list[History]


class ForecastRun:
    """What is computed and what is forecast in one run; make another for each. See `speed` for the rules.

    computed: of each time that the model was asked, the timestep and how many prompts it was asked for.
    """

    def __init__(self, savings: Savings):
        self.savings = savings
        self.computed: list[tuple[float, int]] = []
        self._pasts: dict[Hashable, _Past] = {}
        self._timestep, self._sigma, self._position = 0.0, 1.0, -math.inf
        # Whether this step's noise level is that of the step before, and whether one's ever was.
        self._again = self._repeats = False
        # How many steps in a row were forecasts, and had the first prompt alone. The first caller of a step
        # decides for all of them.
        self._forecasts = self._reuses = 0
        self._decided = False

    def step(self, timestep: float, sigma: float) -> None:
        """Call it before each step: its timestep (0 to 999) and its noise level, noise to signal."""
        sigma = min(max(sigma, LEAST_SIGMA), MOST_SIGMA)
        position = -math.log(sigma)
        if position < self._position - NEAR:  # another run through the schedule begins
            self._forecasts = self._reuses = 0
        self._again = abs(position - self._position) <= NEAR
        self._repeats |= self._again
        self._timestep, self._sigma, self._position = timestep, sigma, position
        self._decided = False

    def ask(
        self, compute: Compute, count: int, caller: Hashable = 0, about: Hashable = None
    ) -> list[torch.Tensor]:
        """The clean latents (B, 4, h, w) for `count` prompts, that to draw first, computed or forecast.

        compute(alone): asks the model for all of them, or for the first alone. caller: who asks, where
        several do in one step; each has its own past, and those after the first do as it does where they
        can. about: what is asked; where it is not what this caller asked before, or the count is another,
        the past is forgotten.
        """
        past = self._pasts.get(caller)
        if past is None or past.about != (count, about):
            differences = [History() for _ in range(count - 1)]
            past = self._pasts[caller] = _Past((count, about), History(), differences)
        leads, self._decided = not self._decided, True
        values = self._forecast(past, leads)
        if leads:
            self._forecasts = 0 if values is None else self._forecasts + 1
        if values is not None:
            return values
        alone = self._is_alone(past, leads)
        if leads:
            self._reuses = self._reuses + 1 if alone else 0
        return self._compute(past, compute, alone)

    def _forecast(self, past: _Past, leads: bool) -> list[torch.Tensor] | None:
        """None where nothing is to be forecast, too little is known, or what comes of it is not finite."""
        saving = acting(self.savings, "forecast", self._timestep)
        if saving is None or not past.first.reaches(saving.order, self._position):
            return None
        if not self._is_due(saving) if leads else self._forecasts == 0:
            return None
        if not past.first.is_near(self._position, saving.order, saving.skipped):
            return None
        first = past.first.at(self._position, saving.order)
        values = [first, *(first + self._difference(known, saving.order) for known in past.differences)]
        return values if all(value.isfinite().all() for value in values) else None

    def _is_due(self, saving: Saving) -> bool:
        """Whether the first caller of this step may have a forecast. Of a sampler that asks twice at a noise
        level it is the second time: there it is the nearest."""
        return self._forecasts < saving.skipped and (self._again or not self._repeats)

    def _is_alone(self, past: _Past, leads: bool) -> bool:
        """Whether the model is asked for the first prompt alone."""
        if not past.differences or self._unguided:
            return bool(past.differences)
        saving = acting(self.savings, "guidance", self._timestep)
        if saving is None or (self._reuses >= saving.skipped if leads else self._reuses == 0):
            return False
        return all(known.reaches(saving.order, self._position) for known in past.differences)

    def _compute(self, past: _Past, compute: Compute, alone: bool) -> list[torch.Tensor]:
        first, *others = compute(alone)
        past.first.add(self._position, first)
        self.computed.append((self._timestep, 1 + len(others)))
        if alone:
            saving = acting(self.savings, "guidance", self._timestep)
            order = saving.order if saving else 0
            return [first, *(first + self._difference(known, order) for known in past.differences)]
        for known, other in zip(past.differences, others, strict=True):
            known.add(self._position, (first - other) / self._sigma)
        return [first, *others]

    @property
    def _unguided(self) -> bool:
        return acting(self.savings, "unguided", self._timestep) is not None

    def _difference(self, known: History, order: int) -> torch.Tensor | float:
        """What another prompt adds to the first one's answer; nothing where it is not to act."""
        if self._unguided or not known.points:
            return 0.0
        return -self._sigma * known.at(self._position, min(order, len(known.points) - 1))
