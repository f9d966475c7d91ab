"""A checkpoint's noise schedule as the host's `model_sampling`."""

import comfy.model_base
import comfy.model_sampling
import torch

from ...pixart_sigma.noise_schedule import PUBLISHED, NoiseSchedule

MODEL_TYPES = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    "sample": comfy.model_base.ModelType.EPS,  # there is none; `make_model_sampling` puts it right
    "flow_prediction": comfy.model_base.ModelType.FLOW,
}
BETA_SCHEDULES = {"linear": "sqrt_linear", "scaled_linear": "linear"}


class PredictsSample(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    """What the host's node ModelSamplingDiscrete makes of "x0"."""


def sampling_settings(noise_schedule: NoiseSchedule) -> dict:
    """The noise schedule in the host's words, which its nodes read too. It cannot make cosine betas, nor has
    it a word for a table of them."""
    settings = {
        "timesteps": 1000,
        "zsnr": noise_schedule.rescale_betas_zero_snr,
        "shift": noise_schedule.flow_shift,
        "beta_schedule": "sqrt_linear",
        "linear_start": PUBLISHED.beta_start,
        "linear_end": PUBLISHED.beta_end,
    }
    if noise_schedule.beta_schedule in BETA_SCHEDULES:
        settings |= {
            "beta_schedule": BETA_SCHEDULES[noise_schedule.beta_schedule],
            "linear_start": noise_schedule.beta_start,
            "linear_end": noise_schedule.beta_end,
        }
    return settings


def make_model_sampling(model: comfy.model_base.BaseModel, noise_schedule: NoiseSchedule):
    """The host's `model_sampling` of a model, which it has made by `sampling_settings`, with the noise levels
    that the engine computes."""
    sampling = model.model_sampling
    if noise_schedule.prediction_type == "sample":
        sampling = PredictsSample(model.model_config)
    if noise_schedule != PUBLISHED and not noise_schedule.is_flow:
        sampling.set_sigmas(_noise_levels(noise_schedule))
    return sampling


def reference_timesteps(noise_schedule: NoiseSchedule, steps: int):
    """diffusers' DPM-Solver++ with its timesteps set, which are where the steps lie; for those that are not
    evenly spaced."""
    from ...pixart_sigma.sampling.schedulers import make_scheduler

    scheduler = make_scheduler("dpmpp_2m", noise_schedule)
    scheduler.set_timesteps(steps)
    return scheduler


def _noise_levels(noise_schedule: NoiseSchedule) -> torch.Tensor:
    from ...pixart_sigma.sampling.schedulers import make_scheduler

    alphas = make_scheduler("dpmpp_2m", noise_schedule).alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt()
