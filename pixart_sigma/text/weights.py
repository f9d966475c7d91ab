"""What a T5 encoder checkpoint holds: its config, its precision, and its weights ready for transformers."""

import json
import math
import re
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files.weight_files import check_file, read_state_dict
from ..settings import QUANTIZED, T5_PRECISIONS

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What bitsandbytes stores beside a quantised weight.
QUANTIZED_COMPANION = re.compile(
    r"^(?P<weight>.+\.weight)(?P<kind>_format|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map"
    r"|\.quant_state\.bitsandbytes__(?:nf4|fp4))$|^(?P<module>.+)\.SCB$"
)
LINEAR = re.compile(r"\.(q|k|v|o|wi|wi_0|wi_1|wo)\.weight$")


def is_linear(key: str) -> bool:
    """Whether the key names the weight of a linear layer."""
    return LINEAR.search(key) is not None


class Float8Weight:
    """An 8-bit float weight (any shape) and its scale, dequantised to float32 only when it is read.

    It answers `tensor[...]`, the way transformers reads the slices of a safetensors file, so that loading
    never holds more than one dequantised weight.
    """

    def __init__(self, weight, scale=None):
        self.weight, self.scale = weight, scale

    def __getitem__(self, index):
        weight = self.weight.float()
        if self.scale is not None:
            scale = self.scale.float()
            weight = weight * (scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1))
        return weight[index]


class WatchedWeight:
    """A weight that tells when it is read, the way transformers reads it."""

    def __init__(self, weight, read):
        self.weight, self.read = weight, read

    def __getitem__(self, index):
        value = self.weight[index]
        self.read()
        return value

    def is_floating_point(self) -> bool:
        return self.weight.is_floating_point()


def read_t5(path: Path):
    """Read a T5 encoder: a folder with config.json, or one merged file in Hugging Face keys.

    Returns (transformers.T5Config, dict of str to tensor or Float8Weight, saved precision or None when the
    weights are not quantised). Raises CheckpointError when a weight is missing, left over or of another
    shape, naming it.
    """
    refuse_gguf(path)
    if path.is_dir():
        config, precision = read_config(path)
        weights = read_state_dict(path)
    else:
        check_file(path)
        weights, config, precision = read_state_dict(path), None, None

    tied = weights.pop("encoder.embed_tokens.weight", None)  # the same table as shared.weight
    if tied is not None:
        weights.setdefault("shared.weight", tied)
    if precision is None:
        weights = wrap_float8(weights, path)
    config = config or config_from_shapes(weights, path)
    check_weights(weights, config, precision, path)
    return config, weights, precision


def refuse_gguf(path: Path) -> None:
    """Raise CheckpointError for a GGUF file, by its name or its first bytes."""
    if path.is_dir():
        found = next(path.glob("*.gguf"), None) if not (path / "config.json").exists() else None
    else:
        found = (
            path if path.suffix.lower() == ".gguf" or (path.is_file() and _starts_with_gguf(path)) else None
        )
    if found:
        raise CheckpointError(
            f"{found} is a GGUF file, which this loader does not read. In ComfyUI load it with the "
            "CLIPLoader (GGUF) node of ComfyUI-GGUF, or use an fp16, fp8 or Hugging Face T5 encoder here."
        )


def _starts_with_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # check_file says what is wrong with it


def read_config(folder: Path):
    """(T5Config, one of QUANTIZED or None) of a folder's config.json. Raises CheckpointError."""
    from transformers import T5Config

    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a Hugging Face text encoder folder. "
            "Pass the folder that holds config.json and model*.safetensors, or one merged T5 file."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can not be read as JSON: {error}. Download it again.") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "t5":
        found = settings.get("model_type") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{file} says model_type {found!r}; PixArt-Sigma needs a T5 encoder (model_type 't5')."
        )
    return T5Config.from_dict(settings), _saved_precision(settings.get("quantization_config"), file)


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


def wrap_float8(weights: dict, path: Path) -> dict:
    """Pair every float8 weight with its `scale_weight`, as ComfyUI's scaled fp8 files store it.

    Removes the scales, `scale_input` and the `scaled_fp8` marker. Raises CheckpointError when a scaled file
    lacks a scale, or a scale does not fit its weight.
    """
    marked = "scaled_fp8" in weights
    scales = {key: value for key, value in weights.items() if key.endswith(".scale_weight")}
    plain = {
        key: value
        for key, value in weights.items()
        if key != "scaled_fp8" and not key.endswith((".scale_weight", ".scale_input"))
    }
    result = {}
    for key, weight in plain.items():
        scale = scales.pop(key.removesuffix("weight") + "scale_weight", None)
        if weight.dtype not in FLOAT8:
            if not weight.dtype.is_floating_point:
                raise CheckpointError(
                    f"{path}: {key} holds {weight.dtype} numbers, not floating-point weights. "
                    "Use an fp32, fp16, bf16 or fp8 file, or a folder that transformers saved."
                )
            if scale is not None:
                weight = Float8Weight(weight, scale)
        elif scale is None and marked and LINEAR.search(key):
            raise CheckpointError(f"{path} is scaled fp8 but has no scale for {key}. Download it again.")
        else:
            weight = Float8Weight(weight, scale)
        if scale is not None and scale.numel() not in (1, *weight.weight.shape[:1]):
            raise CheckpointError(
                f"{path}: the scale of {key} has shape {tuple(scale.shape)}, which does not fit the weight's "
                f"{tuple(weight.weight.shape)}. Only one scale per weight or per row is read."
            )
        result[key] = weight
    return result | scales  # a scale without a weight is left over: check_weights names it


def config_from_shapes(weights: dict, path: Path):
    """T5Config of a merged gated-gelu (T5 v1.1) encoder, from the shapes of its weights.

    `relative_attention_bias` (buckets, heads) gives the heads, the rows of q over the heads give d_kv.
    """
    from transformers import T5Config

    first = "encoder.block.0.layer."
    needed = {
        "shared": "shared.weight",
        "bias": first + "0.SelfAttention.relative_attention_bias.weight",
        "q": first + "0.SelfAttention.q.weight",
        "wi": first + "1.DenseReluDense.wi_0.weight",
    }
    for key in needed.values():
        if key not in weights or len(_shape(weights[key])) != 2:
            raise CheckpointError(
                f"{path} has no weight {key}, so it is not a T5 v1.1 encoder in Hugging Face keys. "
                "Use t5xxl_fp16, t5xxl_fp8_e4m3fn, a scaled fp8 of it, or a Hugging Face folder."
            )
    shape = {name: _shape(weights[key]) for name, key in needed.items()}
    vocab_size, d_model = shape["shared"]
    buckets, heads = shape["bias"]
    if heads == 0 or shape["q"][0] % heads:
        raise CheckpointError(
            f"{path}: {shape['q'][0]} rows of {needed['q']} do not divide into {heads} heads. "
            "Download it again."
        )
    blocks = [int(match[1]) for key in weights if (match := re.match(r"encoder\.block\.(\d+)\.", key))]
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shape["q"][0] // heads,
        d_ff=shape["wi"][0],
        num_layers=max(blocks) + 1,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def check_weights(weights: dict, config, precision: str | None, path: Path) -> None:
    """Raise CheckpointError unless `weights` are exactly those of T5EncoderModel(config), in the right
    shapes."""
    expected = expected_shapes(config, path)
    companions: dict[str, set[str]] = {}
    given = {}
    for key, weight in weights.items():
        match = QUANTIZED_COMPANION.match(key) if precision else None
        if match:
            companions.setdefault(match["weight"] or match["module"] + ".weight", set()).add(
                match["kind"] or "SCB"
            )
        else:
            given[key] = weight

    missing = sorted(expected.keys() - given.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {_count(missing)}. The file is incomplete: download it again.")
    left_over = sorted((given.keys() - expected.keys()) | (companions.keys() - expected.keys()))
    if left_over:
        raise CheckpointError(
            f"{path} holds {_count(left_over)} that a T5 encoder of this size does not have."
        )
    for key, weight in given.items():
        if precision and weight.dtype in (torch.int8, torch.uint8):
            needs = {"SCB"} if T5_PRECISIONS[precision].bits == 8 else {".absmax", ".quant_map"}
            if absent := sorted(needs - companions.get(key, set())):
                raise CheckpointError(
                    f"{path}: {key} is {precision} but its {absent[0].strip('.')} is missing."
                )
        elif _shape(weight) != expected[key]:
            raise CheckpointError(
                f"{path}: {key} has shape {_shape(weight)}, not the {expected[key]} of the encoder's config."
            )


def expected_shapes(config, path: Path | str = "config") -> dict[str, tuple[int, ...]]:
    """Keys and shapes of T5EncoderModel(config), counted on the meta device."""
    from transformers import T5EncoderModel

    try:
        with torch.device("meta"):
            model = T5EncoderModel(config)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: the encoder's config does not describe a T5 encoder: {error}"
        ) from error
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if "embed_tokens" not in key}


def expected_nbytes(weights: dict, precision: str, dtype: torch.dtype) -> int:
    """Bytes the encoder will occupy in a precision, computing in dtype."""
    bits = T5_PRECISIONS[precision].bits if precision in QUANTIZED else 0
    total = 0
    for key, weight in weights.items():
        stored = weight.weight if isinstance(weight, Float8Weight) else weight
        linear = LINEAR.search(key)
        if stored.dtype in (torch.int8, torch.uint8) or QUANTIZED_COMPANION.match(key):
            total += stored.nbytes
        elif linear and linear[1] == "wo":  # never quantised, and never in fp16
            total += stored.numel() * (2 if dtype == torch.bfloat16 else 4)
        elif linear and bits == 8:  # one fp32 scale per row
            total += stored.numel() + 4 * stored.shape[0]
        elif linear and bits == 4:  # one fp32 scale per 64 numbers
            total += stored.numel() // 2 + 4 * math.ceil(stored.numel() / 64) + 64
        else:
            total += stored.numel() * dtype.itemsize
    return total


def _shape(weight) -> tuple[int, ...]:
    return tuple((weight.weight if isinstance(weight, Float8Weight) else weight).shape)


def _count(keys: list[str]) -> str:
    return f"the weight {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
