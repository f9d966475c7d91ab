import json
import shutil
from fractions import Fraction

import pytest
import torch
from comfy.sd import VAE
from pack.nodes.host.vae import load_vae as load_host_vae
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import CheckpointError
from pack.pixart_sigma.vae.loading import load_vae
from pack.pixart_sigma.vae.stage import decode
from safetensors.torch import load_file


class Share(Fraction):
    """ComfyUI computes a level's width as `ch * ch_mult[level]` and wants whole numbers; the demo's levels
    are 96, 32, 32 and 96 wide."""

    def __rmul__(self, width):
        return int(width * Fraction(self))


def the_hosts_vae(folder) -> tuple[VAE, float]:
    """The VAE in a folder as the host builds it, and the scale of its latents."""
    config = json.loads((folder / "config.json").read_text())
    widths = config["block_out_channels"]
    shape = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "dropout": 0.0,
        "ch": widths[0],
        "ch_mult": [Share(width, widths[0]) for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
    }
    vae = VAE(
        sd=load_file(folder / "diffusion_pytorch_model.safetensors"),
        config={"params": {"embed_dim": 4, "ddconfig": shape}},
        dtype=torch.float32,
    )
    return vae, config["scaling_factor"]


def test_comfyui_decodes_with_the_demo_vae_as_we_do():
    latents = torch.randn(1, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    vae, scale = the_hosts_vae(DEMO / "vae")
    theirs = vae.decode(latents / scale).permute(0, 3, 1, 2)
    ours = decode(load_vae(DEMO / "vae"), latents).clamp(0, 1)
    assert theirs.shape == ours.shape == (1, 3, 192, 128)
    assert (ours - theirs).abs().max() < 1e-3


def test_a_config_that_the_host_can_not_obey_is_refused(tmp_path):
    config = json.loads((DEMO / "vae" / "config.json").read_text())
    shutil.copytree(DEMO / "vae", tmp_path / "vae")
    for change, words in (
        ({"scaling_factor": 0.2}, r"scaling_factor 0\.2, and ComfyUI's VAE and MODEL have 0\.13025"),
        ({"norm_num_groups": 16}, "norm_num_groups 16"),
    ):
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=words):
            load_host_vae(tmp_path)
    del config["scaling_factor"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert isinstance(load_host_vae(tmp_path), VAE)
