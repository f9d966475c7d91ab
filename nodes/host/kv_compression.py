"""KV compression of a MODEL: a setting of ours, and patched attention of the host's own PixArt-Sigma."""

import functools

import comfy.ldm.modules.attention
import comfy.ldm.pixart.pixartms
from comfy.patcher_extension import WrappersMP

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.transformer.attention import reduce_tokens
from ...pixart_sigma.transformer.calibration import find_calibration
from ...pixart_sigma.transformer.config import TransformerConfig
from ...pixart_sigma.transformer.kv_rules import acting, resolve
from .checks import check_conditioning, check_latents

KV_COMPRESSION = "pixart_sigma_kv_compression"  # in transformer_options: (height, width) in pixels -> rules


def can_compress(model) -> bool:
    return is_ours(model) or _is_hosts_sigma(model)


def is_ours(model) -> bool:
    """Whether a MODEL is from our loader."""
    return hasattr(model.model.diffusion_model, "sigma_config")


def is_set(model) -> bool:
    """Whether a MODEL has a setting of its own already."""
    options = model.model_options["transformer_options"]
    return KV_COMPRESSION in options or bool(model.get_wrappers(WrappersMP.APPLY_MODEL, KV_COMPRESSION))


def set_kv_compression(model, setting: str):
    """A clone of the MODEL that compresses by `setting`, as on the command line but for files.

    "auto" looks at the size of what is sampled, and uses the calibration that lies with the checkpoint then.
    Raises SigmaError for a setting that the MODEL cannot follow, and for one that is not PixArt-Sigma.
    """
    if not can_compress(model):
        raise SigmaError(
            f"KV compression is for PixArt-Sigma, and this MODEL is a {type(model.model).__name__}. Connect "
            "Load Σ Transformer, or ComfyUI's own loader with a PixArt-Sigma file."
        )
    if is_ours(model):
        config = model.model.diffusion_model.sigma_config
    else:
        config = _config(model.model.diffusion_model)
        if setting.strip().lower().startswith("conv"):
            raise SigmaError(
                f"KV compression is {setting!r}, but ComfyUI's own loaders drop trained KV weights. Load the "
                "file with Load Σ Transformer, or use mean."
            )
    rules_for = functools.partial(_rules, setting, config, model.model)
    rules_for(1024, 1024)  # an impossible setting is known here, before anything is sampled
    model = model.clone()
    if is_ours(model):
        model.model_options["transformer_options"][KV_COMPRESSION] = rules_for
    else:
        _patch_attention(model, config.num_layers, rules_for)
    return model


def _rules(setting: str, config, network, height: int, width: int):
    """Asked at each call of the network: a calibration may be written after the node has run."""
    calibrated = None
    if setting.strip().lower() == "auto" and hasattr(network, "checkpoint_path"):
        calibrated = find_calibration(network.checkpoint_path, lambda: network.fingerprint)
    return resolve(setting, config, height, width, calibrated.rules if calibrated else None)


def _is_hosts_sigma(model) -> bool:
    network = model.model.diffusion_model
    return isinstance(network, comfy.ldm.pixart.pixartms.PixArtMS) and not network.micro_conditioning


def prompt_width(model) -> int | None:
    """How wide the embeddings are that the host's own PixArt reads; None for any other MODEL."""
    network = model.model.diffusion_model
    hosts = isinstance(network, comfy.ldm.pixart.pixartms.PixArtMS)
    return network.y_embedder.y_proj.fc1.in_features if hosts else None


def _config(network):
    """What of the host's PixArt KV compression looks at. It is said nothing of the size it is made for."""
    return TransformerConfig(
        sample_size=128,
        interpolation_scale=2,
        num_layers=network.depth,
        num_attention_heads=network.num_heads,
        attention_head_dim=network.hidden_size // network.num_heads,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        patch_size=network.patch_size,
        caption_channels=network.y_embedder.y_proj.fc1.in_features,
        cross_attention_dim=network.hidden_size,
    )


def _patch_attention(model, layers: int, rules_for):
    call = CurrentCall(rules_for, prompt_width(model))
    for layer in range(layers):
        name = f"diffusion_model.blocks.{layer}.attn"
        attend = functools.partial(_attend, model.get_model_object(name), layer, call)
        model.add_object_patch(f"{name}.forward", attend)
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KV_COMPRESSION)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KV_COMPRESSION, call.run)


class CurrentCall:
    """What the attention of the host's PixArt is not told: the rules and the timestep of this call."""

    def __init__(self, rules_for, width: int):
        self.rules_for, self.rules, self.timestep = rules_for, (), 0.0
        self.width = width  # of the prompt's embeddings

    def run(self, executor, x, sigma, c_concat=None, c_crossattn=None, *arguments, **named):
        """A wrapper of the host's apply_model; x (B, 4, h, w), c_crossattn (B, L, C)."""
        check_latents(x)
        check_conditioning(c_crossattn, self.width)
        self.rules = self.rules_for(8 * x.shape[-2], 8 * x.shape[-1])
        if any(rule.windowed for rule in self.rules):
            self.timestep = float(executor.class_obj.model_sampling.timestep(sigma).flatten()[0])
        try:
            return executor(x, sigma, c_concat, c_crossattn, *arguments, **named)
        finally:
            self.rules = ()


def _attend(attn, layer: int, call: CurrentCall, x, mask=None, HW=None, block_id=None):
    """The host's AttentionKVCompress.forward with our operators; HW is the latent's, twice the token grid.

    Keys and values are merged once projected. For these operators that is the same as merging before, which
    saves a part of the projection, but their weights are one matrix here, which may be quantised.
    """
    rule = acting(call.rules, layer, call.timestep)
    if rule is None or HW is None:
        return type(attn).forward(attn, x, mask, HW, block_id)
    grid = HW[0] // 2, HW[1] // 2
    query, key, value = attn.qkv(x).chunk(3, dim=-1)
    query, key = attn.q_norm(query), attn.k_norm(key)
    key, value = reduce_tokens(key, grid, rule), reduce_tokens(value, grid, rule)
    heads = attn.num_heads
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    attended = comfy.ldm.modules.attention.optimized_attention(query, key, value, heads, skip_reshape=True)
    return attn.proj(attended)
