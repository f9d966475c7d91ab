"""Classifier-free guidance (arXiv 2207.12598): from the transformer to the noise that a step removes.

The seam is `Predict`: what `denoise` asks at each step. A further kind of guidance is another function that
returns one.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..errors import SigmaError
from ..noise_schedule import PUBLISHED, NoiseSchedule
from ..prompt_embeds import Prompts
from ..settings import Settings, check_settings
from .forecast import ForecastRun
from .predictions import noise_level, predict_clean, predict_output
from .schedulers import scheduler_for

# (latents (B, 4, h, w) as the scheduler scales them, timestep) -> the noise in them (B, 4, h, w), float32.
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# The same for each prompt, (B, 4, h, w) or, where the last argument asks for both prompts, (2 B, 4, h, w),
# negative first.
Ask = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def guide(
    transformer: Callable[..., torch.Tensor],
    prompts: Prompts,
    settings: Settings,
    in_turn: bool = False,
    noise_schedule: NoiseSchedule = PUBLISHED,
) -> Predict:
    """The guided noise, `negative + guidance_scale * (prompt - negative)`.

    transformer: called as `transformer(latents, timestep, prompt_embeds, prompt_mask)`, with those of
    kv_compression and nag_scale that the settings have; returns the noise in the latents. Both
    prompts go through it in one batch, negative first, or `in_turn` one after the other, in half the memory.
    A guidance_scale of 1 or less runs the prompt alone, or with a nag_scale gives the transformer the
    embeddings of both prompts for each picture. The transformer sees latents in the embeddings' dtype. One
    that has a `project_prompt` projects each batch of embeddings once, not in each step, and is then called
    with `prompt_projected=True`. Where `settings.speed` has steps forecast, a Predict is for one run;
    noise_schedule is the checkpoint's, and is read for that alone.
    Raises SigmaError for embeddings or masks that cannot work.
    """
    ask = _asking(transformer, prompts, settings, in_turn)
    if settings.savings:
        return _forecasting(ask, settings, noise_schedule)

    def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        noise = ask(latents, timestep, settings.guided)
        return combine(noise, settings.guidance) if settings.guided else noise

    return predict


def _asking(
    transformer: Callable[..., torch.Tensor], prompts: Prompts, settings: Settings, in_turn: bool = False
) -> Ask:
    """The transformer's answers for each prompt; the arguments and what it raises are those of `guide`."""
    check_settings(settings)
    if not isinstance(prompts, Prompts):
        raise SigmaError(
            f"prompts is a {type(prompts).__name__}; give Prompts, of PromptEmbeddings embeddings.prompts()."
        )
    given = {"kv_compression": settings.kv_compression, "nag_scale": settings.nag_scale}
    named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    project = getattr(transformer, "project_prompt", None)
    if project is not None:
        named["prompt_projected"] = True

    @functools.cache
    def batch_of(both: bool, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        embeds, mask = batch_prompts(prompts, both, count)
        return embeds if project is None else project(embeds), mask

    def ask(latents: torch.Tensor, timestep: torch.Tensor, guided: bool) -> torch.Tensor:
        embeds, mask = batch_of(guided or settings.nag_scale is not None, len(latents))
        batch = torch.cat([latents] * 2) if guided else latents
        passes = 2 if guided and in_turn else 1
        return torch.cat(
            [
                transformer(part, timestep, part_embeds, part_mask, **named).float()
                for part, part_embeds, part_mask in _parts(batch.to(embeds.dtype), embeds, mask, passes)
            ]
        )

    return ask


def _forecasting(ask: Ask, settings: Settings, noise_schedule: NoiseSchedule) -> Predict:
    """What the steps of one run predict where some of them are forecast, see `forecast`."""
    scheduler = scheduler_for(settings, noise_schedule)
    run = ForecastRun(settings.savings)

    def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        run.step(float(timestep), noise_level(scheduler, timestep))
        complete = []

        def compute(alone: bool) -> list[torch.Tensor]:
            guided = settings.guided and not alone
            noise = ask(latents, timestep, guided)
            if guided == settings.guided:
                complete.append(noise)
            prompts = noise.chunk(2)[::-1] if guided else [noise]
            return [predict_clean(scheduler, latents, part, timestep) for part in prompts]

        values = run.ask(compute, 2 if settings.guided else 1)
        if complete:  # as it came, not to clean latents and back
            return combine(complete[0], settings.guidance) if settings.guided else complete[0]
        clean = combine(torch.cat(values[::-1]), settings.guidance) if settings.guided else values[0]
        return predict_output(scheduler, latents, clean, timestep)

    return predict


def combine(noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """The guided noise (B, 4, h, w) of a batch (2 B, 4, h, w), negative first."""
    negative, positive = noise.chunk(2)
    return negative + guidance_scale * (positive - negative)


def batch_prompts(prompts: Prompts, both: bool, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings (rows, L, C) and mask (rows, L) or None of the transformer's batch for `count` latents:
    count rows, or with both prompts twice as many, negative first.
    Raises SigmaError for what does not fit together."""
    embeds, mask = _check_embeds("prompt_embeds", count, prompts.prompt_embeds, prompts.prompt_mask)
    if both:
        if prompts.negative_embeds is None:
            raise SigmaError(
                "Guidance above 1 and nag_scale need negative_embeds: encode an empty prompt, or leave both."
            )
        unwanted, unwanted_mask = _check_embeds(
            "negative_embeds", count, prompts.negative_embeds, prompts.negative_mask
        )
        if unwanted.shape[-1] != embeds.shape[-1]:
            raise SigmaError(
                f"prompt_embeds have {embeds.shape[-1]} channels, negative_embeds {unwanted.shape[-1]}; "
                "encode both with one text encoder."
            )
        length = max(embeds.shape[1], unwanted.shape[1])
        embeds = torch.cat([_pad(part, length) for part in (unwanted.to(embeds), embeds)])
        mask = torch.cat([_pad(part, length) for part in (unwanted_mask, mask)])
    # Padding that no row needs is dropped; it costs time and changes nothing.
    used = mask.any(0)
    embeds, mask = embeds[:, used], mask[:, used]
    return embeds, None if mask.all() else mask


def _parts(latents, embeds, mask, count):
    """The transformer's arguments for `count` passes over equal parts of a batch."""
    masks = [None] * count if mask is None else mask.chunk(count)
    return zip(latents.chunk(count), embeds.chunk(count), masks, strict=True)


def _check_embeds(name, count, embeds, mask):
    """Embeddings (count, L, C) and their boolean mask (count, L), one row repeated if need be."""
    if not isinstance(embeds, torch.Tensor):
        raise SigmaError(f"{name} must be a tensor (1, tokens, channels), not a {type(embeds).__name__}.")
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
