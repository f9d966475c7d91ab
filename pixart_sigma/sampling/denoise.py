"""From noise to clean latents: the denoising loop.

In float32 the latents equal those of diffusers' PixArtSigmaPipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import SettingError, SigmaError
from ..noise_schedule import PUBLISHED, NoiseSchedule
from ..settings import Settings, check_settings
from .guidance import Predict
from .predictions import predict_clean
from .schedulers import check_scheduler, get_step_arguments, get_timesteps, scheduler_for


@dataclass(frozen=True)
class Step:
    """One finished step: `index` from 0 of `count`, the `timestep` it left (0 to 999), the latents it came to
    (B, 4, h, w) in the scheduler's own scale, and the clean latents that the model predicted (B, 4, h, w)."""

    index: int
    count: int
    timestep: float
    latents: torch.Tensor
    predicted: torch.Tensor


@dataclass(frozen=True)
class Unfinished:
    """A run that a callback has ended after `done` steps: its latents (B, 4, h, w), float32, in the
    scheduler's own scale, and the unit noise (B, 4, h, w) that it began with."""

    latents: torch.Tensor
    noise: torch.Tensor
    done: int


@torch.no_grad()
def denoise(
    predict: Predict,
    latents: torch.Tensor | Unfinished,
    settings: Settings | None = None,
    *,
    noise_schedule: NoiseSchedule = PUBLISHED,
    scheduler=None,
    image_latents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: Callable[[Step], bool | None] | None = None,
) -> torch.Tensor:
    """Denoise `latents`, unit noise (B, 4, h, w), to clean latents (B, 4, h, w) scaled by the VAE's factor;
    or do the steps that an `Unfinished` run has left, with a scheduler that knows nothing of those before.

    predict: what the model predicts, see `guide`. settings: read are scheduler, steps, timesteps,
    sigmas, eta, recipe and strength; what is drawn and how large it is is decided by the other arguments.
    noise_schedule: the checkpoint's. scheduler: a diffusers scheduler in place of the one that those two
    make. image_latents (B or 1, 4, h, w), clean and scaled: start from them, noised to the first timestep,
    and not from noise alone. mask (B or 1, 1, h, w) in [0, 1], beside image_latents: where it is 0 those are
    kept, noised to each step's timestep by the same noise, and at the end as they are; between 0 and 1 the
    two are mixed. generator: for the stochastic schedulers, one or one per picture. callback(Step) is called
    after each step; if it returns False the latents are returned as they are then.

    Latents stay in float32 between steps and come back in the dtype they had. The mask is that of diffusers'
    StableDiffusionInpaintPipeline for a model of 4 channels.
    Raises SigmaError for input that cannot work, and if a step's latents are not finite.
    """
    settings = Settings() if settings is None else check_settings(settings)
    begun, latents = (latents, latents.noise) if isinstance(latents, Unfinished) else (None, latents)
    _check_latents("latents", latents)
    _check_image_latents(image_latents, latents, settings.strength)
    _check_mask(mask, image_latents, latents)
    if scheduler is None:
        scheduler = scheduler_for(settings, noise_schedule)
    else:
        check_scheduler(scheduler)
    step_arguments = get_step_arguments(scheduler, generator, settings.eta, len(latents))
    timesteps = get_timesteps(scheduler, settings, latents.device)
    dtype, unit_noise = latents.dtype, latents.float()
    if image_latents is not None:
        image_latents = image_latents.to(unit_noise).expand_as(unit_noise)
    first = _start(scheduler, unit_noise, image_latents, timesteps[:1])
    done, current = (0, first) if begun is None else _go_on(scheduler, begun, len(timesteps))

    for index, timestep in list(enumerate(timesteps))[done:]:
        scaled = scheduler.scale_model_input(current, timestep)
        noise = predict(scaled, timestep)
        _check_prediction(noise, scaled)
        current = scheduler.step(noise, timestep, current, **step_arguments, return_dict=False)[0]
        if mask is not None:
            kept = _noised(scheduler, image_latents, unit_noise, timesteps[index + 1 : index + 2])
            current = torch.lerp(kept, current, mask.to(current))
        _check_finite(current, f"step {index + 1} of {len(timesteps)}, timestep {float(timestep):g}")
        if callback is not None:
            predicted = predict_clean(scheduler, scaled, noise, timestep)
            if callback(Step(index, len(timesteps), float(timestep), current, predicted)) is False:
                break
    return current.to(dtype)


def _start(scheduler, noise, image_latents, first_timestep):
    """What the first step sees, in the scheduler's own scale: the noise, or a picture noised to that
    timestep."""
    if image_latents is None:
        return noise * scheduler.init_noise_sigma
    return _noised(scheduler, image_latents, noise, first_timestep)


def _go_on(scheduler, unfinished: Unfinished, count: int) -> tuple[int, torch.Tensor]:
    """The steps that are done, of `count`, and the latents to go on from."""
    _check_latents("latents", unfinished.latents)
    if not 0 <= unfinished.done < count or unfinished.latents.shape != unfinished.noise.shape:
        raise SigmaError(f"Of a run of {count} steps {unfinished.done} are said to be done; none is left.")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index((scheduler.begin_index or 0) + unfinished.done * scheduler.order)
    return unfinished.done, unfinished.latents.float()


def _noised(scheduler, image_latents, noise, timestep):
    """The picture noised to a timestep (1,), in the scheduler's own scale; as it is where there is none,
    after the last one."""
    if not len(timestep):
        return image_latents
    return scheduler.add_noise(image_latents, noise, timestep.repeat(len(noise)))


def _check_image_latents(image_latents, latents, strength):
    if image_latents is None:
        if strength != 1:
            raise SettingError("strength", strength, "there are no image_latents to start from")
        return
    _check_latents("image_latents", image_latents)
    if image_latents.shape not in (latents.shape, (1, *latents.shape[1:])):
        raise SigmaError(
            f"image_latents are {tuple(image_latents.shape)}, the noise is {tuple(latents.shape)}; "
            "both must have one size."
        )


def _check_prediction(noise, latents):
    if not isinstance(noise, torch.Tensor) or noise.shape != latents.shape:
        raise SigmaError(
            f"predict gave {_describe(noise)}; it returns what the model predicts for the latents, "
            f"{tuple(latents.shape)}."
        )


def _check_finite(latents, step):
    if not latents.isfinite().all():
        raise SigmaError(
            f"Latents are not finite after {step}. "
            "Run the transformer in bf16 or fp32 rather than fp16, or lower the guidance scale."
        )


def _check_mask(mask, image_latents, latents):
    if mask is None:
        return
    if image_latents is None:
        raise SigmaError("The mask says where image_latents are kept, and there are none; give both.")
    shape = (1, *latents.shape[2:])
    if not isinstance(mask, torch.Tensor) or mask.shape not in ((1, *shape), (len(latents), *shape)):
        raise SigmaError(
            f"The mask must be a tensor (1 or {len(latents)}, {', '.join(map(str, shape))}), "
            f"not {_describe(mask)}."
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise SigmaError("The mask must be from 0, where image_latents are kept, to 1.")


def _describe(value):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _check_latents(name, latents):
    if not isinstance(latents, torch.Tensor):
        raise SigmaError(
            f"{name} must be a tensor of floats (B, 4, height, width), not {_describe(latents)}."
        )
    if latents.ndim != 4 or 0 in latents.shape or not latents.is_floating_point():
        raise SigmaError(f"{name} must be floats (B, 4, height, width), not {_describe(latents)}.")
    if not latents.isfinite().all():
        raise SigmaError(f"{name} hold NaN or infinity.")
