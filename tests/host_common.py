"""What scripts in the host share: random transformers as files, conditioning, a run of its KSampler."""

COMMON = """
import os
import nodes as host_nodes
import torch
from diffusers import PixArtTransformer2DModel
from pathlib import Path
from safetensors.torch import save_file
from pack.nodes.host.transformer import load_model
from pack.pixart_sigma.errors import SigmaError

folder = Path(os.environ["ARGUMENT_0"])
random = torch.Generator().manual_seed(0)

def normal(*shape):
    return torch.randn(shape, generator=random)

def transformer(heads, layers, caption_channels, sample_size=128, interpolation_scale=2):
    torch.manual_seed(0)
    made = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=72, in_channels=4, out_channels=8,
        num_layers=layers, cross_attention_dim=72 * heads, sample_size=sample_size,
        interpolation_scale=interpolation_scale, caption_channels=caption_channels,
        use_additional_conditions=False,
    )
    return made.eval().requires_grad_(False)

def conditioning(length, width):
    return [[normal(1, length, width), {}]]

def ksampler(model, positive, negative, size, steps=2, cfg=4.5, **latent):
    latent = {"samples": torch.zeros(1, 4, *size)} | latent
    settings = seed, steps, cfg, sampler, schedule = 0, steps, cfg, "dpmpp_2m", "normal"
    return host_nodes.KSampler().sample(model, *settings, positive, negative, latent)[0]["samples"]

def difference(one, other):
    # relative: a random network's latents are large
    assert one.shape == other.shape and one.isfinite().all() and other.isfinite().all()
    return float((one - other).abs().max() / other.abs().max())

def raises(message, act):
    try:
        act()
    except SigmaError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was raised instead of {message}")
"""
