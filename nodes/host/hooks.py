"""The host's ways of reaching into a transformer, for one call of ours.

They come in `transformer_options`: attention patches and an attention function as in the host's
ldm/modules/attention.py, replaced blocks as in its ldm/flux/model.py, where ours are "double_block".
"""

from dataclasses import replace

import comfy.ldm.modules.attention
import torch

from ...pixart_sigma.transformer.hooks import Hooks


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


class HostHooks(Hooks):
    def __init__(self, transformer_options: dict, latents, blocks: int, heads: int, head_dim: int):
        self.replacements = transformer_options.get("patches_replace", {}).get("dit", {})
        self.patches = transformer_options.get("patches", {})
        self.options = transformer_options | {
            "original_shape": list(latents.shape),
            "total_blocks": blocks,
            "block_type": "double",
        }
        self.sizes = {"n_heads": heads, "dim_head": head_dim, "attn_precision": None}

    def run_block(self, block, hidden_states, prompt_embeds, call):
        self.options["block"] = ("double_block", call.index)
        self.options["block_index"] = call.index
        replacement = self.replacements.get(("double_block", call.index))
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
        return queries, keys, values

    def attend(self, attention, query, key, value, attn_mask):
        return attention(query, key, value, attn_mask, self.options)

    def after_attention(self, name, tokens):
        for patch in self.patches.get(f"{name}_output_patch", ()):
            tokens = patch(tokens, self._extra_options())
        return tokens

    def _extra_options(self) -> dict:
        options = {name: self.options[name] for name in self.options if not name.startswith("patches")}
        return options | self.sizes
