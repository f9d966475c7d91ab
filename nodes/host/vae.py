"""The SDXL VAE as the host's own VAE object, after the engine has checked the file."""

from fractions import Fraction
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...pixart_sigma.errors import CheckpointError, SigmaError
from .checks import check_latents, check_pictures

STEPS = 100  # of the progress bar, for each picture


# What the host does not read from a config.json, as it has it.
ONLY = {
    "scaling_factor": 0.13025,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}


class _Share(Fraction):
    """A level's width as a share of the first one's: the host multiplies the two and wants a whole number."""

    def __rmul__(self, width: int) -> int:
        return int(width * Fraction(self))


class SigmaVAE(comfy.sd.VAE):
    """The host's VAE, that says what it can not work on."""

    def decode(self, samples_in, *arguments, **settings):
        return super().decode(_single_frame(samples_in), *arguments, **settings)

    def decode_tiled(self, samples, *arguments, **settings):
        return super().decode_tiled(_single_frame(samples), *arguments, **settings)

    def encode(self, pixel_samples, *arguments, **settings):
        check_pictures(pixel_samples)
        return super().encode(pixel_samples, *arguments, **settings)

    def encode_tiled(self, pixel_samples, *arguments, **settings):
        check_pictures(pixel_samples)
        return super().encode_tiled(pixel_samples, *arguments, **settings)


def _single_frame(latents: torch.Tensor) -> torch.Tensor:
    """The latents (B, 4, h, w), also of a single frame, which the host itself takes; the check of others."""
    if latents.ndim == 5 and latents.shape[2] == 1:
        latents = latents[:, :, 0]
    check_latents(latents)
    return latents


def load_vae(path: Path) -> comfy.sd.VAE:
    """The host's VAE from a file or a diffusers folder; CheckpointError for anything but a VAE for Sigma."""
    from ...pixart_sigma.vae.loading import SDXL_VAE, read_vae

    if (path / "vae").is_dir():
        path = path / "vae"
    state_dict, config = read_vae(path)
    _check_config(config, path)
    # Copies: a small model is not worth watching its file for.
    state_dict = {key: tensor.clone() for key, tensor in state_dict.items()}
    widths, layers = tuple(config["block_out_channels"]), config["layers_per_block"]
    published = (widths, layers) == (SDXL_VAE["block_out_channels"], SDXL_VAE["layers_per_block"])
    return SigmaVAE(
        sd=state_dict,
        config=None if published else _host_config(config),
    )


def _check_config(config: dict, path: Path) -> None:
    """CheckpointError for a VAE that the engine runs and the host would run differently."""
    for name, only in ONLY.items():
        found = config.get(name, only)
        found = tuple(dict.fromkeys(found)) if isinstance(found, list | tuple) else found
        if found != only:
            shown = only[0] if isinstance(only, tuple) else only
            raise CheckpointError(
                f"The config.json of {path} says {name} {config[name]!r}, and ComfyUI's VAE and MODEL have "
                f"{shown!r}. Use the SDXL VAE."
            )


def decode(vae: comfy.sd.VAE, latents: torch.Tensor, how: str, budget: float | None = None) -> torch.Tensor:
    """Pictures (B, H, W, 3) in [0, 1] from latents (B, 4, h, w), one at a time and never in tiles.

    how: "whole", "strips", or "auto": whole where that fits in `budget` bytes, by default in what is free,
    and else in strips. A VAE that is built differently, such as a preview decoder, is decoded whole.
    Raises SigmaError where the VAE has to be in strips and can not, and for a budget that is too small.
    """
    from ...pixart_sigma.vae.layers import read_decoder
    from ...pixart_sigma.vae.stage import decode_picture, ways_within

    decoder = read_decoder(vae.first_stage_model)
    if decoder is None and how == "strips":
        raise SigmaError(
            "This VAE is not built like the SDXL VAE and can not be decoded in strips. Choose auto."
        )
    budget = _make_room(vae, decoder, latents, how, budget)
    bar = comfy.utils.ProgressBar(len(latents) * STEPS)

    def decode_whole(latent):
        return vae.first_stage_model.decode(latent).to(vae.output_device).float()

    # Where memory runs out in a decode that has to be whole, the host knows more ways than we do.
    ways = []
    if decoder is not None and how != "whole":
        ways = ways_within(decoder, (*latents.shape[2:], vae.vae_dtype.itemsize), budget, how)
    pictures = []
    for number, latent in enumerate(latents):

        def on_strip(done, total, number=number):
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(number * STEPS + STEPS * done // total)

        latent = latent[None].to(vae.device, vae.vae_dtype)
        if ways:
            picture, way = decode_picture(decoder, latent, ways, decode_whole, on_strip)
            ways = ways[ways.index(way) :]  # what did not fit once is not tried again
        else:
            picture = decode_whole(latent)
        pictures.append(vae.process_output(picture.to(vae.output_device)))
    return torch.cat(pictures).movedim(1, -1)


def _make_room(vae: comfy.sd.VAE, decoder, latents: torch.Tensor, how: str, budget: float | None) -> float:
    """Load the VAE with room for the decode; the bytes that there are for it.

    The host makes room by moving other models away, and never fails if it can not. It must not take what is
    missing from the VAE's own weights, which every strip needs.
    """
    from ...pixart_sigma.vae.memory import least_budget, whole_decode_bytes

    if decoder is None:
        least = wanted = vae.memory_used_decode((1, *latents.shape[1:]), vae.vae_dtype)
    else:
        shape = (*latents.shape[2:], vae.vae_dtype.itemsize)
        least = least_budget(decoder, *shape)
        wanted = least if how == "strips" else whole_decode_bytes(decoder, *shape)
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=min(wanted, budget or wanted), force_full_load=True
    )
    return budget or max(vae.patcher.get_free_memory(vae.device), least)


def _host_config(config: dict) -> dict:
    widths = config["block_out_channels"]
    return {
        "params": {
            "embed_dim": config["latent_channels"],
            "ddconfig": {
                "double_z": True,
                "z_channels": config["latent_channels"],
                "resolution": 256,
                "in_channels": config["in_channels"],
                "out_ch": config["out_channels"],
                "ch": widths[0],
                "ch_mult": [_Share(width, widths[0]) for width in widths],
                "num_res_blocks": config["layers_per_block"],
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        }
    }
