"""T5 in two precisions, in the host: one encoder loaded at a time, then its pictures by our sampler."""

from pathlib import Path

import comfy.model_management
import torch
from PIL import Image

from ...pixart_sigma.errors import SigmaError
from . import embeddings
from .kv_compression import is_ours
from .memory import record
from .release import release
from .sampling import sample
from .text_encoder import SECTION, load_clip
from .vae import decode


def compare(
    path: Path, precisions: tuple[str, str], device: str, prompts, model, vae, latent, seed, steps, cfg
):
    """The `PrecisionComparison` of a T5 at `path`; with pictures where there are a MODEL and a VAE.

    device: as for `load_clip`. latent: a LATENT of the pictures' size, or None for the MODEL's base size.
    Raises SigmaError, before anything is loaded, for what can not be compared or drawn.
    """
    from ...pixart_sigma.studies.precision import PrecisionComparison, check_comparison, compare_prompt

    _check_connections(model, vae, latent)
    clips = [load_clip(path, precision, device) for precision in precisions]
    _, nbytes = check_comparison(
        prompts,
        precisions,
        path,
        device=clips[0].patcher.load_device,
        stream=device == "stream",
        caption_channels=model.model.diffusion_model.sigma_config.caption_channels
        if model is not None and is_ours(model)
        else None,
    )
    encoded = []
    for clip, precision in zip(clips, precisions, strict=True):
        with record(f"T5 in {precision}"):
            encoded.append(_encode(clip, (*prompts, "")))

    drawn, settings = [], {}
    if model is not None:
        latent = latent or _base_size(model)
        height, width = (8 * side for side in latent["samples"].shape[-2:])
        settings = {"width": width, "height": height, "steps": steps, "guidance_scale": cfg, "seed": seed}
        drawn = _draw(model, vae, encoded, latent, seed, steps, cfg)
    compared = []
    for index, prompt in enumerate(prompts):
        read = clips[0].tokenizer.untokenize(clips[0].tokenize(prompt)[SECTION][0])
        reference, other = (conditionings[index][0][0] for conditionings in encoded)
        pair = drawn[index] if drawn else ()
        compared.append(compare_prompt(prompt, [piece for _, piece in read], reference, other, pair))
    return PrecisionComparison(tuple(precisions), nbytes, tuple(compared), settings, tuple(drawn))


def _encode(clip, texts) -> list:
    """The conditioning of each text; nothing of the encoder is left, also after an interrupt."""
    try:
        conditionings = []
        for text in texts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            conditionings.append(embeddings.encode(clip, text, False))
        return conditionings
    finally:
        release(clip, "free")


def _draw(model, vae, encoded: list, latent: dict, seed, steps, cfg) -> list[tuple[Image.Image, Image.Image]]:
    """Both pictures of each prompt, from the same noise; all are sampled first, and the VAE loads once."""
    single = latent | {"samples": latent["samples"][:1]}
    with record("Sample"):
        made = [
            sample(model, positive, negative, single, seed, steps, cfg, "dpmpp_2m", "reference", 1.0, "auto")[
                "samples"
            ]
            for (*positives, negative) in encoded
            for positive in positives
        ]
    with record("Decode"):
        pictures = [_to_image(decode(vae, latents, "auto")) for latents in made]
    return list(zip(pictures[: len(pictures) // 2], pictures[len(pictures) // 2 :], strict=True))


def _check_connections(model, vae, latent):
    if (model is None) != (vae is None):
        missing, given = ("MODEL", "VAE") if model is None else ("VAE", "MODEL")
        raise SigmaError(
            f"There is a {given} but no {missing}. Connect both to see pictures, or neither to compare what "
            "T5 makes of the prompts."
        )
    if model is not None and latent is None and not is_ours(model):
        raise SigmaError(
            "The size of the pictures is not known: connect latent_image from Aspect-Ratio Bucket."
        )


def _base_size(model) -> dict:
    """Empty latents of the square that the MODEL was trained for."""
    side = model.model.diffusion_model.sigma_config.sample_size
    return {"samples": torch.zeros(1, 4, side, side)}


def _to_image(pictures: torch.Tensor) -> Image.Image:
    return Image.fromarray((pictures[0].clamp(0, 1) * 255).round().byte().cpu().numpy())
