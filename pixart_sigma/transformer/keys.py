"""The authors' names for the transformer's weights, and diffusers' names for the same.

The map is that of diffusers' scripts/convert_pixart_sigma_to_diffusers.py, with what it leaves out: trained
KV compression (`attn.sr`, `attn.norm`) and qk-norm (`attn.q_norm`, `attn.k_norm`).
"""

import re
from collections.abc import Iterable

# How many diffusers tensors a fused one holds, one after the other along dimension 0.
FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
MODULES = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
BLOCK_MODULES = {
    "attn.proj": "attn1.to_out.0",
    "attn.sr": "attn1.sr",
    "attn.norm": "attn1.norm",
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
TABLE = "scale_shift_table"
# Not weights of the network in use: the null caption of training, and positions that each size recomputes.
DROPPED = {
    "original": ("y_embedder.y_embedding", "pos_embed"),
    "diffusers": ("caption_projection.y_embedding", "pos_embed.pos_embed"),
}
BLOCK_KEY = re.compile(r"blocks\.(\d{1,4})\.(.+)")
MODULE_KEY = re.compile(r"(.+)\.(weight|bias)")


def to_diffusers_keys(key: str) -> tuple[str, ...]:
    """diffusers' names for an original key: several for a fused one, none for an unknown one."""
    if key == f"final_layer.{TABLE}":
        return (TABLE,)
    in_block = BLOCK_KEY.fullmatch(key)
    block, rest = (f"transformer_blocks.{in_block[1]}.", in_block[2]) if in_block else ("", key)
    if in_block and rest == TABLE:
        return (block + TABLE,)
    named = MODULE_KEY.fullmatch(rest)
    if named is None:
        return ()
    module, parameter = named.groups()
    if in_block and module in FUSED:
        return tuple(f"{block}{name}.{parameter}" for name in FUSED[module])
    renamed = (BLOCK_MODULES if in_block else MODULES).get(module)
    return (f"{block}{renamed}.{parameter}",) if renamed else ()


def to_original_keys(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The authors' names for diffusers' ones, each with those whose tensors it joins along dimension 0.

    A name that is neither's is kept, and so is one of a joined tensor that lacks another part.
    """
    names = list(names)
    in_blocks = (re.match(r"transformer_blocks\.(\d{1,4})\.", name) for name in names)
    blocks = sorted({int(match[1]) for match in in_blocks if match})
    modules = list(MODULES)
    modules += [f"blocks.{block}.{module}" for block in blocks for module in (*FUSED, *BLOCK_MODULES)]
    originals = [f"{module}.{parameter}" for module in modules for parameter in ("weight", "bias")]
    originals += [f"final_layer.{TABLE}", *(f"blocks.{block}.{TABLE}" for block in blocks)]
    found = {original: to_diffusers_keys(original) for original in originals}
    found = {original: parts for original, parts in found.items() if set(parts) <= set(names)}
    taken = {part for parts in found.values() for part in parts}
    return found | {name: (name,) for name in names if name not in taken}
