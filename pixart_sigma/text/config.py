"""A T5 encoder's config: of its folder's config.json, or from the shapes of its weights; and what contradicts
them."""

import itertools
import re
from pathlib import Path

from ..choices import QUANTIZED, T5_PRECISIONS
from ..errors import CheckpointError
from ..files.reading import AGAIN, parsing, read_json

FIRST_BLOCK = "encoder.block.0.layer."
BIAS = FIRST_BLOCK + "0.SelfAttention.relative_attention_bias.weight"
# Flags that would make it another network, with the one value of a T5 encoder.
FIXED = {"is_decoder": False, "add_cross_attention": False, "scalable_attention": False}
# All of a config.json that reaches transformers, and the type of each: what else one may say decides nothing
# of an encoder, or what is not a file's to decide, as which code computes the attention.
SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
KNOWN: dict[str, tuple[type, ...]] = {name: (int,) for name in SIZES}
KNOWN |= {"layer_norm_epsilon": (float,), "feed_forward_proj": (str,)}
LARGEST = 2**24  # of any size
# The same of what it says of bitsandbytes.
QUANTISATION: dict[str, tuple[type, ...]] = {
    "quant_method": (str,),
    "load_in_8bit": (bool,),
    "load_in_4bit": (bool,),
    "llm_int8_threshold": (int, float),
    "llm_int8_skip_modules": (list, type(None)),
    "bnb_4bit_quant_type": (str,),
    "bnb_4bit_use_double_quant": (bool,),
    "bnb_4bit_quant_storage": (str,),
    "bnb_4bit_compute_dtype": (str,),
}
INT8_THRESHOLD = 6.0  # LLM.int8(): activations beyond it are multiplied unquantised (Dettmers et al., 2022)
STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32")


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
    known = _known(settings, KNOWN, file)
    with parsing(file, "does not describe a T5 encoder", AGAIN):
        config = T5Config(**known, tie_word_embeddings=False)
    _check_values(settings, config, file)
    quantization = settings.get("quantization_config")
    precision = _saved_precision(quantization, file)
    if precision and isinstance(quantization, dict):
        config.quantization_config = _read_quantization(quantization, file)
    return config, precision


def _known(settings: dict, types: dict[str, tuple[type, ...]], file: Path) -> dict:
    """Of the settings those that are known, each of its type. Raises CheckpointError."""
    known = {name: settings[name] for name in types if name in settings}
    for name, value in known.items():
        if type(value) not in types[name]:
            words = " or ".join(kind.__name__ for kind in types[name])
            raise CheckpointError(
                f"{file} does not describe a T5 encoder: {name} is {value!r}, and {words} is needed. "
                "Download it again."
            )
    return known


def _read_quantization(said: dict, file: Path) -> dict:
    """What a folder says of bitsandbytes, as far as it is known."""
    known = _known(said, QUANTISATION, file)
    skipped = known.get("llm_int8_skip_modules") or []
    threshold = known["llm_int8_threshold"] = float(known.get("llm_int8_threshold", INT8_THRESHOLD))
    storage = known.get("bnb_4bit_quant_storage", STORAGES[0])
    names = all(isinstance(name, str) for name in skipped)
    if not names or not 0 <= threshold < LARGEST or storage not in STORAGES:
        raise CheckpointError(f"{file} says of its quantisation what can not be: {known}. Download it again.")
    return known


def _check_values(settings: dict, config, file: Path) -> None:
    for name in (*SIZES, "layer_norm_epsilon"):
        value = getattr(config, name)
        if not 0 < value <= LARGEST:
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
    """How many blocks follow one another from the first; what is of others is left over."""
    blocks = {match[1] for key in keys if (match := re.match(r"encoder\.block\.(\d+)\.", key))}
    return next(count for count in itertools.count() if str(count) not in blocks)
