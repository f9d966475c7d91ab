"""Schedulers by name, and the timesteps of a run.

The noise schedule is the published checkpoints' (linear betas from 1e-4 to 0.02 over 1000 timesteps, the
model predicts the noise); the solvers are diffusers'.
"""

import inspect
import math
from collections.abc import Sequence

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

from ..errors import SigmaError

SCHEDULERS = ("dpmpp_2m", "sa_solver", "euler", "euler_ancestral", "ddim", "unipc", "lcm", "one_step")
DEFAULT_GUIDANCE = 4.5
ONE_STEP_TIMESTEP = 400
MAX_STEPS = 999

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


def default_guidance(scheduler) -> float:
    """The guidance scale of a run that gives none: 4.5, or 1 (off) for one_step, which is distilled."""
    return 1.0 if scheduler == "one_step" else DEFAULT_GUIDANCE


def get_timesteps(
    scheduler,
    steps: int = 20,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Set the scheduler's timesteps and return those to run, highest first.

    `timesteps` or `sigmas` of one's own replace `steps`, where the scheduler takes them: timesteps are whole
    numbers from 999 to 0, descending; sigmas descend and end with the last level, usually 0. With
    strength < 1 only the last int(steps * strength) are run, as in diffusers' img2img pipelines. Raises
    SigmaError with the value seen.
    """
    if not is_finite(strength) or not 0 < strength <= 1:
        raise SigmaError(f"strength is {strength}; give a number above 0, and at most 1.")
    if timesteps is not None and sigmas is not None:
        raise SigmaError("Both timesteps and sigmas are given; give one of them.")
    if timesteps is not None:
        own = {"timesteps": _check_timesteps(scheduler, timesteps)}
    elif sigmas is not None:
        own = {"sigmas": _check_sigmas(scheduler, sigmas)}
    elif isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise SigmaError(f"steps is {steps!r}; give a whole number from 1 to {MAX_STEPS}.")
    else:
        own = {"num_inference_steps": steps}
    try:
        scheduler.set_timesteps(**own, device=device)
    except ValueError as error:
        raise SigmaError(f"{type(scheduler).__name__} refuses these steps: {error}") from error
    if strength == 1:
        return scheduler.timesteps

    order = scheduler.order
    count = steps if "num_inference_steps" in own else len(scheduler.timesteps)
    skipped = count - int(count * strength)
    if skipped == count:
        raise SigmaError(f"strength {strength} of {count} steps leaves no step; raise one of them.")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped * order)
    return scheduler.timesteps[skipped * order :]


def check_scheduler(scheduler):
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.prediction_type != "epsilon":
        raise SigmaError(
            f"{type(scheduler).__name__} is not for a model that predicts noise. "
            f"Use one of {', '.join(SCHEDULERS)}, or a diffusers scheduler with prediction_type epsilon."
        )
    return scheduler


def get_step_arguments(scheduler, generator, eta, count):
    accepted = inspect.signature(scheduler.step).parameters
    if not is_finite(eta) or not 0 <= eta <= 1:
        raise SigmaError(f"eta is {eta}; give a number from 0 to 1.")
    if eta and "eta" not in accepted:
        raise SigmaError(f"eta is {eta}, but {type(scheduler).__name__} has none; use the scheduler ddim.")
    if isinstance(generator, list) and len(generator) != count:
        raise SigmaError(
            f"There are {len(generator)} generators for {count} pictures; give one, or one each."
        )
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}


def _check_timesteps(scheduler, timesteps):
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise SigmaError(
            f"{type(scheduler).__name__} takes no timesteps of one's own. "
            "Give steps, or use dpmpp_2m, euler, lcm or one_step."
        )
    timesteps = list(timesteps)
    whole = all(is_finite(value) and value == int(value) and 0 <= value <= 999 for value in timesteps)
    if not timesteps or not whole or not _descends(timesteps):
        raise SigmaError(f"timesteps are {timesteps}; give whole numbers from 999 to 0, descending.")
    return [int(value) for value in timesteps]


def _check_sigmas(scheduler, sigmas):
    # UniPC has the argument too, but for flow models only.
    takes = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if not takes or isinstance(scheduler, UniPCMultistepScheduler):
        raise SigmaError(
            f"{type(scheduler).__name__} takes no sigmas of one's own. "
            "Give steps, or use the scheduler euler."
        )
    sigmas = list(sigmas)
    if (
        len(sigmas) < 2
        or not all(is_finite(value) and value >= 0 for value in sigmas)
        or not _descends(sigmas)
    ):
        raise SigmaError(
            f"sigmas are {sigmas}; give at least two numbers, descending, of which the last is the end."
        )
    return [float(value) for value in sigmas]


def _descends(values):
    return all(later < earlier for earlier, later in zip(values, values[1:], strict=False))


def is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False
