"""Random transformers, conditioning for them, and a run of the host's KSampler."""

import torch
from diffusers import PixArtTransformer2DModel

import nodes as host_nodes


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transformer(
    heads,
    layers,
    caption_channels,
    sample_size=128,
    interpolation_scale=2,
    use_additional_conditions=False,
):
    torch.manual_seed(0)
    made = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=72 * heads,
        sample_size=sample_size,
        interpolation_scale=interpolation_scale,
        caption_channels=caption_channels,
        use_additional_conditions=use_additional_conditions,
    )
    return made.eval().requires_grad_(False)


def conditioning(length, width, seed):
    return [[normal(1, length, width, seed=seed), {}]]


def ksampler(model, positive, negative, size, steps=2, cfg=4.5):
    """Latents (1, 4, *size) by the host's own node."""
    latent = {"samples": torch.zeros(1, 4, *size)}
    (made,) = host_nodes.KSampler().sample(
        model, 0, steps, cfg, "dpmpp_2m", "normal", positive, negative, latent
    )
    return made["samples"]


def difference(one, other):
    """The largest one, relative to `other`: a random network's latents are large."""
    assert one.shape == other.shape and one.isfinite().all() and other.isfinite().all()
    return float((one - other).abs().max() / other.abs().max())
