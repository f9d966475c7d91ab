"""Steps that are forecast: exact for what is a polynomial, computed where too little is known."""

import math

import pytest
import torch

from pixart_sigma.choices import SCHEDULERS
from pixart_sigma.noise_schedule import NoiseSchedule
from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.forecast import ForecastRun, History
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.sampling.predictions import noise_level, predict_clean, predict_output
from pixart_sigma.sampling.schedulers import make_scheduler
from pixart_sigma.settings import Settings
from pixart_sigma.speed import parse
from pixart_sigma.transformer.loading import load_transformer

SIGMAS = [157.0, 80.0, 30.0, 12.0, 5.0, 2.2, 1.0, 0.4, 0.15, 0.05]
TIMESTEPS = [999, 950, 870, 760, 630, 500, 380, 250, 130, 50]


def line(position):
    """Of clean latents over the logarithm of the noise level."""
    return torch.tensor([[1.0 + 2 * position, -position]])


def walk(savings, first=line, difference=lambda position: torch.full((1, 2), 0.5), count=2, steps=10):
    """What a run answers at each step, and what the model was asked: None, "all" or "alone"."""
    run, answers, asked = ForecastRun(parse(savings)), [], []
    for sigma, timestep in list(zip(SIGMAS, TIMESTEPS, strict=True))[:steps]:
        position = -math.log(sigma)
        asked.append(None)

        def compute(alone, position=position, sigma=sigma):
            asked[-1] = "alone" if alone else "all"
            others = [first(position) - sigma * difference(position)] * (count - 1)
            return [first(position), *([] if alone else others)]

        run.step(timestep, sigma)
        answers.append(run.ask(compute, count))
    return answers, asked, run


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_is_continued_exactly(order):
    def polynomial(position):
        return torch.tensor([3.0, -1.0, 0.5][: order + 1]) @ torch.tensor(
            [position**k for k in range(order + 1)]
        )

    history = History()
    for position in (-4.0, -3.0, -1.5):
        assert history.reaches(order) == (len(history.points) > order)
        history.add(position, polynomial(position))
    assert history.at(0.5, order) == pytest.approx(float(polynomial(0.5)), rel=1e-5)


def test_a_second_value_at_one_place_replaces_the_first_and_going_back_begins_anew():
    history = History()
    for position, value in ((1.0, 1.0), (2.0, 2.0), (2.0, 5.0)):
        history.add(position, torch.tensor(value))
    assert float(history.at(3.0, 1)) == 9.0  # the line through 1 and 5
    history.add(0.0, torch.tensor(7.0))
    assert not history.reaches(1) and float(history.at(3.0, 0)) == 7.0


def test_what_is_forecast_is_not_asked_for_and_is_right_on_a_line():
    answers, asked, run = walk("forecast:1:1")
    assert asked == ["all", "all", None, "all", None, "all", None, "all", None, "all"]
    for sigma, (positive, negative) in zip(SIGMAS, answers, strict=True):
        torch.testing.assert_close(positive, line(-math.log(sigma)))
        torch.testing.assert_close(negative, positive - 0.5 * sigma)
    assert run.computed == [(TIMESTEPS[k], 2) for k in (0, 1, 3, 5, 7, 9)]


@pytest.mark.parametrize(
    ("savings", "pattern"),
    [
        ("forecast:0:1", "C.C.C.C.C."),
        ("forecast:0:3", "C...C...C."),
        ("forecast:2:1", "CCC.C.C.C."),
        ("forecast:1:20", "CC........"),
        ("forecast:1:1:50-95%", "CCCCCC.C.C"),
        ("guidance:0:1", "CaCaCaCaCa"),
        ("guidance:1:1", "CCaCaCaCaC"),
        ("guidance:0:3", "CaaaCaaaCa"),
        ("unguided:50-100%", "CCCCCCaaaa"),
        ("forecast:0:1+guidance:0:1", "C.a.C.a.C."),
        ("off", "CCCCCCCCCC"),
    ],
)
def test_the_pattern(savings, pattern):
    _, asked, _ = walk(savings)
    letters = {None: ".", "all": "C", "alone": "a"}
    assert "".join(letters[one] for one in asked) == pattern


def test_unguided_has_nothing_of_the_negative_prompt():
    answers, _, _ = walk("unguided:50-100%")
    assert all(torch.equal(*values) for values in answers[6:])
    assert not any(torch.equal(*values) for values in answers[:6])


def test_without_a_negative_prompt_only_steps_are_forecast():
    answers, asked, run = walk("forecast:1:1+guidance:0:1+unguided", count=1)
    assert [len(values) for values in answers] == [1] * 10
    assert asked.count(None) == 4 and {rows for _, rows in run.computed} == {1}


def test_a_forecast_that_is_not_finite_is_computed_instead():
    def breaks(position):
        return line(position) * (
            math.nan if 2.45 < -position < 2.5 else 1.0
        )  # at sigma 12, which is computed

    answers, asked, _ = walk("forecast:1:1", first=breaks)
    assert not answers[3][0].isfinite().all()
    assert asked[3:6] == ["all", "all", "all"]  # in place of a forecast from it at the next
    assert all(values[0].isfinite().all() for values in answers[4:])


def test_each_caller_has_its_own_past():
    run = ForecastRun(parse("forecast:0:1"))
    for step, (sigma, timestep) in enumerate(zip(SIGMAS, TIMESTEPS, strict=True)):
        run.step(timestep, sigma)
        (main,) = run.ask(lambda alone, step=step: [torch.tensor(float(step))], 1, "main")
        (other,) = run.ask(lambda alone, step=step: [torch.tensor(100.0 + step)], 1, "other")
        assert float(main) == step - step % 2 and float(other) == 100 + step - step % 2


def test_going_back_towards_noise_forecasts_nothing_from_before():
    run, asked = ForecastRun(parse("forecast:0:3")), []
    for sigma in (10.0, 5.0, 2.0, 20.0, 10.0):
        run.step(500, sigma)
        run.ask(lambda alone, sigma=sigma: asked.append(sigma) or [torch.tensor(sigma)], 1)
    assert asked == [10.0, 20.0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_what_a_model_would_have_predicted(prediction):
    flow = prediction == "flow_prediction"
    scheduler = make_scheduler("dpmpp_2m", NoiseSchedule(prediction_type=prediction))
    scaled, predicted = torch.randn(
        2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for timestep in (1, 400, 650.5, 999):
        clean = predict_clean(scheduler, scaled, predicted, timestep)
        torch.testing.assert_close(predict_output(scheduler, scaled, clean, timestep), predicted)
        sigma = noise_level(scheduler, timestep)
        assert sigma == pytest.approx(timestep / (1000 - timestep)) if flow else 0 < sigma < 160


@pytest.fixture(scope="module")
def small(transformer_folder):
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, 6, 64, generator=generator)
    negative = torch.randn(1, 3, 64, generator=generator)
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    return load_transformer(transformer_folder), Prompts(embeds, negative_embeds=negative), noise


def run(small, **named):
    transformer, prompts, noise = small
    rows = []

    def counted(latents, *arguments, **options):
        rows.append(len(latents))
        return transformer(latents, *arguments, **options)

    settings = Settings(steps=12, **named)
    generator = torch.Generator().manual_seed(5)
    return denoise(guide(counted, prompts, settings), noise, settings, generator=generator), rows


def test_off_is_exactly_off(small):
    assert torch.equal(run(small, speed="off")[0], run(small)[0])


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name not in ("lcm", "one_step")])
def test_every_scheduler_bears_forecasts(small, scheduler):
    """Also those that add fresh noise, whose predicted noise cannot be forecast."""
    full, rows = run(small, scheduler=scheduler)
    fast, fewer = run(small, scheduler=scheduler, speed="forecast:1:1")
    assert sum(fewer) < 0.65 * sum(rows)
    # Forecasts of the predicted noise would be off by more than the latents where noise is added.
    allowed = 0.35 if scheduler in ("sa_solver", "euler_ancestral") else 0.1
    assert (fast - full).norm() / full.norm() < allowed


def test_guidance_is_forecast_with_half_of_the_rows(small):
    full, _ = run(small)
    fast, rows = run(small, speed="guidance:1:1")
    assert rows == [4, 4, 2, 4, 2, 4, 2, 4, 2, 4, 2, 4]
    assert 0 < (fast - full).norm() / full.norm() < 0.1
    alone, rows = run(small, speed="unguided")
    torch.testing.assert_close(alone, run(small, guidance_scale=1.0)[0], rtol=1e-4, atol=1e-3)
    assert rows == [2] * 12


def test_two_runs_have_nothing_of_each_other(small):
    first = run(small, speed="forecast:2:2+guidance:1:1")[0]
    run(small, speed="forecast:0:3", guidance_scale=9.0)
    assert torch.equal(run(small, speed="forecast:2:2+guidance:1:1")[0], first)
