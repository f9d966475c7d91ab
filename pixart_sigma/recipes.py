"""How weights that were distilled to few steps are run: recipes, by name or spelled out. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import SettingError
from .noise_schedule import NoiseSchedule
from .setting_checks import LAST_TIMESTEP, check_timesteps, check_word

UPDATES = ("x0", "ddim", "lcm", "tcd")
STARTS = ("unit", "sigma")
# Latent consistency models, and trajectory consistency ones, are trained on every 20th timestep.
ORIGIN_STEPS = 50


@dataclass(frozen=True)
class FewStepRecipe:
    """The steps that weights were distilled for; each is one forward without guidance.

    timesteps: whole, 0 to 999, highest first. update: from one of them to the next, see
    `sampling.few_step.take_step`. start: what the first of them sees where there is no picture to start from,
    "unit" noise z, or "sigma", z as it is in latents of that timestep, sqrt(1 - alpha_bar) z.

    Raises SettingError, naming the first field that is wrong.
    """

    timesteps: tuple[int, ...]
    update: str
    start: str = "unit"

    def __post_init__(self):
        object.__setattr__(self, "timesteps", check_timesteps(self.timesteps))
        check_word(self, "update", UPDATES)
        check_word(self, "start", STARTS)

    def last(self, strength: float) -> tuple[int, ...]:
        """The timesteps of a run that starts from a picture, of which it forgets `strength`, 0 to 1."""
        count = len(self.timesteps)
        return self.timesteps[count - int(count * strength) :]


# By name. Sources: AMD-AGI/Nitro-1 and PixArt-Alpha-DMD (one-step), jackyckp/efficient-pixart-sigma-lora
# (phased), Luo-Yihong/TDM (four-step).
RECIPES = {
    "one-step": FewStepRecipe((400,), "x0"),
    "phased-4": FewStepRecipe((999, 749, 500, 250), "ddim"),
    "phased-2": FewStepRecipe((999, 500), "ddim"),
    "four-step": FewStepRecipe((899, 674, 449, 224), "ddim"),
}
# Those with a number of steps, by what stands before it, and the numbers that lists offer.
COUNTED = ("lcm", "tcd")
OFFERED_COUNTS = (2, 4, 8)
RECIPE_NAMES = (*RECIPES, *(f"{update}-{count}" for update in COUNTED for count in OFFERED_COUNTS))
# What files of known distilled weights are called -> their recipe. All words of a row have to be there.
CALLED = (
    (("nitro",), "one-step"),
    (("dmd",), "one-step"),
    (("phased", "4step"), "phased-4"),
    (("inkwash", "4step"), "phased-4"),
    (("inkwash", "2step"), "phased-2"),
    (("tdm",), "four-step"),
    (("lcm",), "lcm-4"),
    (("tcd",), "tcd-4"),
)


def parse_recipe(spelling: Any) -> FewStepRecipe:
    """The recipe of a name, of lcm-N or tcd-N, or of UPDATE:TIMESTEPS[:START] such as "x0:400:sigma".
    Raises SettingError."""
    named = spelling.strip().lower() if isinstance(spelling, str) else ""
    if named in RECIPES:
        return RECIPES[named]
    counted = re.fullmatch(rf"({'|'.join(COUNTED)})-([0-9]{{1,3}})", named)
    if counted and 1 <= int(counted[2]) <= ORIGIN_STEPS:
        return FewStepRecipe(_consistency_timesteps(int(counted[2])), counted[1])
    update, *rest = named.split(":")
    if len(rest) not in (1, 2):
        raise SettingError(
            "recipe",
            repr(spelling),
            f"choose {', '.join(RECIPES)}, lcm-N or tcd-N with N from 1 to {ORIGIN_STEPS}, or write "
            "UPDATE:TIMESTEPS, such as ddim:999,749,500,250 or x0:400:sigma",
        )
    try:
        timesteps = tuple(int(part) for part in rest[0].split(","))
        return FewStepRecipe(timesteps, update, *rest[1:])
    except SettingError as error:
        advice = f"its {error.name} {error.value}: {error.advice}"
    except ValueError:
        advice = f"its timesteps {rest[0]!r}: give whole numbers such as 999,749,500,250"
    raise SettingError("recipe", repr(spelling), advice)


def check_alone(settings: Any) -> str:
    """The spelling of the recipe of `Settings`, if nothing else there contradicts it: the steps, the
    scheduler and the guidance are its own. Raises SettingError."""
    recipe = settings.recipe
    parse_recipe(recipe)
    for name in ("steps", "timesteps", "sigmas", "spacing", "scheduler", "eta"):
        if (given := getattr(settings, name)) != getattr(type(settings), name):
            raise SettingError(name, given, f"the recipe {recipe} decides the steps; give one of the two")
    if settings.guided:
        raise SettingError(
            "guidance_scale",
            settings.guidance_scale,
            f"the recipe {recipe} is for weights that were distilled without guidance; leave it out, or "
            "give 1",
        )
    return recipe.strip().lower()


def check_recipe(spelling: str, noise_schedule: NoiseSchedule) -> FewStepRecipe:
    """The recipe, for a checkpoint with this noise schedule. Raises SettingError where it cannot run."""
    recipe = parse_recipe(spelling)
    wrong = ""
    if noise_schedule.is_flow:
        wrong = f"prediction_type {noise_schedule.prediction_type}, and recipes are for noise schedules"
    elif (
        noise_schedule.rescale_betas_zero_snr
        and noise_schedule.prediction_type == "epsilon"
        and LAST_TIMESTEP in recipe.timesteps
    ):
        # Noise alone, from which no clean latents follow.
        wrong = f"zero terminal SNR with epsilon, which has no step from timestep {LAST_TIMESTEP}"
    if wrong:
        raise SettingError("recipe", spelling, f"the checkpoint has {wrong}; leave the recipe out")
    return recipe


def suggest_recipe(names: Iterable[str]) -> str:
    """The recipe of what files, folders or their metadata call known distilled weights; "" for others."""
    words = set(re.split(r"[^a-z0-9]+", " ".join(names).lower()))
    return next((recipe for called, recipe in CALLED if words.issuperset(called)), "")


def _consistency_timesteps(count: int) -> tuple[int, ...]:
    """As diffusers' LCMScheduler and TCDScheduler choose them of 999, 979, ..., 19."""
    gap = (LAST_TIMESTEP + 1) // ORIGIN_STEPS
    return tuple(LAST_TIMESTEP - gap * (index * ORIGIN_STEPS // count) for index in range(count))
