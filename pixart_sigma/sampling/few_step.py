"""Few-step weights: the update from one timestep of a recipe to the next, and recipes as a scheduler."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..recipes import FewStepRecipe
from .predictions import predict_clean

# Of the boundary condition of latent consistency models, as diffusers' LCMScheduler has it.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10
GAMMA = 0.3  # how much of tcd's steps is fresh noise, 0 to 1; diffusers' default


class Level(NamedTuple):
    """A timestep (0 to 999), and the share alpha_bar of the clean picture's variance in its latents."""

    timestep: float
    alpha_bar: float


def take_step(
    update: str,
    latents: torch.Tensor,
    clean: torch.Tensor,
    here: Level,
    following: Level | None,
    level: Callable[[float], Level],
    draw: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Latents (B, 4, h, w) of the following level; after the last one (None) the finished ones.

    latents: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, of the level `here`. clean: x0 as the model
    predicts it. level: of a whole timestep. draw: fresh unit noise (B, 4, h, w).

    x0: the prediction with fresh noise (arXiv 2405.14867). ddim: with the noise that is in the latents (arXiv
    2010.02502). lcm: x0, where the prediction meets the boundary condition (arXiv 2310.04378). tcd: with the
    noise that is in the latents to a level below, and from there with fresh noise (arXiv 2402.19159); it ends
    at timestep 0, as diffusers' TCDScheduler does.
    """
    noise = (latents - math.sqrt(here.alpha_bar) * clean) / math.sqrt(1 - here.alpha_bar)
    if update == "tcd":
        target = level(0) if following is None else following
        below = level(math.floor((1 - GAMMA) * target.timestep))
        between = _mix(clean, noise, below.alpha_bar)
        return between if following is None else _mix(between, draw(), target.alpha_bar / below.alpha_bar)
    if update == "lcm":
        scaled = TIMESTEP_SCALING * here.timestep
        length = scaled**2 + SIGMA_DATA**2
        clean = SIGMA_DATA**2 / length * latents + scaled / math.sqrt(length) * clean
    if following is None:
        return clean
    return _mix(clean, noise if update == "ddim" else draw(), following.alpha_bar)


def _mix(clean: torch.Tensor, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    return math.sqrt(alpha_bar) * clean + math.sqrt(1 - alpha_bar) * noise


class RecipeScheduler:
    """A recipe with what `denoise` uses of diffusers' schedulers.

    levels: a scheduler of diffusers, whose noise levels and prediction_type it has.
    """

    order = 1

    def __init__(self, recipe: FewStepRecipe, levels):
        self.recipe = recipe
        self.config, self.alphas_cumprod = levels.config, levels.alphas_cumprod
        self.timesteps = torch.tensor(recipe.timesteps)
        first = self._level(recipe.timesteps[0]).alpha_bar
        self.init_noise_sigma = 1.0 if recipe.start == "unit" else math.sqrt(1 - first)

    def set_timesteps(self, device: str | torch.device = "cpu") -> None:
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, latents: torch.Tensor, timestep) -> torch.Tensor:
        return latents

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`clean` (B, 4, h, w) noised to timesteps (B,), all of them the same."""
        return _mix(clean, noise, self._level(timesteps[0]).alpha_bar)

    def step(
        self,
        predicted: torch.Tensor,
        timestep,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """(the latents of the next timestep,), by what the model predicted for those of this one."""
        here = self.recipe.timesteps.index(int(timestep))
        following = self.recipe.timesteps[here + 1 : here + 2]
        stepped = take_step(
            self.recipe.update,
            latents,
            predict_clean(self, latents, predicted, timestep),
            self._level(timestep),
            self._level(*following) if following else None,
            self._level,
            lambda: randn_tensor(latents.shape, generator, latents.device, latents.dtype),
        )
        return (stepped,)

    def _level(self, timestep) -> Level:
        return Level(float(timestep), float(self.alphas_cumprod[int(timestep)].double()))
