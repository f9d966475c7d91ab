"""What a T5 encoder checkpoint holds: its config, its precision, and its weights ready for transformers."""

import math
import re
from pathlib import Path

import torch

from ..choices import QUANTIZED, T5_PRECISIONS
from ..errors import CheckpointError
from ..files.mapping import Entry, read_tensor
from ..files.quantised_layers import pair_scales
from ..files.reading import AGAIN, parsing
from ..files.weight_files import read_metadata, read_outline, read_state_dict
from .config import check_config, config_from_shapes, read_config
from .quantised_state import check_quantised, needed_beside

EMBEDDING_TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # one table by two names
# Of the whole T5 v1.1, and of what ComfyUI's CLIPSave writes beside any text encoder.
NOT_THE_ENCODERS = ("decoder.", "lm_head.", "logit_scale", "text_projection")
# What bitsandbytes stores beside a quantised weight.
QUANTIZED_COMPANION = re.compile(
    r"^(?P<weight>.+\.weight)(?P<kind>_format|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map"
    r"|\.quant_state\.bitsandbytes__(?:nf4|fp4))$|^(?P<module>.+)\.SCB$"
)
LINEAR = re.compile(r"\.(q|k|v|o|wi|wi_0|wi_1|wo)\.weight$")


def is_linear(key: str) -> bool:
    """Whether the key names the weight of a linear layer."""
    return LINEAR.search(key) is not None


class WatchedWeight:
    """A weight that tells before it is read, the way transformers reads it.

    Transformers reads several at a time while the file may be cut off, and reading what is mapped to it would
    then end the process; so what is stored as it is wanted is read from the file itself.
    """

    def __init__(self, weight, before, place: tuple[Path, Entry] | None = None):
        """place: where the weight lies, if it is known."""
        self.weight, self.before = weight, before
        self.place = None
        if place is not None and isinstance(weight, torch.Tensor):
            if (place[1].shape, place[1].dtype) == (tuple(weight.shape), weight.dtype):
                self.place = place

    def __getitem__(self, index):
        self.before()
        return (self.weight if self.place is None else read_tensor(*self.place))[index]

    def is_floating_point(self) -> bool:
        return self.weight.is_floating_point()


def read_t5(path: Path, outline: bool = False):
    """Read a T5 encoder: a folder with config.json, or one file in Hugging Face keys, whatever else it holds.

    outline: its weights on the meta device, for what only asks for shapes.

    Returns (transformers.T5Config, dict of str to tensor or QuantisedWeight, saved precision or None when the
    weights are not quantised). Raises CheckpointError when a weight is missing, left over or of another
    shape, naming it, and for a config that is not the weights'.
    """
    config, precision = None, None
    if path.is_dir():
        config, precision = read_config(path)
    weights = read_encoder_weights(path, read_outline if outline else read_state_dict)
    tied = weights.pop("encoder.embed_tokens.weight", None)  # the same table as shared.weight
    if tied is not None:
        weights.setdefault("shared.weight", tied)
    if precision is None:
        weights = pair_scales(weights, read_metadata(path), path, is_linear)
        for key, weight in weights.items():
            if not weight.is_floating_point():
                raise CheckpointError(
                    f"{path}: {key} holds {weight.dtype} numbers, not floating-point weights. "
                    "Use an fp32, fp16, bf16, fp8 or GGUF file, or a folder that transformers saved."
                )
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    if config is None:
        config = config_from_shapes(shapes, path)
    else:
        check_config(config, shapes, path)
    check_weights(weights, config, precision, path)
    return config, weights, precision


def read_encoder_weights(path: Path, read=read_state_dict) -> dict[str, torch.Tensor]:
    """The encoder's tensors by their bare names, as they are stored; a whole T5's decoder is left out."""
    weights = read(path, part="text_encoder")
    return {key: weight for key, weight in weights.items() if not key.startswith(NOT_THE_ENCODERS)}


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
        # The dtype of 4-bit weights says nothing: they may be stored as numbers of any kind.
        beside = companions.get(key, set())
        if precision and (weight.dtype in (torch.int8, torch.uint8) or beside - {"_format"}):
            if absent := sorted(needed_beside(precision) - beside):
                raise CheckpointError(
                    f"{path}: {key} is {precision} but its {absent[0].strip('.')} is missing."
                )
            check_quantised(key, weights, expected[key], precision, path)
        elif not weight.is_floating_point():
            raise CheckpointError(f"{path}: {key} holds {weight.dtype} numbers, and floats are needed.")
        elif tuple(weight.shape) != expected[key]:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(weight.shape)}, not the {expected[key]} "
                "of the encoder's config."
            )


def expected_shapes(config, path: Path | str = "config") -> dict[str, tuple[int, ...]]:
    """Keys and shapes of T5EncoderModel(config), counted on the meta device."""
    from transformers import T5EncoderModel

    with parsing(path, "has a config that does not describe a T5 encoder", AGAIN), torch.device("meta"):
        model = T5EncoderModel(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if "embed_tokens" not in key}


def expected_nbytes(weights: dict, precision: str, dtype: torch.dtype) -> int:
    """Bytes the encoder will occupy in a precision, computing in dtype."""
    bits = T5_PRECISIONS[precision].bits if precision in QUANTIZED else 0
    total = 0
    for key, weight in weights.items():
        linear = LINEAR.search(key)
        packed = not weight.is_floating_point() or f"{key}.absmax" in weights
        if packed or QUANTIZED_COMPANION.match(key):
            total += weight.nbytes
        elif linear and linear[1] == "wo":  # never quantised, and never in fp16
            total += weight.numel() * (2 if dtype == torch.bfloat16 else 4)
        elif linear and bits == 8:  # one fp32 scale per row
            total += weight.numel() + 4 * weight.shape[0]
        elif linear and bits == 4:  # one fp32 scale per 64 numbers
            total += weight.numel() // 2 + 4 * math.ceil(weight.numel() / 64) + 64
        else:
            total += weight.numel() * dtype.itemsize
    return total


def _count(keys: list[str]) -> str:
    return f"the weight {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
