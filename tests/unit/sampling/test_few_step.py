"""Recipes of few-step weights, against diffusers' schedulers and against the formulas of their papers."""

import diffusers
import pytest
import torch

from pixart_sigma.errors import SettingError
from pixart_sigma.noise_schedule import PUBLISHED, NoiseSchedule
from pixart_sigma.recipes import RECIPE_NAMES, parse_recipe
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.few_step import GAMMA
from pixart_sigma.sampling.schedulers import get_timesteps, scheduler_for
from pixart_sigma.settings import Settings

SHAPE = (2, 4, 8, 6)
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


NOISE, IMAGE = (torch.randn(SHAPE, generator=seeded(seed)) for seed in (1, 2))


def predict(latents, timestep):
    """Any function of the latents and the timestep."""
    return torch.sin(2 * latents) * 0.3 + 0.6 * latents * (float(timestep) / 1000) ** 0.5


def run(recipe, noise=NOISE, noise_schedule=PUBLISHED, model=predict, **settings):
    beside = {name: settings.pop(name) for name in ("image_latents", "mask", "callback") if name in settings}
    settings = Settings(recipe=recipe, **settings)
    return denoise(model, noise, settings, noise_schedule=noise_schedule, generator=seeded(), **beside)


def assert_close(actual, expected):
    assert expected.isfinite().all()
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def clean_and_noise(latents, timestep):
    alpha = ALPHAS[timestep]
    noise = predict(latents.float(), timestep).double()
    return (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt(), noise


@pytest.mark.parametrize("recipe", ["phased-4", "phased-2", "four-step", "ddim:999", "ddim:640,0"])
def test_ddim_jumps_from_each_timestep_to_the_next(recipe):
    """x' = sqrt(abar') x0 + sqrt(1 - abar') eps, and x0 at the end."""
    latents, timesteps = NOISE.double(), parse_recipe(recipe).timesteps
    for here, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        clean, noise = clean_and_noise(latents, here)
        alpha = torch.tensor(1.0) if following is None else ALPHAS[following]
        latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    assert_close(run(recipe).double(), latents)


def test_x0_goes_on_with_fresh_noise():
    generator, (first, second) = seeded(), (999, 400)
    clean, _ = clean_and_noise(NOISE.double(), first)
    fresh = torch.randn(SHAPE, generator=generator)
    latents = ALPHAS[second].sqrt() * clean + (1 - ALPHAS[second]).sqrt() * fresh
    assert_close(run("x0:999,400").double(), clean_and_noise(latents, second)[0])


@pytest.mark.parametrize("first", [400, 999])
def test_the_start_is_unit_noise_or_that_of_its_timestep(first):
    seen = []

    def look(latents, timestep):
        seen.append(latents)
        return predict(latents, timestep)

    run(f"x0:{first}", model=look)
    run(f"x0:{first}:sigma", model=look)
    unit, scaled = seen
    assert torch.equal(unit, NOISE)
    sigma = ((1 - ALPHAS[first]) / ALPHAS[first]).sqrt()
    assert_close(scaled.double(), NOISE * sigma / (1 + sigma**2).sqrt())


SCHEDULES = {
    "published": {},
    "v-prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
PUBLISHED_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "recipe, scheduler, named",
    [
        ("lcm-4", diffusers.LCMScheduler, {}),
        ("tcd-4", diffusers.TCDScheduler, {"eta": GAMMA}),
        ("tcd-8", diffusers.TCDScheduler, {"eta": GAMMA}),
        ("ddim:999,749,499,249", diffusers.DDIMScheduler, {}),
    ],
    ids=str,
)
def test_every_noise_schedule_equals_diffusers_scheduler(kind, recipe, scheduler, named):
    words = PUBLISHED_BETAS | SCHEDULES[kind]
    reference = scheduler(**words, timestep_spacing="trailing")
    if hasattr(reference.config, "clip_sample"):
        reference.register_to_config(clip_sample=False)
    timesteps = parse_recipe(recipe).timesteps
    reference.set_timesteps(len(timesteps))
    assert tuple(reference.timesteps.tolist()) == timesteps
    latents, generator = NOISE, seeded()
    for timestep in reference.timesteps:
        predicted = predict(latents, timestep)
        latents = reference.step(predicted, timestep, latents, generator=generator, **named).prev_sample
    assert_close(run(recipe, noise_schedule=NoiseSchedule(**words)), latents)


def test_steps_that_lie_elsewhere_by_the_checkpoints_word_are_the_recipes_here():
    spaced = NoiseSchedule(sigma_spacing="karras", timestep_spacing="trailing", final_sigmas_type="sigma_min")
    assert torch.equal(run("phased-4", noise_schedule=spaced), run("phased-4"))
    flow = NoiseSchedule(prediction_type="flow_prediction")
    with pytest.raises(SettingError, match="recipe is phased-4; the checkpoint has .*flow_prediction"):
        run("phased-4", noise_schedule=flow)


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_step_is_one_forward_and_says_what_it_was(recipe):
    timesteps, calls, steps = parse_recipe(recipe).timesteps, [], []

    def count(latents, timestep):
        calls.append(int(timestep))
        return predict(latents, timestep)

    made = run(recipe, model=count, callback=steps.append)
    assert tuple(calls) == timesteps == tuple(int(step.timestep) for step in steps)
    assert [step.count for step in steps] == [len(timesteps)] * len(timesteps)
    assert torch.equal(steps[-1].latents, made) and made.isfinite().all()


@pytest.mark.parametrize("recipe", ["phased-4", "lcm-4", "tcd-4", "x0:999,749,500,250:sigma"])
def test_a_picture_is_noised_to_the_first_timestep_that_is_left(recipe):
    seen = []

    def look(latents, timestep):
        seen.append((latents, int(timestep)))
        return predict(latents, timestep)

    run(recipe, model=look, image_latents=IMAGE, strength=0.5)
    (first, timestep), (_, last) = seen
    assert (timestep, last) == parse_recipe(recipe).timesteps[2:]
    alpha = ALPHAS[timestep]
    assert_close(first.double(), alpha.sqrt() * IMAGE + (1 - alpha).sqrt() * NOISE)
    settings = Settings(recipe=recipe, strength=0.3)
    assert get_timesteps(scheduler_for(settings), settings).tolist() == [last]


@pytest.mark.parametrize("recipe", ["one-step", "phased-4", "lcm-2", "tcd-4"])
def test_a_white_mask_is_none_and_a_black_one_keeps_everything(recipe):
    white, black = torch.ones(1, 1, *SHAPE[2:]), torch.zeros(1, 1, *SHAPE[2:])
    assert torch.equal(run(recipe, image_latents=IMAGE, mask=white), run(recipe, image_latents=IMAGE))
    assert torch.equal(run(recipe, image_latents=IMAGE, mask=black), IMAGE)
