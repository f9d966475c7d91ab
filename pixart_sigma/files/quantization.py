"""How the weights of a model are quantised, by their names and dtypes and by what lies beside them."""

from collections.abc import Iterable

import torch

from .gguf import BlockType
from .quantised_layers import LAYER_FORMATS

# What stands in a name, and what wrote it. The first that fits.
MARKS = (
    (".quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes fp4"),
    (".SCB", "bitsandbytes int8"),
    (".comfy_quant", "ComfyUI's quantisation by layer"),
    ("scaled_fp8", "ComfyUI's scaled fp8"),
    (".scale_weight", "ComfyUI's scaled fp8"),
    (".wscales", "SVDQuant"),
    (".smooth_factor", "SVDQuant"),
    (".proj_down", "SVDQuant"),
    (".qzeros", "GPTQ or AWQ"),
    (".qweight", "GPTQ or AWQ"),
    (".weight._data", "quanto"),
    (".weight_scale", "scales beside the weights"),
    (".input_scale", "scales beside the weights"),
    (".absmax", "bitsandbytes 4-bit"),
    (".zero_point", "SDNQ"),
    (".svd_up", "SDNQ"),
)
INTEGERS = (torch.int8, torch.uint8)


def quantization_of(
    names: Iterable[str],
    dtypes: Iterable[torch.dtype | BlockType],
    settings: dict | None = None,
    metadata=None,
) -> str:
    """The quantisation in words, "" for plain weights (float8 without scales among them).

    settings: the model's config.json; metadata: the file's.
    """
    config = (settings or {}).get("quantization_config")
    if isinstance(config, dict):
        method = config.get("quant_method", "an unknown method")
        kinds = [config.get("bnb_4bit_quant_type", "4-bit")] if config.get("load_in_4bit") else []
        kinds += ["int8"] if config.get("load_in_8bit") else []
        return " ".join(map(str, [method, *kinds]))
    names = list(names)
    for mark, words in MARKS:
        if any(mark in name for name in names):
            return words
    if LAYER_FORMATS in (metadata or {}):
        return "ComfyUI's quantisation by layer"
    dtypes = list(dtypes)
    for dtype in dtypes:
        if isinstance(dtype, BlockType):
            return f"{dtype.name} of GGUF"
    integers = [dtype for dtype in dtypes if dtype in INTEGERS]
    return str(integers[0]).removeprefix("torch.") if integers else ""
