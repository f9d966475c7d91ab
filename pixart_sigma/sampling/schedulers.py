"""Schedulers by name, and the timesteps of a run.

The noise schedule is the checkpoint's, by default the published one; the solvers are diffusers'.
"""

import inspect
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from ..choices import SCHEDULERS
from ..errors import SettingError, SigmaError
from ..noise_schedule import PREDICTION_TYPES, PUBLISHED, SIGMA_SPACINGS, NoiseSchedule
from ..recipes import check_recipe
from ..setting_checks import check_sigmas, check_timesteps
from ..settings import Settings
from .few_step import RecipeScheduler

ONE_STEP_TIMESTEP = 400
# Each name's class, and what makes it that solver. sa_solver is set as in the authors' app_pixart_sigma.py
# (they use 25 steps, guidance 3).
SOLVERS: dict[str, tuple[type, dict[str, Any]]] = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "sa_solver": (
        SASolverScheduler,
        {
            "algorithm_type": "data_prediction",
            "tau_func": lambda timestep: 1 if 200 <= timestep <= 800 else 0,
            "predictor_order": 2,
            "corrector_order": 2,
        },
    ),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "one_step": (DDPMScheduler, {"clip_sample": False}),
}
OWN_STEPS = ("lcm", "one_step")  # which lie where the checkpoint was distilled for


def make_scheduler(name: str, noise_schedule: NoiseSchedule = PUBLISHED):
    """A fresh diffusers scheduler with a checkpoint's noise schedule; `name` is one of SCHEDULERS.

    It is what `from_config` of its class makes of the checkpoint's scheduler_config.json; dpmpp_2m with the
    published one is the published scheduler. lcm and one_step are for checkpoints distilled for them.
    Raises SigmaError for another name, and for a noise schedule that it cannot run.
    """
    if name not in SOLVERS:
        raise SigmaError(f"Unknown scheduler {name!r}. Use one of {', '.join(SCHEDULERS)}.")
    if wrong := _cannot_run(name, noise_schedule):
        others = [other for other in SCHEDULERS if not _cannot_run(other, noise_schedule)]
        raise SettingError(
            "scheduler", name, f"the checkpoint asks for {wrong}, which it has not; use {' or '.join(others)}"
        )
    kind, own = SOLVERS[name]
    known = inspect.signature(kind).parameters
    config = {key: value for key, value in noise_schedule.as_config().items() if key in known}
    try:
        return kind(**config | own)
    except ImportError as error:
        raise SigmaError(f"The checkpoint asks for {noise_schedule.describe()}: {error}") from error


def scheduler_for(settings: Settings, noise_schedule: NoiseSchedule = PUBLISHED):
    """The scheduler of a run; its spacing, or timesteps or sigmas of one's own, take the place of the
    checkpoint's spacing, and a recipe that of the scheduler.
    Raises SigmaError as `make_scheduler`, and for a flow schedule, which takes none of the three."""
    if settings.recipe is not None:
        recipe = check_recipe(settings.recipe, noise_schedule)
        return RecipeScheduler(recipe, make_scheduler("dpmpp_2m", noise_schedule.evenly()))
    if settings.spacing is not None:
        noise_schedule = noise_schedule.spaced(settings.spacing)
    for name in ("timesteps", "sigmas"):
        given = getattr(settings, name)
        if given is not None:
            if noise_schedule.is_flow:
                raise SettingError(name, given, "the checkpoint's flow schedule takes none; give steps")
            noise_schedule = noise_schedule.evenly()
    return make_scheduler(settings.scheduler, noise_schedule)


def _cannot_run(name: str, noise_schedule: NoiseSchedule) -> str:
    """What of the noise schedule the scheduler does not have; "" where it has all."""
    prediction, zero = noise_schedule.prediction_type, noise_schedule.rescale_betas_zero_snr
    takes = inspect.signature(SOLVERS[name][0]).parameters
    switch = {word: switch for switch, word in SIGMA_SPACINGS.items()}.get(noise_schedule.sigma_spacing)
    if noise_schedule.is_flow and "use_flow_sigmas" not in takes:
        return f"prediction_type {prediction}"
    if prediction == "sample" and name == "euler_ancestral":
        return f"prediction_type {prediction}"
    # Its first noise levels are too far apart for what the scheduler computes in float32.
    if noise_schedule.beta_schedule == "squaredcos_cap_v2" and name == "euler_ancestral":
        return f"beta_schedule {noise_schedule.beta_schedule}"
    if zero and "rescale_betas_zero_snr" not in takes:
        return "rescale_betas_zero_snr True"
    # There the last timestep is noise alone, from which no clean latents follow.
    if zero and prediction == "epsilon" and name in ("ddim", "lcm", "one_step"):
        return "rescale_betas_zero_snr True with prediction_type epsilon"
    if switch and switch not in takes and name not in OWN_STEPS:
        return f"{switch} True"
    return ""


def get_timesteps(scheduler, settings: Settings, device: str | torch.device = "cpu") -> torch.Tensor:
    """Set the scheduler's timesteps by the settings and return those to run, highest first.

    `timesteps` or `sigmas` of one's own replace `steps`, where the scheduler takes them, and a recipe brings
    its own. With strength < 1 only the last int(steps * strength) are run, as in diffusers' img2img
    pipelines.
    Raises SigmaError with the value seen.
    """
    if settings.recipe is not None:
        if not isinstance(scheduler, RecipeScheduler):
            raise SettingError("recipe", settings.recipe, "a scheduler is given too; give one of them")
        scheduler.set_timesteps(device)
        return scheduler.timesteps[-len(scheduler.recipe.last(settings.strength)) :]
    timesteps = settings.timesteps
    if settings.scheduler == "one_step" and timesteps is None and settings.sigmas is None:
        timesteps = (ONE_STEP_TIMESTEP,)
    if timesteps is not None:
        own: dict[str, Any] = {"timesteps": _own_timesteps(scheduler, timesteps)}
    elif settings.sigmas is not None:
        own = {"sigmas": _own_sigmas(scheduler, settings.sigmas)}
    else:
        own = {"num_inference_steps": settings.steps}
    try:
        scheduler.set_timesteps(**own, device=device)
    except ValueError as error:
        raise SigmaError(f"{type(scheduler).__name__} refuses these steps: {error}") from error
    if settings.strength == 1:
        return scheduler.timesteps

    order = scheduler.order
    count = settings.steps if "num_inference_steps" in own else len(scheduler.timesteps)
    skipped = count - int(count * settings.strength)
    if skipped == count:
        raise SettingError(
            "strength", settings.strength, f"of {count} steps it leaves none, so raise one of them"
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped * order)
    return scheduler.timesteps[skipped * order :]


def check_scheduler(scheduler):
    """A diffusers scheduler for a model like this; SigmaError for others, and for a name."""
    if isinstance(scheduler, str):
        raise SigmaError(
            f"scheduler is {scheduler!r}; a name belongs into Settings(scheduler={scheduler!r})."
        )
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise SigmaError(
            f"{type(scheduler).__name__} is not for a model like PixArt-Sigma. "
            f"Use one of {', '.join(SCHEDULERS)}, or a diffusers scheduler with betas and a prediction_type "
            f"of {', '.join(PREDICTION_TYPES)}."
        )
    return scheduler


def get_step_arguments(scheduler, generator, eta: float, count: int) -> dict:
    """Which of them the scheduler's `step` takes. Raises SigmaError for an eta that it does not take, and
    for what is neither one generator nor one for each of `count` pictures."""
    accepted = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise SettingError("eta", eta, f"{type(scheduler).__name__} has none; use the scheduler ddim")
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator | None):
            raise SigmaError(
                f"generator is {one!r}; give a torch.Generator, such as torch.Generator().manual_seed(7)."
            )
    if isinstance(generator, list) and len(generator) != count:
        raise SigmaError(
            f"There are {len(generator)} generators for {count} pictures; give one, or one each."
        )
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}


def _own_timesteps(scheduler, timesteps) -> list[int]:
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise SigmaError(
            f"{type(scheduler).__name__} takes no timesteps of one's own. "
            "Give steps, or use dpmpp_2m, euler, lcm or one_step."
        )
    return list(check_timesteps(timesteps))


def _own_sigmas(scheduler, sigmas) -> list[float]:
    # UniPC has the argument too, but for flow models only.
    takes = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if not takes or isinstance(scheduler, UniPCMultistepScheduler):
        raise SigmaError(
            f"{type(scheduler).__name__} takes no sigmas of one's own. "
            "Give steps, or use the scheduler euler."
        )
    return list(check_sigmas(sigmas))
