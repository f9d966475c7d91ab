"""The engine's transformer as the host's MODEL."""

import logging
from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP

from ...pixart_sigma.choices import DTYPES
from ...pixart_sigma.errors import CheckpointError, SigmaError
from ...pixart_sigma.files.fingerprint import fingerprint
from ...pixart_sigma.files.mapping import Whole
from ...pixart_sigma.files.parts import FACTS
from ...pixart_sigma.files.quantised_weights import QuantisedWeight
from ...pixart_sigma.files.weight_files import facts_tensor
from ...pixart_sigma.noise_schedule import PUBLISHED
from ...pixart_sigma.transformer.cost import activation_bytes
from ...pixart_sigma.transformer.keys import to_original_keys
from .checks import check_conditioning, check_latents
from .lora import NamedTwice
from .noise_schedule import MODEL_TYPES, make_model_sampling, sampling_settings
from .patcher import make_patcher

logger = logging.getLogger(__name__)

# Red, green and blue from the four channels of the demo's latents, and what is added, by
# `python tools/demo/fit_latent_rgb.py`.
DEMO_LATENT_RGB = (
    [[0.1223, 0.0251, 0.27], [-0.3138, 0.3425, 0.3708], [0.3671, 0.2028, 0.3666], [0.3796, 0.302, -0.2614]],
    [0.2263, 0.0883, 0.0634],
)


def load_model(path: Path, variant: str | None = None, dtype=None, disable_dynamic: bool = False):
    """The host's MODEL, a patcher, of the transformer at `path`; weights that fit stay mapped to the file.

    variant: "256", "512", "1024" or "2K" for a file that does not say; None finds out. dtype: "bf16", "fp16",
    "fp32", a torch dtype, or None for what the host picks. Quantised weights are dequantised to it, which the
    log says. Raises CheckpointError for anything but a whole PixArt-Sigma transformer.
    """
    from ...pixart_sigma.transformer.calibration import fingerprint_of
    from ...pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
    from .network import build_network

    checkpoint = inspect(path, variant)
    files = Whole(checkpoint.components["transformer"])
    state_dict = load_transformer_state_dict(checkpoint)
    config = _host_config(checkpoint, sum(tensor.numel() for tensor in state_dict.values()), dtype)
    if checkpoint.latent_format == "demo":
        config.latent_format = DemoLatents()
    dtype = config.unet_config["dtype"]
    operations = comfy.ops.pick_operations(dtype, config.manual_cast_dtype)
    network = build_network(checkpoint.config, operations)
    model = SigmaModel(config, network, checkpoint.noise_schedule)
    model.checkpoint_path, model.fingerprint = checkpoint.path, fingerprint_of(state_dict)
    model.facts, model.variant_notice = checkpoint.facts, checkpoint.variant_notice
    read = repr((checkpoint.config, checkpoint.noise_schedule, checkpoint.latent_format)).encode()
    model.file_fingerprint = fingerprint(state_dict, read)
    _dequantise(state_dict, checkpoint, dtype)
    patcher = make_patcher(model, disable_dynamic)
    if not patcher.is_dynamic():  # which casts on the way to the device
        for name in state_dict:
            files.check()
            state_dict[name] = state_dict[name].to(patcher.offload_device, dtype)
    network.load_state_dict(state_dict, assign=True)
    network.eval().requires_grad_(False)
    network.dtype = dtype
    for module in network.modules():
        for name, _ in module.named_parameters(recurse=False):
            setattr(module, f"{name}_comfy_model_dtype", dtype)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "pixart_sigma_latents", _check_latents)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "pixart_sigma_files", _checking(files))
    patcher.cached_patcher_init = (load_again, (path, variant, dtype, model.file_fingerprint))
    return patcher


def load_again(path: Path, variant: str | None, dtype, known: str, disable_dynamic: bool = False):
    """The MODEL that `load_model` made of a file, with weights of its own: the host asks for it for another
    device. Raises CheckpointError where the file is not what it was."""
    patcher = load_model(path, variant, dtype, disable_dynamic)
    if patcher.model.file_fingerprint != known:
        raise CheckpointError(
            f"{path} was changed after this MODEL was loaded, so a copy for another device would be another "
            "model. Load it anew: change an input of Load Σ Transformer, or restart ComfyUI."
        )
    return patcher


def _dequantise(state_dict: dict, checkpoint, dtype) -> None:
    """Dequantise what is quantised, in place, and say what that takes."""
    quantised = [name for name, weight in state_dict.items() if isinstance(weight, QuantisedWeight)]
    for name in quantised:
        state_dict[name] = state_dict[name].dequantise().to(dtype)
    if quantised:
        taken = sum(state_dict[name].nbytes for name in quantised)
        logger.info(
            f"{checkpoint.path.name} is quantised ({checkpoint.storage}). In ComfyUI it is dequantised "
            f"when it is loaded, and takes {taken / 1e9:.2f} GB in {str(dtype).removeprefix('torch.')}."
        )


def _host_config(checkpoint, parameters: int, dtype):
    """The host's description of PixArt-Sigma, with these sizes and the dtypes of weights and computation."""
    sizes = checkpoint.config
    config = comfy.supported_models.PixArtSigma(
        {
            "image_model": "pixart_sigma",
            "depth": sizes.num_layers,
            "hidden_size": sizes.cross_attention_dim,
            "num_heads": sizes.num_attention_heads,
            "in_channels": sizes.in_channels,
            "disable_unet_model_creation": True,
        }
    )
    config.sampling_settings = sampling_settings(checkpoint.noise_schedule)
    management = comfy.model_management
    supported = config.supported_inference_dtypes
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=parameters, supported_dtypes=supported, weight_dtype=checkpoint.dtype
        )
    dtype = getattr(torch, DTYPES[dtype]) if isinstance(dtype, str) else dtype
    manual_cast = management.unet_manual_cast(dtype, management.get_torch_device(), supported)
    config.set_inference_dtype(dtype, manual_cast)
    config.unet_config = Sizes(config.unet_config)
    return config


class MissingSize(SigmaError, KeyError):
    """What a node for other models looks for and does not find."""

    __str__ = SigmaError.__str__


class Sizes(dict):
    """The host's description of a network, which says of what it has not why that is so."""

    def __missing__(self, name):
        raise MissingSize(
            f"A node asks this MODEL for its {name}, which PixArt-Sigma has not: the node is for other "
            "models, as FreeU is for the U-Nets of Stable Diffusion. Take it out of the graph."
        )


def _check_latents(executor, noise, latent_image, *arguments, **named):
    """A wrapper of the host's sampling, which packs nested latents and says so by their shapes."""
    channels = executor.class_obj.model_patcher.model.latent_format.latent_channels
    check_latents(latent_image, channels, nested=len(named.get("latent_shapes") or ()) > 1)
    return executor(noise, latent_image, *arguments, **named)


def _checking(files: Whole):
    """A wrapper of the host's sampling, before which weights are copied from their files to the device."""

    def check(executor, *arguments, **named):
        files.check()
        return executor(*arguments, **named)

    return check


class DemoLatents(comfy.latent_formats.SDXL):
    """SDXL's scale; the colours, for previews, are those of the demo's own VAE."""

    def __init__(self):
        super().__init__()
        self.latent_rgb_factors, self.latent_rgb_factors_bias = DEMO_LATENT_RGB
        self.taesd_decoder_name = None


class SigmaModel(comfy.model_base.PixArt):
    """The host's PixArt with our network; clones of a MODEL share it, so it keeps no settings."""

    def __init__(self, config, network, noise_schedule=PUBLISHED):
        super().__init__(config, MODEL_TYPES[noise_schedule.prediction_type])
        self.diffusion_model = network
        self.noise_schedule = noise_schedule
        self.model_sampling = make_model_sampling(self, noise_schedule)

    def extra_conds(self, **kwargs):
        """Embeddings (B, L, C) and their mask; not the host's c_size and c_ar, which are for PixArt-alpha."""
        conds = super(comfy.model_base.PixArt, self).extra_conds(**kwargs)
        embeds = kwargs.get("cross_attn")
        if embeds is None and "c_crossattn" in kwargs.get("model_conds", {}):
            return conds
        check_conditioning(embeds, self.diffusion_model.sigma_config.caption_channels)
        mask = kwargs.get("attention_mask")
        if mask is None or mask.shape != embeds.shape[:2]:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        conds["c_crossattn"] = PaddedCond(embeds)
        conds["context_mask"] = MaskCond(mask.bool())
        return conds

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes that a forward pass needs for what it computes, and for weights while they are cast."""
        config = self.diffusion_model.sigma_config
        batch, _, height, width = input_shape
        size = comfy.model_management.dtype_size(self.get_dtype_inference())
        prompts = (cond_shapes or {}).get("c_crossattn", [])
        length = max((shape[1] for shape in prompts), default=0)
        needed = activation_bytes(config, batch, height, width, length, size)
        if self.manual_cast_dtype is not None:
            needed += 4 * config.cross_attention_dim**2 * size
        return needed

    def state_dict_for_saving(self, unet_state_dict, *others, **settings):
        """By the authors' names, which every loader of the host knows, with what the shapes do not tell.

        The weights are patched when `to` is called, as the host's are.
        """
        authors = {
            name: unet_state_dict[parts[0]]
            if len(parts) == 1
            else torch.cat([unet_state_dict[part].to("cpu") for part in parts])
            for name, parts in to_original_keys(unet_state_dict).items()
        }
        state_dict = super().state_dict_for_saving(authors, *others, **settings)
        return state_dict | {FACTS: facts_tensor(self.facts)}

    def state_dict(self, *arguments, **settings):
        state_dict = super().state_dict(*arguments, **settings)
        return NamedTwice(state_dict, self.diffusion_model.inner_dim)


class PaddedCond(comfy.conds.CONDRegular):
    """A tensor (B, L, ...) that shares a call with longer ones, zeros behind it."""

    def can_concat(self, other):
        ours, theirs = self.cond, other.cond
        same = ours.shape[0] == theirs.shape[0] and ours.shape[2:] == theirs.shape[2:]
        return same and ours.device == theirs.device

    def concat(self, others):
        tensors = [self.cond, *(other.cond for other in others)]
        length = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([_pad(tensor, length) for tensor in tensors])


class MaskCond(PaddedCond):
    """True for real tokens; None, which is faster, when all that share a call are."""

    def __init__(self, cond, full=None):
        super().__init__(cond)
        self.full = bool(cond.all()) if full is None else full

    def _copy_with(self, cond):
        return MaskCond(cond, self.full)

    def concat(self, others):
        conds = [self, *others]
        if all(cond.full and cond.cond.shape[1] == self.cond.shape[1] for cond in conds):
            return None
        return super().concat(others)


def _pad(tensor, length):
    zeros = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, zeros], dim=1)
