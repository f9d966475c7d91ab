"""Pictures from latents and latents from pictures, by diffusers' VAE as it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL

from ..errors import SigmaError

# Beyond black and white, what a scaling or a decode may leave; more is another range.
OVERSHOOT = 0.5


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, H/8, W/8), scaled as the transformer expects them, from pictures (B, 3, H, W) in [0, 1].

    The mean of the posterior, so that the same picture always gives the same latents.
    Raises SigmaError for tensors of another shape or type, and for those that hold NaN or infinity.
    """
    _check("The VAE encodes pictures (batch, 3, height, width)", pictures, 3)
    least, most = float(pictures.min()), float(pictures.max())
    if least < -OVERSHOOT or most > 1 + OVERSHOOT:
        raise SigmaError(
            f"The VAE encodes pictures with black at 0 and white at 1; these are from {least:g} to {most:g}."
        )
    pictures = pictures.to(vae.device, vae.dtype) * 2 - 1
    latents = [vae.encode(picture[None]).latent_dist.mean.float() for picture in pictures]
    return torch.cat(latents) * vae.config.scaling_factor


def check_latents(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """SigmaError unless latents are finite floats (B, 4, h, w), as this VAE decodes them."""
    channels = vae.config.latent_channels
    _check(f"The VAE decodes latents of shape (batch, {channels}, height, width)", latents, channels)


def _check(wanted: str, tensor: torch.Tensor, channels: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise SigmaError(f"{wanted}; this is a {type(tensor).__name__}.")
    if tensor.ndim != 4 or tensor.shape[1] != channels or 0 in tensor.shape:
        raise SigmaError(f"{wanted}; these are {tuple(tensor.shape)}.")
    if not tensor.is_floating_point():
        raise SigmaError(f"{wanted} in floats; these are {tensor.dtype}.")
    if not tensor.isfinite().all():
        raise SigmaError(f"{wanted}; these hold NaN or infinity.")


@contextmanager
def ready_to_decode(vae: AutoencoderKL, tiles: bool) -> Iterator[None]:
    """Within this block the VAE decodes in tiles or not, and in float32 where it overflows in float16."""
    dtype = vae.dtype
    upcast = decode_dtype(vae, dtype) != dtype
    if upcast:
        vae.to(torch.float32)
    vae.use_tiling = tiles
    try:
        yield
    finally:
        vae.use_tiling = False
        if upcast:
            vae.to(dtype)


def decode_dtype(vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
    """What a VAE that was loaded in `dtype` decodes in."""
    return torch.float32 if dtype == torch.float16 and vae.config.force_upcast else dtype


def scale_pictures(decoded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pictures with black at 0 and white at 1, from the decoder's, with black at -1.

    Raises SigmaError where they are not finite; `dtype` is what the VAE was loaded in.
    """
    if not torch.isfinite(decoded).all():
        raise SigmaError(
            f"The VAE made values that are not finite in {dtype}: decode in bfloat16 or float32, "
            "or use the SDXL VAE that was repaired for float16."
        )
    return decoded / 2 + 0.5
