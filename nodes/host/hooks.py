"""The host's ways of reaching into a transformer, for one call of ours.

They come in `transformer_options`: attention patches, replaced attentions and an attention function as in the
host's ldm/modules/attention.py, replaced blocks as in its ldm/flux/model.py, where ours are "double_block".
"""

from dataclasses import replace

import comfy.ldm.modules.attention
import torch

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.transformer.config import TransformerConfig
from ...pixart_sigma.transformer.hooks import Hooks

# What nodes replace: a whole block, self-attention, attention to the prompt.
REPLACEABLE = ("dit", "attn1", "attn2")
# What the host's nodes set for parts of other networks.
NOT_FOR_SIGMA = (
    "input_block_patch",
    "input_block_patch_after_skip",
    "middle_patch",
    "middle_block_after_patch",
    "output_block_patch",
    "emb_patch",
    "forward_timestep_embed_patch",
    "double_block",
    "post_input",
    "noise_refiner",
    "mlp_patch",
    "rope_options",
    "a2v_cross_attn",
)
# In transformer_options: blocks whose self-attention a node wants to pass its values on.
PASS_VALUES = "stg_self_attn_blocks"


def attention(query, key, value, attn_mask=None, transformer_options=None):
    """The attention that the host has selected, on (B, heads, tokens, head_dim)."""
    heads = query.shape[1]
    module = comfy.ldm.modules.attention
    function = module.optimized_attention if attn_mask is None else module.optimized_attention_masked
    # These look how much memory is free, which torch.compile can not do in a graph.
    if torch.compiler.is_compiling() and function in (module.attention_sub_quad, module.attention_split):
        function = module.attention_pytorch
    attended = function(
        query,
        key,
        value,
        heads,
        mask=attn_mask,
        skip_reshape=True,
        transformer_options=transformer_options,
    )
    return attended.unflatten(-1, (heads, -1)).transpose(1, 2)


def replaced_block(kind: str, place: tuple, blocks: int) -> int | None:
    """Which of so many blocks a node means by the place of what it replaces, one of REPLACEABLE.

    ("double_block", index) is the block of that index; of attentions ("middle", 0), which is all of the
    middle that a U-Net has, is the one in the middle, `blocks` // 2. None for "single_block", which nodes for
    every kind of transformer name too. Raises SigmaError for anything else: it would have no effect.
    """
    if kind != "dit" and place == ("middle", 0):
        return blocks // 2
    if place[0] == "single_block":
        return None
    if len(place) == 2 and place[0] == "double_block" and place[1] in range(blocks):
        return place[1]
    if place[0] == "double_block":
        raise SigmaError(
            f"A node changes block {', '.join(map(str, place[1:]))} of this MODEL, whose blocks are 0 to "
            f"{blocks - 1}. Name one of these in the node."
        )
    raise SigmaError(
        f"A node changes {kind} at {place} of this MODEL, and PixArt-Sigma has no such place: the node is "
        "for other models, as SelfAttentionGuidance is for U-Nets. Take it out of the graph."
    )


def check_set(name: str) -> None:
    """Raises SigmaError for a patch or an option that PixArt-Sigma never looks at."""
    if name in NOT_FOR_SIGMA:
        raise SigmaError(
            f"A node sets {name} of this MODEL, which PixArt-Sigma has not: the node is for other models, as "
            "Deep Shrink is for U-Nets and ScaleROPE for rotary positions. Take it out of the graph."
        )


def _pass_values(query, key, value, extra_options):
    """In place of an attention: each token attends to itself alone."""
    return value


class HostHooks(Hooks):
    """`original_shape` is told to patches as (B, channels, rows, columns) of the tokens: the host's U-Nets
    have a token for each latent where they tell of it, and its patches find their tokens by that."""

    def __init__(self, transformer_options: dict, latents, config: TransformerConfig):
        for name in transformer_options:
            check_set(name)
        blocks, patch = config.num_layers, config.patch_size
        self.replacements = {
            kind: {
                replaced_block(kind, place, blocks): function
                for place, function in transformer_options.get("patches_replace", {}).get(kind, {}).items()
            }
            for kind in REPLACEABLE
        }
        for index in transformer_options.get(PASS_VALUES, ()):
            self.replacements["attn1"][replaced_block("attn1", ("double_block", index), blocks)] = (
                _pass_values
            )
        self.patches = transformer_options.get("patches", {})
        rows, columns = (-(-side // patch) for side in latents.shape[-2:])
        self.options = transformer_options | {
            "original_shape": [*latents.shape[:2], rows, columns],
            "total_blocks": blocks,
            "block_type": "double",
        }
        self.sizes = {
            "n_heads": config.num_attention_heads,
            "dim_head": config.attention_head_dim,
            "attn_precision": None,
        }

    def run_block(self, block, hidden_states, prompt_embeds, call):
        self.options["block"] = ("double_block", call.index)
        self.options["block_index"] = call.index
        if call.index in self.replacements["attn1"]:  # which gets, and returns, all tokens
            call = replace(call, kv_compression=None)
        replacement = self.replacements["dit"].get(call.index)
        run = super().run_block
        if replacement is None:
            return run(block, hidden_states, prompt_embeds, call)

        def original_block(args):
            changed = replace(call, modulation=args["vec"], prompt_bias=args["attn_mask"])
            after = run(block, args["img"], args["txt"], changed)
            return {"img": after[0], "txt": after[1]}

        args = {
            "img": hidden_states,
            "txt": prompt_embeds,
            "vec": call.modulation,
            "pe": None,
            "attn_mask": call.prompt_bias,
            "transformer_options": self.options,
        }
        after = replacement(args, {"original_block": original_block})
        return after["img"], after["txt"]

    def before_attention(self, name, queries, keys, values):
        for patch in self.patches.get(f"{name}_patch", ()):
            queries, keys, values = patch(queries, keys, values, self._extra_options())
        if len(queries) != len(keys):
            raise SigmaError(
                f"A node cuts this MODEL's queries into {len(queries) // len(keys)} tiles and leaves the "
                "keys whole, as HyperTile does for U-Nets. Take it out of the graph; Σ KV Compression makes "
                "attention faster here."
            )
        return queries, keys, values

    def attend(self, name, attention, query, key, value, attn_mask):
        replacement = self.replacements[name].get(self.options["block_index"])
        if replacement is None:
            return attention(query, key, value, attn_mask, self.options)
        heads = query.shape[1]
        tokens = (heads_of.transpose(1, 2).flatten(2) for heads_of in (query, key, value))
        replaced = replacement(*tokens, self._extra_options() | {"attn_mask": attn_mask})
        return replaced.unflatten(-1, (heads, -1)).transpose(1, 2)

    def after_attention(self, name, tokens):
        for patch in self.patches.get(f"{name}_output_patch", ()):
            tokens = patch(tokens, self._extra_options())
        return tokens

    def _extra_options(self) -> dict:
        options = {name: self.options[name] for name in self.options if not name.startswith("patches")}
        return options | self.sizes
