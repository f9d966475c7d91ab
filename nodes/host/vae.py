"""The SDXL VAE as the host's own VAE object, after the engine has checked the file."""

from fractions import Fraction
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch

SDXL_WIDTHS = [128, 256, 512, 512]


class _Share(Fraction):
    """A level's width as a share of the first one's: the host multiplies the two and wants a whole number."""

    def __rmul__(self, width: int) -> int:
        return int(width * Fraction(self))


def load_vae(path: Path) -> comfy.sd.VAE:
    """The host's VAE from a file or a diffusers folder; CheckpointError for anything but a VAE for Sigma."""
    from ...pixart_sigma.vae import read_vae

    if (path / "vae").is_dir():
        path = path / "vae"
    state_dict, config = read_vae(path)
    widths = config["block_out_channels"]
    return comfy.sd.VAE(sd=state_dict, config=None if widths == SDXL_WIDTHS else _host_config(config))


def decode_whole(vae: comfy.sd.VAE, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, H, W, 3) in [0, 1] from latents (B, 4, h, w), one at a time and never in tiles.

    The host's own `decode` goes over to tiles when memory runs out; this one raises.
    """
    needed = vae.memory_used_decode((1, *latents.shape[1:]), vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
    pictures = [
        vae.process_output(
            vae.first_stage_model.decode(latent[None].to(vae.device, vae.vae_dtype))
            .to(vae.output_device)
            .float()
        )
        for latent in latents
    ]
    return torch.cat(pictures).movedim(1, -1)


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
