"""Recipes of few-step weights as the host's SIGMAS and SAMPLER."""

import math

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import torch
from tqdm.auto import trange

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.noise_schedule import PUBLISHED
from ...pixart_sigma.recipes import FewStepRecipe, check_recipe, parse_recipe


def recipe_sigmas(model, spelling: str, denoise: float = 1.0) -> torch.Tensor:
    """Noise levels (steps + 1,) of a recipe's timesteps; the last is 0. With denoise < 1 they are the last
    int(steps * denoise) of them; with 0 there are none.

    Raises SigmaError for a recipe that there is not or that the MODEL's noise schedule cannot run, and for a
    denoise that leaves no step.
    """
    recipe = check_recipe(spelling, getattr(model.model, "noise_schedule", PUBLISHED))
    levels = _levels(model.get_model_object("model_sampling"))
    if denoise <= 0:
        return torch.zeros(0)
    timesteps = recipe.last(denoise)
    if not timesteps:
        count = len(recipe.timesteps)
        raise SigmaError(
            f"denoise is {denoise:g}; of the {count} steps of {spelling} it leaves none. Raise it."
        )
    return torch.cat([levels.sigma(torch.tensor(timesteps)).float().cpu(), torch.zeros(1)])


def recipe_sampler(spelling: str) -> "RecipeSampler":
    """The SAMPLER of a recipe. Raises SettingError for what is none."""
    return RecipeSampler(parse_recipe(spelling))


class RecipeSampler(comfy.samplers.KSAMPLER):
    """The host's k-diffusion sampler with a recipe's steps, and noise to start from as the recipe has it."""

    def __init__(self, recipe: FewStepRecipe):
        super().__init__(sample_few_step, {"update": recipe.update})
        self.recipe = recipe

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        """As KSAMPLER.sample; model_wrap is the guider. Raises SigmaError where that guides."""
        cfg = getattr(model_wrap, "cfg", 1.0)
        if cfg != 1:
            raise SigmaError(
                f"cfg is {cfg:g}, and a few-step recipe is for weights that were distilled without guidance. "
                "Set cfg to 1."
            )
        if latent_image is None or not latent_image.any():
            noise = noise * self._start(float(sigmas[0]), self.max_denoise(model_wrap, sigmas))
        given = sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
        samples = super().sample(model_wrap, *given)
        if denoise_mask is None or sigmas[-1] > 0:
            return samples
        # What tcd ends at still has a little noise.
        return torch.where(denoise_mask == 0, latent_image.to(samples), samples)

    def _start(self, sigma: float, max_denoise: bool) -> float:
        """What to scale noise by: the host makes it sigma, or at its highest level sqrt(1 + sigma^2), times
        as large, and what the network sees is sqrt(1 + sigma^2) times smaller."""
        unit = math.sqrt(1 + sigma**2)
        wanted = unit if self.recipe.start == "unit" else sigma
        return wanted / (unit if max_denoise else sigma)


@torch.no_grad()
def sample_few_step(
    model, x, sigmas, extra_args=None, callback=None, disable=None, update="ddim", noise_sampler=None
):
    """The finished latents of `x` (B, 4, h, w), as the host's sampler functions are called; `update` is a
    recipe's. Raises SigmaError for a model without noise levels of 1000 timesteps."""
    from ...pixart_sigma.sampling.few_step import Level, take_step

    levels = _levels(model.inner_model.model_patcher.get_model_object("model_sampling"))
    extra_args = extra_args or {}
    if noise_sampler is None:
        noise_sampler = comfy.k_diffusion.sampling.default_noise_sampler(x, seed=extra_args.get("seed"))

    def level_of(sigma: torch.Tensor) -> Level:
        return Level(float(levels.timestep(sigma)), 1 / (1 + float(sigma) ** 2))

    def level(timestep: float) -> Level:
        return Level(timestep, 1 / (1 + float(levels.sigma(torch.tensor(timestep)).double()) ** 2))

    ones = x.new_ones([len(x)])
    for index in trange(len(sigmas) - 1, disable=disable):
        sigma, following = sigmas[index], sigmas[index + 1]
        clean = model(x, sigma * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": clean})
        here, end = level_of(sigma), not following > 0
        x = take_step(
            update,
            x * math.sqrt(here.alpha_bar),
            clean,
            here,
            None if end else level_of(following),
            level,
            lambda levels=(sigma, following): noise_sampler(*levels),
        )
        if not end:
            x = x * math.sqrt(1 + float(following) ** 2)
    return x


def _levels(model_sampling):
    """A MODEL's noise levels. Raises SigmaError for what has none of timesteps, such as a flow."""
    if not isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete):
        names = [kind.__name__ for kind in type(model_sampling).__mro__ if kind is not torch.nn.Module]
        raise SigmaError(
            f"A few-step recipe needs noise levels of 1000 timesteps, and this MODEL has {names[1]}. "
            "Leave the recipe out."
        )
    return model_sampling
