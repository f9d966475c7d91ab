import torch

from pixart_sigma.pipeline import DEMO
from pixart_sigma.vae.loading import load_vae
from pixart_sigma.vae.stage import decode

# ComfyUI computes a level's width as `ch * ch_mult[level]` and wants whole numbers; the demo's levels are
# 96, 32, 32 and 96 wide.
SCRIPT = """
import json, os
from fractions import Fraction
import torch
from safetensors.torch import load_file
from comfy.sd import VAE

class Share(Fraction):
    def __rmul__(self, width):
        return int(width * Fraction(self))

folder, given, out = (os.environ[f"ARGUMENT_{index}"] for index in range(3))
config = json.load(open(f"{folder}/config.json"))
widths = config["block_out_channels"]
vae = VAE(
    sd=load_file(f"{folder}/diffusion_pytorch_model.safetensors"),
    config={"params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True, "z_channels": 4, "resolution": 256,
            "in_channels": 3, "out_ch": 3, "dropout": 0.0,
            "ch": widths[0], "ch_mult": [Share(width, widths[0]) for width in widths],
            "num_res_blocks": config["layers_per_block"], "attn_resolutions": [],
        },
    }},
    dtype=torch.float32,
)
torch.save(vae.decode(torch.load(given) / config["scaling_factor"]), out)
"""


def test_comfyui_decodes_with_the_demo_vae_as_we_do(run_in_host, tmp_path):
    latents = torch.randn(1, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    torch.save(latents, tmp_path / "latents.pt")
    run_in_host(SCRIPT, DEMO / "vae", tmp_path / "latents.pt", tmp_path / "picture.pt")
    theirs = torch.load(tmp_path / "picture.pt").permute(0, 3, 1, 2)
    ours = decode(load_vae(DEMO / "vae"), latents).clamp(0, 1)
    assert theirs.shape == ours.shape == (1, 3, 192, 128)
    assert (ours - theirs).abs().max() < 1e-3
