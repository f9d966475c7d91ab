"""llama.cpp's names for a T5 encoder's weights, and transformers' names for the same."""

import re
from collections.abc import Iterable

WHOLE = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "output.weight": "lm_head.weight",
}
IN_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
IN_A_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")


def to_transformers_names(names: Iterable[str]) -> dict[str, str]:
    """By each name of a file what transformers calls the weight of a T5 that llama.cpp named; the decoder's
    are put behind "decoder.". Without an encoder's blocks every name stays as it is."""
    names = list(names)
    if not any(IN_A_BLOCK.fullmatch(name) for name in names):
        return dict(zip(names, names, strict=True))
    return {name: _to_transformers_name(name) for name in names}


def _to_transformers_name(name: str) -> str:
    found = IN_A_BLOCK.fullmatch(name)
    if found and found[2] in IN_BLOCK:
        return f"encoder.block.{found[1]}.{IN_BLOCK[found[2]]}.weight"
    if name.startswith("dec."):
        return "decoder." + name.removeprefix("dec.")
    return WHOLE.get(name, name)
