"""Random transformers, conditioning for them, a run of the host's KSampler, and one MODEL on two devices."""

import comfy.model_management
import torch
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode
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


def split(model, monkeypatch):
    """The MODEL by the host's MultiGPU CFG Split, and its copy on a second device, which is the CPU too:
    "cpu" and "cpu:0" are two to the host, and compute alike."""
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *_, **__: devices)
    made = MultiGPUCFGSplitNode.execute(model, 2).result[0]
    (copy,) = made.get_additional_models_with_key("multigpu")
    assert copy.load_device == devices[1] and copy.model is not made.model
    return made, copy


def difference(one, other):
    """The largest one, relative to `other`: a random network's latents are large."""
    assert one.shape == other.shape and one.isfinite().all() and other.isfinite().all()
    return float((one - other).abs().max() / other.abs().max())
