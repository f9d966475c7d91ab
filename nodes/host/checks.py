"""What is not for PixArt-Sigma, said in a sentence before the host's arithmetic fails on it."""

from ...pixart_sigma.errors import SigmaError


def check_latents(latents, channels: int = 4, nested: bool = False) -> None:
    """SigmaError for latents that are not (B, channels, height, width), or are nested or were until they were
    packed."""
    nested = nested or latents.is_nested
    if not nested and latents.ndim == 4 and latents.shape[1] == channels and 0 not in latents.shape:
        return
    shape = "nested, of several kinds" if nested else tuple(latents.shape)
    raise SigmaError(
        f"The latents are {shape}, and (batch, {channels}, height, width) is needed here. They come from "
        "another kind of model: use Σ Aspect-Ratio Bucket, or encode with the SDXL VAE."
    )


def check_conditioning(embeds, width: int) -> None:
    """SigmaError for prompt embeddings that are not (B, tokens, width)."""
    if embeds is None:
        raise SigmaError(
            "The conditioning has no prompt embeddings. Encode the prompt with the T5 that belongs to the "
            "transformer."
        )
    embeddings = embeds.ndim == 3 and embeds.shape[1] > 0
    if embeddings and embeds.shape[-1] == width:
        return
    shape = f"{embeds.shape[-1]} wide" if embeddings else tuple(embeds.shape)
    reads = width if embeddings else f"(batch, tokens, {width})"
    raise SigmaError(
        f"The conditioning is {shape}, and this transformer reads {reads}. Encode the prompt with the T5 "
        "that belongs to the transformer: T5-XXL for PixArt-Sigma, the demo's for the demo."
    )


def check_pictures(pictures) -> None:
    """SigmaError for pictures that are not (B, height, width, 3 or more), of at least one latent pixel."""
    if pictures.ndim == 4 and pictures.shape[-1] >= 3 and min(pictures.shape[1:3]) >= 8 and len(pictures):
        return
    raise SigmaError(
        f"The pictures are {tuple(pictures.shape)}; the SDXL VAE encodes (batch, height, width, 3) from 8x8 "
        "pixels. Convert a mask to an image, and take single pictures of a video."
    )
