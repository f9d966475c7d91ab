"""The SDXL VAE: from a diffusers folder or a single file to pictures, and back to latents."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from ..errors import CheckpointError, SigmaError
from ..files.weight_files import check_file, read_state_dict
from ..memory.stages import free_bytes
from .layers import Decoder, read_decoder
from .memory import least_budget
from .strips import decode_within

SDXL_SCALING_FACTOR = 0.13025
SD15_SCALING_FACTOR = 0.18215
DECODES = ("auto", "whole", "strips", "tiles")


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> AutoencoderKL:
    """An AutoencoderKL in eval mode, without gradients, from what `read_vae` reads; it raises the same."""
    state_dict, config = read_vae(path)
    if any(key.startswith("decoder.mid.") for key in state_dict):
        state_dict = convert_ldm_vae_checkpoint(state_dict, config)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    state_dict = {key: tensor.to(device, dtype) for key, tensor in state_dict.items()}
    missing, left_over = vae.load_state_dict(state_dict, strict=False, assign=True)
    if missing or left_over:
        word, key = ("lacks", missing[0]) if missing else ("has the unknown key", left_over[0])
        raise CheckpointError(f"{path} {word} {key}: it is damaged, or the VAE of another model.")
    return vae.eval().requires_grad_(False)


def read_vae(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights of a VAE and its configuration in diffusers' words.

    `path` is a diffusers folder (`config.json` and weights) or one file, in diffusers' keys or in the keys
    of the original release that ComfyUI uses, with or without `first_stage_model.` in front.
    Raises CheckpointError for another kind of model, and for the VAE of Stable Diffusion 1.x.
    """
    path = Path(path)
    state_dict = {
        key.removeprefix("first_stage_model."): tensor for key, tensor in _read_weights(path).items()
    }
    if "decoder.conv_in.weight" not in state_dict:
        raise CheckpointError(
            f"{path} is not a VAE: it has no decoder.conv_in.weight. Choose the SDXL VAE "
            "(the vae folder of PixArt-Sigma-XL-2-1024-MS, or sdxl_vae.safetensors)."
        )
    config_file = path / "config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else _config_from(state_dict)
    if config.get("scaling_factor") == SD15_SCALING_FACTOR:
        raise CheckpointError(
            f"{path} is the VAE of Stable Diffusion 1.x or 2.x (scaling factor {SD15_SCALING_FACTOR}); "
            f"PixArt-Sigma needs the SDXL VAE ({SDXL_SCALING_FACTOR})."
        )
    if config.get("latent_channels", 4) != 4:
        raise CheckpointError(
            f"{path} makes latents of {config['latent_channels']} channels; "
            "PixArt-Sigma needs the SDXL VAE with 4."
        )
    return state_dict, config


def read_config(path: str | Path) -> dict:
    """The configuration alone, in diffusers' words. It raises as `read_vae`, which maps the weights and reads
    none of them."""
    return read_vae(path)[1]


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        return read_state_dict(path)
    check_file(path)
    return read_state_dict(path)


def _config_from(state_dict: dict[str, torch.Tensor]) -> dict:
    """The configuration that the shapes of a single file imply."""
    diffusers_keys = "decoder.mid_block.resnets.0.conv1.weight" in state_dict
    first = (
        "encoder.down_blocks.{}.resnets.{}.conv1.weight"
        if diffusers_keys
        else "encoder.down.{}.block.{}.conv1.weight"
    )
    widths = []
    while (key := first.format(len(widths), 0)) in state_dict:
        widths.append(state_dict[key].shape[0])
    layers = 0
    while first.format(0, layers) in state_dict:
        layers += 1
    if not widths:
        raise CheckpointError("The VAE file has a decoder but no encoder; choose the whole SDXL VAE.")
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": state_dict["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": SDXL_SCALING_FACTOR,
    }


@torch.no_grad()
def decode(
    vae: AutoencoderKL,
    latents: torch.Tensor,
    how: str = "auto",
    budget: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """Pictures (B, 3, 8h, 8w), float32, in RAM, from sampled latents (B, 4, h, w).

    Black is 0 and white is 1; values a little outside are left for the caller to clamp, after resizing.
    One picture at a time, so that a batch costs no more memory than one.
    how: "whole"; "strips", which is equal to it in less memory, see `strip_decode`; "tiles", diffusers'
    overlapping ones, which differ in tone; "auto", whole where that fits, else in strips.
    budget: bytes on the device for the decode, the weights apart; by default what is free.
    on_progress(done, total) is called between strips; what it raises stops the decode.
    Raises SigmaError for latents of another shape, for a budget that is too small, and when the result is not
    finite.
    """
    if how not in DECODES:
        raise SigmaError(f"The decode is {how!r}; choose one of {', '.join(DECODES)}.")
    channels = vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise SigmaError(
            f"The VAE decodes latents of shape (batch, {channels}, height, width); "
            f"these are {tuple(latents.shape)}."
        )
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    vae.use_tiling = how == "tiles"
    decoder = read_decoder(vae) if how in ("auto", "strips") else None
    pictures = []
    try:
        for number, latent in enumerate(latents):

            def on_strip(done, total, number=number):
                on_progress(number * total + done, len(latents) * total)

            pictures.append(
                decode_within(
                    decoder,
                    latent[None].to(vae.device, vae.dtype) / vae.config.scaling_factor,
                    budget or _free_for(vae, decoder, latent),
                    lambda latent: vae.decode(latent).sample.float().cpu(),
                    on_strip,
                    may_be_whole=how == "auto",
                )
            )
    finally:
        vae.use_tiling = False
        if upcast:
            vae.to(dtype)
    picture = torch.cat(pictures)
    if not torch.isfinite(picture).all():
        raise SigmaError(
            f"The VAE made values that are not finite in {dtype}: decode in bfloat16 or float32, "
            "or use the SDXL VAE that was repaired for float16."
        )
    return picture / 2 + 0.5


def _free_for(vae: AutoencoderKL, decoder: Decoder | None, latent: torch.Tensor) -> int:
    """Bytes that are free on the VAE's device, or what the decode needs at least, if that is more."""
    free = free_bytes(vae.device)
    return (
        free if decoder is None else max(free, least_budget(decoder, *latent.shape[1:], vae.dtype.itemsize))
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, H/8, W/8), scaled as the transformer expects them, from pictures (B, 3, H, W) in [0, 1].

    The mean of the posterior, so that the same picture always gives the same latents.
    """
    pictures = pictures.to(vae.device, vae.dtype) * 2 - 1
    latents = [vae.encode(picture[None]).latent_dist.mean.float() for picture in pictures]
    return torch.cat(latents) * vae.config.scaling_factor
