"""Several callers in a step of a run, and what none of them is forecast across."""

import math

import torch

from pixart_sigma.sampling.forecast import ForecastRun
from pixart_sigma.speed import parse

SLOPES = {"guided": 1.0, "perturbed": 2.0}


def answers(caller: str, sigma: float) -> list[torch.Tensor]:
    """Of a prompt and its negative one: clean latents, and noise between the two, that go straight over the
    logarithm of the noise level."""
    ones = torch.ones(1, 4, 2, 2)
    clean = SLOPES[caller] * math.log(sigma) * ones
    return [clean, clean - sigma * math.log(sigma) * ones]


class Run:
    """Steps through falling noise levels, and which callers were computed in each."""

    def __init__(self, setting: str):
        self.run = ForecastRun(parse(setting))
        self.sigma = 2.0

    def step(self, **asked) -> list[str]:
        """By caller: what it asks about, for a prompt and its negative one where that ends in "+"."""
        self.sigma /= 2
        self.run.step(500, self.sigma)
        computed = []
        for caller, about in asked.items():
            values = answers(caller, self.sigma)
            count = 2 if about.endswith("+") else 1

            def compute(alone, caller=caller, values=values, count=count):
                computed.append(f"{caller} alone" if alone else caller)
                return values[: 1 if alone else count]

            answer = self.run.ask(compute, count, caller, about)
            assert len(answer) == count
            assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(answer, values, strict=False)), caller
        return computed


def test_all_callers_of_a_step_do_what_the_first_one_does():
    run = Run("forecast:1:1")
    steps = [run.step(guided="a+", perturbed="a") for _ in range(6)]
    both = ["guided", "perturbed"]
    assert steps == [both, both, [], both, [], both]


def test_a_caller_that_comes_later_is_computed_until_enough_is_known():
    run = Run("forecast:1:1")
    steps = [run.step(guided="a") for _ in range(2)]
    steps += [run.step(guided="a", perturbed="a") for _ in range(4)]
    one, both = ["guided"], ["guided", "perturbed"]
    assert steps == [one, one, ["perturbed"], both, [], both]


def test_whoever_asks_first_in_a_step_decides_where_others_stay_away():
    run = Run("forecast:1:1")
    for _ in range(3):
        run.step(guided="a", perturbed="a")
    steps = [run.step(perturbed="a") for _ in range(4)]
    assert steps == [["perturbed"], [], ["perturbed"], []]


def test_nothing_is_forecast_across_a_change():
    run = Run("forecast:1:1")
    steps = [run.step(guided=about) for about in ("a", "a", "a", "b", "b", "b", "a")]
    assert steps == [["guided"], ["guided"], [], ["guided"], ["guided"], [], ["guided"]]


def test_a_prompt_that_comes_or_goes_is_a_change():
    run = Run("guidance:1:3")
    steps = [run.step(guided=about) for about in ("a", "a+", "a+", "a+", "a", "a+")]
    assert steps == [["guided"]] * 3 + [["guided alone"]] + [["guided"]] * 2


def computed_at(*sigmas: float, setting="forecast:1:1") -> list[float]:
    run, computed = ForecastRun(parse(setting)), []
    for sigma in sigmas:
        run.step(500, sigma)
        run.ask(lambda alone, sigma=sigma: computed.append(sigma) or answers("guided", sigma)[:1], 1)
    return computed


def test_what_is_known_close_together_is_not_continued_far():
    assert computed_at(8.0, 7.9, 4.0, 2.0) == [8.0, 7.9, 4.0]
    assert computed_at(8.0, 4.0, 2.0, 1.0) == [8.0, 4.0, 1.0]


def test_of_two_calls_at_a_noise_level_the_second_is_forecast():
    """In whatever order they were met, and where they differ by rounding."""
    levels = 8.0, 4.0, 4.00001, 2.0, 1.99999, 1.0, 1.0
    assert computed_at(*levels) == computed_at(*levels, setting="forecast:1:3") == [8.0, 4.0, 2.0, 1.0]
    assert computed_at(16.0, *levels) == [16.0, 8.0, 4.00001, 2.0, 1.0]


def test_a_step_back_is_forecast_from_both_sides_and_not_from_beyond():
    assert computed_at(8.0, 4.0, 2.0, 1.0, 3.0) == [8.0, 4.0, 1.0]
    assert computed_at(8.0, 4.0, 2.0, 1.0, 6.0, 4.0) == [8.0, 4.0, 1.0, 6.0]
