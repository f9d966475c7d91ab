"""From noise to clean latents: schedulers by name, timesteps, and the denoising loop with guidance.

The noise schedule is the published checkpoints' (linear betas from 1e-4 to 0.02 over 1000 timesteps, the
model predicts the noise); the solvers are diffusers'. In float32 the latents equal those of diffusers'
PixArtSigmaPipeline.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

from .errors import SigmaError

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


@dataclass(frozen=True)
class Step:
    """One finished step: `index` from 0 of `count`, the `timestep` it left (0 to 999), the latents it came to
    (B, 4, h, w) in the scheduler's own scale, and the clean latents that the model predicted (B, 4, h, w)."""

    index: int
    count: int
    timestep: float
    latents: torch.Tensor
    predicted: torch.Tensor


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


def get_noise(
    count: int,
    height: int,
    width: int,
    seed: int | torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    channels: int = 4,
) -> torch.Tensor:
    """Unit noise (count, channels, height // 8, width // 8) for pictures of height x width pixels.

    Drawn on the CPU, picture by picture, so that it depends on neither device nor count. For sizes in
    multiples of 16 that is what diffusers' `randn_tensor` draws from one CPU generator. A generator may
    be given in place of a seed and is then advanced. Raises SigmaError for a count or a size that leaves
    nothing, or an impossible seed.
    """
    if count < 1 or height < 8 or width < 8:
        raise SigmaError(
            f"Noise for {count} pictures of {width}x{height} is empty; at least 1 of 8x8 is needed."
        )
    if isinstance(seed, torch.Generator):
        generator = seed
    else:
        try:
            generator = torch.Generator("cpu").manual_seed(seed)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise SigmaError(f"Seed {seed!r} is not a whole number from -2**63 to 2**64 - 1.") from error
    shape = (channels, height // 8, width // 8)
    pictures = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]
    return torch.stack(pictures).to(device)


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
    if not _is_finite(strength) or not 0 < strength <= 1:
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


def check_settings(
    scheduler="dpmpp_2m",
    steps: int = 20,
    guidance_scale: float = 4.5,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
) -> None:
    """Raise the SigmaError that `denoise` would for these settings, before any model is loaded."""
    _check_guidance(guidance_scale)
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else _check_scheduler(scheduler)
    get_timesteps(scheduler, steps, timesteps, sigmas, strength)


@torch.no_grad()
def denoise(
    transformer: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    prompt_mask: torch.Tensor | None = None,
    negative_embeds: torch.Tensor | None = None,
    negative_mask: torch.Tensor | None = None,
    *,
    scheduler="dpmpp_2m",
    steps: int = 20,
    guidance_scale: float | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
    image_latents: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    eta: float = 0.0,
    kv_compression=None,
    guidance_in_turn: bool = False,
    callback: Callable[[Step], bool | None] | None = None,
) -> torch.Tensor:
    """Denoise `latents`, unit noise (B, 4, h, w), to clean latents (B, 4, h, w) scaled by the VAE's factor.

    transformer: called as `transformer(latents, timestep, prompt_embeds, prompt_mask, kv_compression=...)`,
    returns the noise in the latents.
    prompt_embeds, negative_embeds (B or 1, tokens, C), of any two lengths; masks (B or 1, tokens), True or 1
    for real tokens, None when all are. Both go through the transformer in one batch, negative first, and the
    noise is `negative + guidance_scale * (prompt - negative)` (arXiv 2207.12598). guidance_scale <= 1 runs
    the prompt alone; None is `default_guidance(scheduler)`.
    scheduler: a name of SCHEDULERS or a diffusers scheduler. one_step runs timestep 400, whatever `steps`.
    steps, timesteps, sigmas, strength: see `get_timesteps`.
    image_latents (B or 1, 4, h, w), clean and scaled: start from them, noised to the first timestep, and not
    from noise alone.
    guidance_in_turn: prompt and negative prompt each in a pass of its own, which takes half the memory.
    generator: for the stochastic schedulers. eta in [0, 1]: ddim's share of fresh noise.
    callback(Step) is called after each step; if it returns False the latents are returned as they are then.

    Latents stay in float32 between steps and come back in the dtype they had; the transformer sees them
    in the embeddings' dtype. Raises SigmaError for input that cannot work, and if a step's latents are
    not finite.
    """
    _check_latents("latents", latents)
    guidance_scale = default_guidance(scheduler) if guidance_scale is None else guidance_scale
    _check_guidance(guidance_scale)
    if image_latents is not None:
        _check_latents("image_latents", image_latents)
        if image_latents.shape not in (latents.shape, (1, *latents.shape[1:])):
            raise SigmaError(
                f"image_latents are {tuple(image_latents.shape)}, the noise is {tuple(latents.shape)}; "
                "both must have one size."
            )
    elif strength != 1:
        raise SigmaError(f"strength is {strength} but there are no image_latents to start from.")
    guided = guidance_scale > 1
    embeds, mask = _batch_embeds(
        len(latents), prompt_embeds, prompt_mask, negative_embeds, negative_mask, guided
    )
    if scheduler == "one_step" and timesteps is None and sigmas is None:
        timesteps = [ONE_STEP_TIMESTEP]
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else _check_scheduler(scheduler)
    step_arguments = _step_arguments(scheduler, generator, eta, len(latents))
    timesteps = get_timesteps(scheduler, steps, timesteps, sigmas, strength, latents.device)

    dtype = latents.dtype
    latents = latents.float()
    if image_latents is None:
        latents = latents * scheduler.init_noise_sigma
    else:
        image_latents = image_latents.to(latents).expand_as(latents)
        latents = scheduler.add_noise(image_latents, latents, timesteps[:1].repeat(len(latents)))

    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        batch = torch.cat([scaled] * 2) if guided else scaled
        passes = 2 if guided and guidance_in_turn else 1
        noise = torch.cat(
            [
                transformer(*part, kv_compression=kv_compression).float()
                for part in _parts(batch.to(embeds.dtype), timestep, embeds, mask, passes)
            ]
        )
        if guided:
            negative, positive = noise.chunk(2)
            noise = negative + guidance_scale * (positive - negative)
        latents = scheduler.step(noise, timestep, latents, **step_arguments, return_dict=False)[0]
        if not latents.isfinite().all():
            raise SigmaError(
                f"Latents are not finite after step {index + 1} of {len(timesteps)}, "
                f"timestep {float(timestep):g}. "
                "Run the transformer in bf16 or fp32 rather than fp16, or lower the guidance scale."
            )
        if callback is not None:
            predicted = predict_clean(scheduler, scaled, noise, timestep)
            step = Step(index, len(timesteps), float(timestep), latents, predicted)
            if callback(step) is False:
                break
    return latents.to(dtype)


def _parts(latents, timestep, embeds, mask, count):
    """The transformer's arguments for `count` passes over equal parts of a batch."""
    masks = [None] * count if mask is None else mask.chunk(count)
    for part, part_embeds, part_mask in zip(latents.chunk(count), embeds.chunk(count), masks, strict=True):
        yield part, timestep, part_embeds, part_mask


def predict_clean(scheduler, scaled: torch.Tensor, noise: torch.Tensor, timestep) -> torch.Tensor:
    """The clean latents x0 (B, 4, h, w) in `scaled` = sqrt(abar) x0 + sqrt(1 - abar) noise.

    `scaled` is the model's input, after scale_model_input, which is of this form for every scheduler. Between
    two whole timesteps sigma = sqrt((1 - abar) / abar) is interpolated linearly, as diffusers' Euler does.
    Source: DDPM, arXiv 2006.11239.
    """
    table = scheduler.alphas_cumprod
    below = min(max(int(timestep), 0), len(table) - 1)
    pair = table[[below, min(below + 1, len(table) - 1)]].double()
    low, high = ((1 - pair) / pair).sqrt().tolist()
    sigma = low + (float(timestep) - below) * (high - low)
    return scaled * math.sqrt(1 + sigma**2) - sigma * noise


def _check_guidance(guidance_scale):
    if not _is_finite(guidance_scale):
        raise SigmaError(
            f"guidance_scale is {guidance_scale}; give a finite number such as 4.5, or 1 for none."
        )


def _batch_embeds(count, prompt_embeds, prompt_mask, negative_embeds, negative_mask, guided):
    """Embeddings and mask of the transformer's batch: B rows, or with guidance 2 B, negative first."""
    embeds, mask = _check_embeds("prompt_embeds", count, prompt_embeds, prompt_mask)
    if guided:
        if negative_embeds is None:
            raise SigmaError(
                "Guidance above 1 needs negative_embeds: encode an empty prompt, or set it to 1."
            )
        unwanted, unwanted_mask = _check_embeds("negative_embeds", count, negative_embeds, negative_mask)
        if unwanted.shape[-1] != embeds.shape[-1]:
            raise SigmaError(
                f"prompt_embeds have {embeds.shape[-1]} channels, negative_embeds {unwanted.shape[-1]}; "
                "encode both with one text encoder."
            )
        length = max(embeds.shape[1], unwanted.shape[1])
        padded = [_pad(part, length) for part in (unwanted.to(embeds), embeds)]
        embeds = torch.cat(padded)
        mask = torch.cat([_pad(part, length) for part in (unwanted_mask, mask)])
    # Padding that no row needs is dropped; it costs time and changes nothing.
    used = mask.any(0)
    embeds, mask = embeds[:, used], mask[:, used]
    return embeds, None if mask.all() else mask


def _check_embeds(name, count, embeds, mask):
    """Embeddings (count, L, C) and their boolean mask (count, L), one row repeated if need be."""
    if embeds.ndim != 3 or 0 in embeds.shape or len(embeds) not in (1, count):
        raise SigmaError(f"{name} must be ({count} or 1, tokens, channels), not {tuple(embeds.shape)}.")
    if not embeds.isfinite().all():
        raise SigmaError(f"{name} hold NaN or infinity; encode again in another precision, such as bf16.")
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    elif mask.shape != embeds.shape[:2]:
        raise SigmaError(f"The mask of {name} must be {tuple(embeds.shape[:2])}, not {tuple(mask.shape)}.")
    mask = mask.to(embeds.device, torch.bool)
    if not mask.any(1).all():
        raise SigmaError(f"The mask of {name} leaves no token; even an empty prompt has one.")
    return embeds.expand(count, -1, -1), mask.expand(count, -1)


def _pad(rows, length):
    padding = rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])
    return torch.cat([rows, padding], dim=1)


def _check_latents(name, latents):
    if latents.ndim != 4 or 0 in latents.shape or not latents.is_floating_point():
        raise SigmaError(
            f"{name} must be floats (B, 4, height, width), not {latents.dtype} {tuple(latents.shape)}."
        )
    if not latents.isfinite().all():
        raise SigmaError(f"{name} hold NaN or infinity.")


def _check_scheduler(scheduler):
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.prediction_type != "epsilon":
        raise SigmaError(
            f"{type(scheduler).__name__} is not for a model that predicts noise. "
            f"Use one of {', '.join(SCHEDULERS)}, or a diffusers scheduler with prediction_type epsilon."
        )
    return scheduler


def _step_arguments(scheduler, generator, eta, count):
    accepted = inspect.signature(scheduler.step).parameters
    if not _is_finite(eta) or not 0 <= eta <= 1:
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
    whole = all(_is_finite(value) and value == int(value) and 0 <= value <= 999 for value in timesteps)
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
        or not all(_is_finite(value) and value >= 0 for value in sigmas)
        or not _descends(sigmas)
    ):
        raise SigmaError(
            f"sigmas are {sigmas}; give at least two numbers, descending, of which the last is the end."
        )
    return [float(value) for value in sigmas]


def _descends(values):
    return all(later < earlier for earlier, later in zip(values, values[1:], strict=False))


def _is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False
