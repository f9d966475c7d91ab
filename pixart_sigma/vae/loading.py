"""The SDXL VAE from a diffusers folder or a single file."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from ..errors import CheckpointError
from ..files.weight_files import read_state_dict

SDXL_SCALING_FACTOR = 0.13025
SD15_SCALING_FACTOR = 0.18215
# The published VAE, in diffusers' words.
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


def load_vae(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """An AutoencoderKL in eval mode, without gradients, from what `read_vae` reads; it raises the same."""
    state_dict, config = read_vae(path)
    if any(key.startswith("decoder.mid.") for key in state_dict):
        state_dict = convert_ldm_vae_checkpoint(state_dict, config)
    vae = build_vae(config)
    state_dict = {key: tensor.to(device, dtype) for key, tensor in state_dict.items()}
    missing, left_over = vae.load_state_dict(state_dict, strict=False, assign=True)
    if missing or left_over:
        word, key = ("lacks", missing[0]) if missing else ("has the unknown key", left_over[0])
        raise CheckpointError(f"{path} {word} {key}: it is damaged, or the VAE of another model.")
    return vae.eval().requires_grad_(False)


def build_vae(config: dict) -> AutoencoderKL:
    """The VAE of a configuration in diffusers' words, without weights (on the meta device), in eval mode."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(config).eval()


def read_vae(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights of a VAE and its configuration in diffusers' words.

    `path` is a diffusers folder (`config.json` and weights) or one file, in diffusers' keys or in the keys
    of the original release that ComfyUI uses, with or without `first_stage_model.` in front.
    Raises CheckpointError for another kind of model, and for the VAE of Stable Diffusion 1.x.
    """
    path = Path(path)
    state_dict = read_state_dict(path, part="vae")
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


def _config_from(state_dict: dict[str, torch.Tensor]) -> dict:
    """The configuration that the shapes of a single file imply."""
    diffusers_keys = "decoder.mid_block.resnets.0.conv1.weight" in state_dict
    first = (
        "encoder.down_blocks.{}.resnets.{}.conv1.weight"
        if diffusers_keys
        else "encoder.down.{}.block.{}.conv1.weight"
    )
    widths: list[int] = []
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
