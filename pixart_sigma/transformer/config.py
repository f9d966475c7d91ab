"""The sizes of a PixArt-Sigma transformer, read from the shapes of its weights, and which weights it has."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError

KV_KEY = re.compile(r"transformer_blocks\.(\d{1,4})\.attn1\.(?:sr|norm)\.(?:weight|bias)")
BLOCK_KEY = re.compile(r"transformer_blocks\.(\d{1,4})\.")
TIME_CHANNELS = 256  # of the sinusoidal timestep embedding
USUAL_HEAD_DIMS = (72, 64, 32)


@dataclass(frozen=True)
class KVWeights:
    """Trained KV compression: windows of ratio x ratio tokens, on these layers, by a strided convolution."""

    ratio: int
    layers: tuple[int, ...]
    sampling: str = "conv"


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer's sizes; `sample_size` is the latent's side (pixels / 8) that it was trained for."""

    sample_size: int
    interpolation_scale: float
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    patch_size: int
    caption_channels: int
    cross_attention_dim: int
    qk_norm: bool = False
    kv_compression: KVWeights | None = None

    def to_diffusers(self) -> dict:
        """Keyword arguments for diffusers' PixArtTransformer2DModel, which knows no qk-norm or KV weights."""
        return {
            "sample_size": self.sample_size,
            "interpolation_scale": self.interpolation_scale,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "attention_head_dim": self.attention_head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "patch_size": self.patch_size,
            "caption_channels": self.caption_channels,
            "cross_attention_dim": self.cross_attention_dim,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "use_additional_conditions": False,
        }


# The published transformer, PixArt-Sigma-XL/2, as its 1024 files have it; the other variants differ in the
# first two (VARIANTS), not in their weights' shapes.
XL_2 = TransformerConfig(
    sample_size=128,
    interpolation_scale=2.0,
    num_layers=28,
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    patch_size=2,
    caption_channels=4096,
    cross_attention_dim=1152,
)


def is_published_shape(config: TransformerConfig) -> bool:
    """Whether it has the published weights' shapes, with any number of layers."""
    free = ("sample_size", "interpolation_scale", "num_layers")
    return replace(XL_2, **{name: getattr(config, name) for name in free}) == config


def read_config(header: dict, settings: dict, source: Path) -> TransformerConfig:
    """The sizes that the shapes give, and the head count, which only config.json knows.

    `header` is shape and dtype by diffusers key, `settings` a config.json or empty. Leaves `sample_size` and
    `interpolation_scale` at 0, for the variant to set. Raises CheckpointError when the two contradict.
    """

    def shape(key, dimensions):
        found = header.get(key, (None,))[0]
        if found is None:
            raise missing_key(key, source)
        if len(found) != dimensions or 0 in found:
            raise CheckpointError(f"{source}: {key} is {found}, which is not a weight of PixArt-Sigma.")
        return found

    width, in_channels, patch_size, _ = shape("pos_embed.proj.weight", 4)
    out_rows = shape("proj_out.weight", 2)[0]
    layers = {int(match[1]) for match in map(BLOCK_KEY.match, header) if match}
    for layer in range(len(layers) or 1):
        if layer not in layers:
            raise missing_key(f"transformer_blocks.{layer}.scale_shift_table", source)
    heads, head_dim = find_heads(width, settings, source)
    config = TransformerConfig(
        sample_size=0,
        interpolation_scale=0.0,
        num_layers=len(layers),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=out_rows // patch_size**2,
        patch_size=patch_size,
        caption_channels=shape("caption_projection.linear_1.weight", 2)[1],
        cross_attention_dim=width,
        qk_norm=any(".attn1.norm_q." in key or ".attn1.norm_k." in key for key in header),
        kv_compression=_find_kv_weights(header, source),
    )
    for name, value in config.to_diffusers().items():
        if name in ("sample_size", "interpolation_scale", "use_additional_conditions"):
            continue
        if settings.get(name) is not None and settings[name] != value:
            raise CheckpointError(
                f"The config of {source} says {name} {settings[name]!r}, but its weights need "
                f"{value!r}: they do not belong together, or this is not PixArt-Sigma."
            )
    return config


def find_heads(width: int, settings: dict, source: Path) -> tuple[int, int]:
    """(heads, head_dim) of attention of this width, by a config.json's settings, or where there is no choice.

    Raises CheckpointError where the two contradict or nothing says it."""
    heads, head_dim = settings.get("num_attention_heads"), settings.get("attention_head_dim")
    for name, value in (("num_attention_heads", heads), ("attention_head_dim", head_dim)):
        if value is not None and (not isinstance(value, int) or value < 1 or width % value):
            raise CheckpointError(f"The config of {source} says {name} {value!r}, but the width is {width}.")
    if heads is None:
        head_dim = head_dim or _certain_head_dim(width)
        if head_dim is None:
            raise CheckpointError(
                f"Nothing says how many heads the attention of {source} has; width {width} does not. Put the "
                "file into a folder of its own with the config.json of the model, and choose the folder."
            )
        heads = width // head_dim
    if head_dim is not None and heads * head_dim != width:
        raise CheckpointError(
            f"The config of {source} says {heads} heads of {head_dim}, "
            f"but the width of the weights is {width}."
        )
    return heads, width // heads


def _certain_head_dim(width: int) -> int | None:
    """The published one, or the only usual one that divides the width; None if there is a choice."""
    if width == XL_2.cross_attention_dim:
        return XL_2.attention_head_dim
    possible = [dim for dim in USUAL_HEAD_DIMS if width % dim == 0]
    return possible[0] if len(possible) == 1 else None


def _find_kv_weights(header: dict, source: Path) -> KVWeights | None:
    layers = sorted({int(match[1]) for match in map(KV_KEY.fullmatch, header) if match})
    ratios = {}
    for layer in layers:
        key = f"transformer_blocks.{layer}.attn1.sr.weight"
        if key not in header:
            raise missing_key(key, source)
        shape = header[key][0]
        if len(shape) != 4 or shape[2] != shape[3] or shape[2] < 2:
            raise CheckpointError(
                f"{source}: {key} is {shape}; KV compression needs (width, 1, ratio, ratio)."
            )
        ratios[layer] = shape[2]
    if len(set(ratios.values())) > 1:
        said = ", ".join(f"layer {layer}: {ratio}" for layer, ratio in ratios.items())
        raise CheckpointError(
            f"{source} compresses keys and values by different ratios ({said}); one is supported."
        )
    return KVWeights(ratios[layers[0]], tuple(layers)) if layers else None


def expected_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every weight that a transformer of this config has."""
    width, patch = config.cross_attention_dim, config.patch_size

    def module(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (2, width)}
    shapes |= module("pos_embed.proj", width, config.in_channels, patch, patch)
    shapes |= module("adaln_single.emb.timestep_embedder.linear_1", width, TIME_CHANNELS)
    shapes |= module("adaln_single.emb.timestep_embedder.linear_2", width, width)
    shapes |= module("adaln_single.linear", 6 * width, width)
    shapes |= module("caption_projection.linear_1", width, config.caption_channels)
    shapes |= module("caption_projection.linear_2", width, width)
    shapes |= module("proj_out", patch**2 * config.out_channels, width)
    kv = config.kv_compression
    for layer in range(config.num_layers):
        block = f"transformer_blocks.{layer}"
        shapes[f"{block}.scale_shift_table"] = (6, width)
        for name in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= module(f"{block}.{name}.{projection}", width, width)
        shapes |= module(f"{block}.ff.net.0.proj", 4 * width, width)
        shapes |= module(f"{block}.ff.net.2", width, 4 * width)
        if config.qk_norm:
            shapes |= module(f"{block}.attn1.norm_q", width) | module(f"{block}.attn1.norm_k", width)
        if kv and layer in kv.layers:
            shapes |= module(f"{block}.attn1.sr", width, 1, kv.ratio, kv.ratio)
            shapes |= module(f"{block}.attn1.norm", width)
    return shapes


def check_keys(header: dict, config: TransformerConfig, source: Path) -> None:
    """Raise CheckpointError naming a key that is missing, left over or of the wrong shape."""
    expected = expected_shapes(config)
    for key, shape in expected.items():
        if key not in header:
            raise missing_key(key, source)
        if header[key][0] != shape:
            raise CheckpointError(
                f"{source}: {key} is {header[key][0]}, but {shape} is needed. It is damaged."
            )
    left_over = sorted(header.keys() - expected.keys())
    if left_over:
        raise left_over_key(left_over[0], source)


def missing_key(key: str, source: Path) -> CheckpointError:
    return CheckpointError(f"{source} lacks the weight {key}: it is incomplete, download it again.")


def left_over_key(key: str, source: Path) -> CheckpointError:
    return CheckpointError(
        f"{source} has the weight {key}, which PixArt-Sigma has no place for: "
        "it is another model, or a changed one."
    )
