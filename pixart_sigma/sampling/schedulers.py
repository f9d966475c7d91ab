"""Schedulers by name, and the timesteps of a run.

The noise schedule is the published checkpoints' (linear betas from 1e-4 to 0.02 over 1000 timesteps, the
model predicts the noise); the solvers are diffusers'.
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

from ..errors import SettingError, SigmaError
from ..settings import SCHEDULERS, Settings, check_sigmas, check_timesteps

ONE_STEP_TIMESTEP = 400

NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


def make_scheduler(name: str):
    """A fresh diffusers scheduler with PixArt-Sigma's noise schedule; `name` is one of SCHEDULERS.

    dpmpp_2m is the published scheduler_config.json. sa_solver is set as in the authors' app_pixart_sigma.py
    (they use 25 steps, guidance 3). lcm and one_step are for checkpoints distilled for them.
    Raises SigmaError for another name.
    """
    linspace = NOISE_SCHEDULE | {"timestep_spacing": "linspace"}
    if name == "dpmpp_2m":
        return DPMSolverMultistepScheduler(**linspace)
    if name == "sa_solver":
        return SASolverScheduler(
            **linspace,
            algorithm_type="data_prediction",
            tau_func=lambda timestep: 1 if 200 <= timestep <= 800 else 0,
            predictor_order=2,
            corrector_order=2,
        )
    if name == "euler":
        return EulerDiscreteScheduler(**linspace)
    if name == "euler_ancestral":
        return EulerAncestralDiscreteScheduler(**linspace)
    if name == "ddim":
        return DDIMScheduler(**linspace, clip_sample=False)
    if name == "unipc":
        return UniPCMultistepScheduler(**linspace)
    if name == "lcm":
        return LCMScheduler(**linspace)
    if name == "one_step":
        return DDPMScheduler(**linspace, clip_sample=False)
    raise SigmaError(f"Unknown scheduler {name!r}. Use one of {', '.join(SCHEDULERS)}.")


def get_timesteps(scheduler, settings: Settings, device: str | torch.device = "cpu") -> torch.Tensor:
    """Set the scheduler's timesteps by the settings and return those to run, highest first.

    `timesteps` or `sigmas` of one's own replace `steps`, where the scheduler takes them. With strength < 1
    only the last int(steps * strength) are run, as in diffusers' img2img pipelines.
    Raises SigmaError with the value seen.
    """
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
    """A diffusers scheduler for a model that predicts noise; SigmaError for others, and for a name."""
    if isinstance(scheduler, str):
        raise SigmaError(
            f"scheduler is {scheduler!r}; a name belongs into Settings(scheduler={scheduler!r})."
        )
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.prediction_type != "epsilon":
        raise SigmaError(
            f"{type(scheduler).__name__} is not for a model that predicts noise. "
            f"Use one of {', '.join(SCHEDULERS)}, or a diffusers scheduler with prediction_type epsilon."
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
