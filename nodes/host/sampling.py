"""Our sampler on the host's own: its noise, masks, previews and progress."""

import logging
from dataclasses import dataclass, replace

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.noise_schedule import PUBLISHED
from ...pixart_sigma.recipes import RECIPE_NAMES
from ...pixart_sigma.setting_checks import LAST_TIMESTEP
from ...pixart_sigma.speed import FEW_STEPS, spell
from ...pixart_sigma.transformer.kv_rules import spell as spell_rules
from .base_size import base_size
from .checks import check_conditioning, check_latents
from .few_step import recipe_sampler, recipe_sigmas
from .kv_compression import can_compress, is_set, prompt_width, set_kv_compression
from .noise_schedule import reference_timesteps
from .notice import add_notice
from .speed import is_set as speed_is_set
from .speed import measured, set_speed

REFERENCE = "reference"


def sampler_names() -> list[str]:
    """The host's samplers, the reference pipeline's first."""
    names = list(comfy.samplers.KSampler.SAMPLERS)
    return sorted(names, key=lambda name: name != "dpmpp_2m")


def schedule_names() -> list[str]:
    return [REFERENCE, *comfy.samplers.KSampler.SCHEDULERS, *RECIPE_NAMES]


def reference_sigmas(model, steps: int, denoise: float = 1.0, spacing: str | None = None) -> torch.Tensor:
    """Noise levels (steps + 1,) of the reference pipeline with the checkpoint's scheduler_config.json; the
    last is 0, or what that says.

    As published they are those of timesteps that are evenly spaced from 999 and rounded, as by diffusers'
    "linspace". With denoise < 1 they are the last ones of a longer schedule, as the host's schedulers do it;
    with 0 there are none. A `model_sampling` that a node has put in place of the checkpoint's has the noise
    levels of the same timesteps. spacing: in place of the checkpoint's own.
    """
    if denoise <= 0:
        return torch.zeros(0)
    total = steps if denoise > 0.9999 else max(steps, min(int(steps / denoise), LAST_TIMESTEP))
    noise_schedule = getattr(model.model, "noise_schedule", PUBLISHED)
    if spacing is not None:
        noise_schedule = noise_schedule.spaced(spacing)
    if noise_schedule.is_flow:
        timesteps, last = _evenly(total), 0.0
    elif noise_schedule.spacing == PUBLISHED.spacing:
        timesteps, last = _evenly(total).round(), 0.0
    else:
        scheduler = reference_timesteps(noise_schedule, total)
        if "model_sampling" not in model.object_patches:
            return scheduler.sigmas[-(steps + 1) :]
        timesteps, last = scheduler.timesteps, float(scheduler.sigmas[-1])
    sigmas = model.get_model_object("model_sampling").sigma(timesteps.float()).float().cpu()
    return torch.cat([sigmas, torch.full((1,), last)])[-(steps + 1) :]


def _evenly(steps: int) -> torch.Tensor:
    """Timesteps (steps,) from 999, in float64."""
    return torch.linspace(0, LAST_TIMESTEP, steps + 1, dtype=torch.float64).flip(0)[:-1]


@dataclass(frozen=True)
class SamplerSettings:
    """A run in the host's words; those of the samplers and schedules are the host's own. schedule: also the
    name of a recipe, which decides steps, cfg and sampler. kv_compression and speed: as on the command line,
    but for files. spacing: of the reference schedule, in place of the checkpoint's own."""

    seed: int = 0
    steps: int = 20
    cfg: float = 4.5
    sampler_name: str = "dpmpp_2m"
    schedule: str = REFERENCE
    denoise: float = 1.0
    kv_compression: str = "auto"
    speed: str = "off"
    spacing: str | None = None


def sample(model, positive, negative, latent: dict, chosen: SamplerSettings) -> dict:
    """The denoised LATENT. Raises SigmaError for latents or settings that the model cannot work with."""
    samples = latent["samples"]
    scale = {name: latent[name] for name in ("downscale_ratio_spacial",) if name in latent}
    samples = comfy.sample.fix_empty_latent_channels(model, samples, **scale)
    check_latents(samples, model.get_model_object("latent_format").latent_channels)
    if not samples.isfinite().all():
        raise SigmaError(
            "The latents contain NaN or infinity. Encode the picture again, with the VAE in fp32."
        )
    _check_prompts(model, positive, negative)
    _check_size(model, samples.shape[-2] * 8, samples.shape[-1] * 8)
    chosen = _as_measured(model, chosen)
    model = _speed_up(_compress(model, chosen.kv_compression), chosen)
    noise = comfy.sample.prepare_noise(samples, chosen.seed, latent.get("batch_index"))
    own = _own_schedule(model, chosen)
    settings = {
        "noise_mask": latent.get("noise_mask"),
        "callback": latent_preview.prepare_callback(model, chosen.steps),
        "disable_pbar": not comfy.utils.PROGRESS_BAR_ENABLED,
        "seed": chosen.seed,
    }
    if own is not None:
        cfg, sampler, sigmas = own
        settings["callback"] = latent_preview.prepare_callback(model, len(sigmas) - 1)
        done = comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas, positive, negative, samples, **settings
        )
    else:
        done = comfy.sample.sample(
            model,
            noise,
            chosen.steps,
            chosen.cfg,
            chosen.sampler_name,
            chosen.schedule,
            positive,
            negative,
            samples,
            denoise=chosen.denoise,
            **settings,
        )
    if not done.isfinite().all():
        raise SigmaError(
            "The sampler's latents are not finite. Load the transformer in bf16 or fp32 rather than fp16, or "
            f"lower cfg, which is {chosen.cfg:g}."
        )
    latent = {name: latent[name] for name in latent if not name.startswith("downscale_ratio")}
    return latent | {"samples": done}


def _own_schedule(model, chosen: SamplerSettings):
    """(cfg, SAMPLER, SIGMAS) of the schedules that are not the host's; None for those. A recipe has no
    guidance, which is said on the node where cfg is another."""
    if chosen.schedule == REFERENCE:
        sampler = comfy.samplers.sampler_object(chosen.sampler_name)
        return chosen.cfg, sampler, reference_sigmas(model, chosen.steps, chosen.denoise, chosen.spacing)
    if chosen.schedule not in RECIPE_NAMES:
        return None
    recipe = chosen.schedule
    if chosen.cfg != 1:
        add_notice(f"{recipe} runs without guidance: cfg was 1, not {chosen.cfg:g}.")
    return 1.0, recipe_sampler(recipe), recipe_sigmas(model, recipe, chosen.denoise)


def _compress(model, setting: str):
    """The MODEL with the sampler's setting; auto leaves what Σ KV Compression has set."""
    named = setting.strip().lower()
    if named == "auto" and is_set(model) or named in ("auto", "off") and not can_compress(model):
        return model
    return set_kv_compression(model, setting)


def _as_measured(model, chosen: SamplerSettings) -> SamplerSettings:
    """The settings with what speed auto was measured to be: with KV compression, where that is auto too, and
    with other steps, where the run is as it was measured."""
    left_alone = chosen.speed != "auto" or chosen.schedule in RECIPE_NAMES or chosen.steps <= FEW_STEPS
    if left_alone or speed_is_set(model) or not can_compress(model):
        return chosen
    whole = chosen.schedule == REFERENCE and chosen.denoise > 0.9999
    # The steps are those that were measured with the reference's sampler.
    as_measured = whole and chosen.sampler_name == SamplerSettings.sampler_name
    choice = measured(model.model, chosen.steps, as_measured)
    logging.getLogger(__name__).info(f"Speed auto is {choice.describe()}.")
    compression = chosen.kv_compression
    if compression == "auto" and choice.rules and not is_set(model):
        compression = spell_rules(choice.rules)
    return replace(
        chosen,
        steps=choice.steps or chosen.steps,
        spacing=choice.spacing,
        speed=spell(choice.savings),
        kv_compression=compression,
    )


def _speed_up(model, chosen: SamplerSettings):
    """The MODEL with the sampler's setting; off and auto leave what Σ Speed has set."""
    named = chosen.speed.strip().lower()
    kept = named == "off" or named == "auto" and (speed_is_set(model) or not can_compress(model))
    if chosen.schedule in RECIPE_NAMES and (speed_is_set(model) or named not in ("off", "auto")):
        raise SigmaError(
            f"The schedule is {chosen.schedule}, of few steps, between which nothing can be forecast. Set "
            "speed to off, and take Σ Speed out."
        )
    if kept or chosen.schedule in RECIPE_NAMES:
        return model
    return set_speed(model, chosen.speed)


def _check_size(model, height: int, width: int):
    """Warn of a picture, in pixels, that is far from those the model was trained on."""
    base = base_size(model)
    if base is None or base**2 / 4 <= height * width <= base**2 * 4:
        add_notice("")
        return
    warning = (
        f"The picture is {width}x{height}, but this model is made for about {base}x{base} pixels; it may "
        "repeat or lose things. Σ Aspect-Ratio Bucket picks a size for it."
    )
    logging.getLogger(__name__).warning(warning)
    add_notice(warning)


def _check_prompts(model, *conditionings):
    """Of the host's own PixArt; ours checks them itself, for every sampler."""
    width = prompt_width(model)
    if width is None:
        return
    for conditioning in conditionings:
        for embeds, _ in conditioning:
            check_conditioning(embeds, width)
