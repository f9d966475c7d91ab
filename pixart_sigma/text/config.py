"""A T5 encoder's config: of its folder's config.json, or from the shapes of its weights; and what contradicts
them."""

import re
from pathlib import Path

from ..choices import QUANTIZED, T5_PRECISIONS
from ..errors import CheckpointError
from ..files.locating import read_json

FIRST_BLOCK = "encoder.block.0.layer."
BIAS = FIRST_BLOCK + "0.SelfAttention.relative_attention_bias.weight"
# Flags that would make it another network, with the one value of a T5 encoder.
FIXED = {"is_decoder": False, "add_cross_attention": False, "scalable_attention": False}
# How results are handed over is the caller's matter, not the file's.
HANDED_OVER = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
POSITIVE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)


def read_config(folder: Path):
    """(T5Config, one of QUANTIZED or None) of a folder's config.json.

    All that changes what T5 computes is obeyed. Raises CheckpointError for what can not be.
    """
    from transformers import T5Config

    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a Hugging Face text encoder folder. "
            "Pass the folder that holds config.json and model*.safetensors, or one merged T5 file."
        )
    settings = read_json(file)
    if settings.get("model_type") != "t5":
        raise CheckpointError(
            f"{file} says model_type {settings.get('model_type')!r}; PixArt-Sigma needs a T5 encoder "
            "(model_type 't5')."
        )
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"{file} says {name} {settings[name]!r}, which a T5 encoder has not.")
    try:
        config = T5Config.from_dict(settings | HANDED_OVER)
    except Exception as error:  # its checks raise classes of their own
        raise CheckpointError(f"{file} does not describe a T5 encoder: {error}") from error
    _check_values(settings, config, file)
    return config, _saved_precision(settings.get("quantization_config"), file)


def _check_values(settings: dict, config, file: Path) -> None:
    for name in POSITIVE:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{file} says {name} {value!r}, which must be a number above 0.")
    exact = (
        config.relative_attention_num_buckets // 4
    )  # of each direction, half the buckets have one distance
    if exact >= config.relative_attention_max_distance:
        raise CheckpointError(
            f"{file} says relative_attention_max_distance {config.relative_attention_max_distance}, which "
            f"must be above {exact}, a quarter of its relative_attention_num_buckets."
        )
    kind, _, function = config.feed_forward_proj.rpartition("-")
    function = "gelu_new" if config.feed_forward_proj == "gated-gelu" else function
    for name, follows in (("dense_act_fn", function), ("is_gated_act", kind == "gated")):
        if settings.get(name, follows) != follows:
            raise CheckpointError(
                f"{file} says {name} {settings[name]!r}, and feed_forward_proj "
                f"{config.feed_forward_proj!r}, which means {follows!r}. Correct one of them."
            )
    from transformers.activations import ACT2FN

    if config.dense_act_fn not in ACT2FN:
        raise CheckpointError(
            f"{file} says feed_forward_proj {config.feed_forward_proj!r}, which is no activation of T5; that "
            "of PixArt-Sigma's has 'gated-gelu'."
        )


def _saved_precision(quantization, file: Path) -> str | None:
    if not quantization:
        return None
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes":
        for name in QUANTIZED:
            asked = T5_PRECISIONS[name].bitsandbytes or {}
            if all(quantization.get(key) == value for key, value in asked.items()):
                return name
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise CheckpointError(
        f"{file} says the encoder is quantised with {method!r}; only bitsandbytes {', '.join(QUANTIZED)} "
        "are read. Use one of those or an unquantised encoder."
    )


def config_from_shapes(shapes: dict[str, tuple[int, ...]], path: Path):
    """T5Config of a merged gated-gelu (T5 v1.1) encoder, from the shapes of its weights.

    `relative_attention_bias` (buckets, heads) gives the heads, the rows of q over the heads give d_kv.
    """
    from transformers import T5Config

    needed = {
        "shared": "shared.weight",
        "bias": BIAS,
        "q": FIRST_BLOCK + "0.SelfAttention.q.weight",
        "wi": FIRST_BLOCK + "1.DenseReluDense.wi_0.weight",
    }
    for key in needed.values():
        if len(shapes.get(key, ())) != 2:
            raise CheckpointError(
                f"{path} has no weight {key}, so it is not a T5 v1.1 encoder in Hugging Face keys. "
                "Use t5xxl_fp16, t5xxl_fp8_e4m3fn, a scaled fp8 of it, or a Hugging Face folder."
            )
    vocab_size, d_model = shapes[needed["shared"]]
    buckets, heads = shapes[needed["bias"]]
    rows = shapes[needed["q"]][0]
    if heads == 0 or rows % heads:
        raise CheckpointError(
            f"{path}: {rows} rows of {needed['q']} do not divide into {heads} heads. Download it again."
        )
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=rows // heads,
        d_ff=shapes[needed["wi"]][0],
        num_layers=_count_blocks(shapes),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def check_config(config, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise CheckpointError, naming the setting, where the weights are of another encoder than the config's.

    shapes: of the weights by key. What a quantised file stores in another shape is not asked.
    """
    seen: dict[str, object] = {"num_layers": _count_blocks(shapes)}
    if len(shapes.get("shared.weight", ())) == 2:
        seen["vocab_size"], seen["d_model"] = shapes["shared.weight"]
    if len(shapes.get(BIAS, ())) == 2:
        seen["relative_attention_num_buckets"], seen["num_heads"] = shapes[BIAS]
    feed_forward = FIRST_BLOCK + "1.DenseReluDense."
    gated, plain = feed_forward + "wi_0.weight" in shapes, feed_forward + "wi.weight" in shapes
    if gated != plain and gated != config.is_gated_act:
        raise CheckpointError(
            f"{path / 'config.json'} says feed_forward_proj {config.feed_forward_proj!r}, and the weights "
            f"{'are' if gated else 'are not'} gated, as {'gated-gelu' if gated else 'relu'} is. The config "
            "and the weights are of two encoders: download both again from one place."
        )
    for name, value in seen.items():
        if value and getattr(config, name) != value:
            raise CheckpointError(
                f"{path / 'config.json'} says {name} {getattr(config, name)}, and the weights have {value}. "
                "The config and the weights are of two encoders: download both again from one place."
            )


def _count_blocks(keys) -> int:
    blocks = [int(match[1]) for key in keys if (match := re.match(r"encoder\.block\.(\d+)\.", key))]
    return max(blocks, default=-1) + 1
