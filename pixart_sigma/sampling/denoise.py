"""From noise to clean latents: the denoising loop with guidance.

In float32 the latents equal those of diffusers' PixArtSigmaPipeline.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import SigmaError
from .schedulers import (
    ONE_STEP_TIMESTEP,
    check_scheduler,
    default_guidance,
    get_step_arguments,
    get_timesteps,
    is_finite,
    make_scheduler,
)


@dataclass(frozen=True)
class Step:
    """One finished step: `index` from 0 of `count`, the `timestep` it left (0 to 999), the latents it came to
    (B, 4, h, w) in the scheduler's own scale, and the clean latents that the model predicted (B, 4, h, w)."""

    index: int
    count: int
    timestep: float
    latents: torch.Tensor
    predicted: torch.Tensor


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
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else check_scheduler(scheduler)
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
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else check_scheduler(scheduler)
    step_arguments = get_step_arguments(scheduler, generator, eta, len(latents))
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
            noise = guide(noise, guidance_scale)
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


def guide(noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """The guided noise (B, 4, h, w) of a batch (2 B, 4, h, w), negative first (arXiv 2207.12598)."""
    negative, positive = noise.chunk(2)
    return negative + guidance_scale * (positive - negative)


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
    if not is_finite(guidance_scale):
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
