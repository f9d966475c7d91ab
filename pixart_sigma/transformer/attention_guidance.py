"""Normalised attention guidance: a negative prompt that acts inside the attention to the prompt.

Source: arXiv 2505.21179, and the authors' code for SDXL, which attends to the prompt apart, as this network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hooks import BlockCall, Hooks

if TYPE_CHECKING:
    import torch

# The authors' for SDXL, whose attention to the prompt is like this one's.
ALPHA = 0.5
TAU = 2.5


class NormalizedAttentionGuidance(Hooks):
    """Guides each attention to the prompt away from a negative prompt; all else is as `hooks` have it.

    The prompt's tokens are (2 B, L, C) beside hidden states (B, N, C), negative prompts first: one picture
    asks both of its prompts, so that nothing but this attention is computed twice.
    """

    def __init__(self, hooks: Hooks, scale: float):
        self.hooks, self.scale = hooks, scale

    def start(self, transformer, latents):
        self.hooks.start(transformer, latents)

    def run_block(self, block, hidden_states, prompt_embeds, call: BlockCall):
        return self.hooks.run_block(block, hidden_states, prompt_embeds, call)

    def before_attention(self, name: str, queries, keys, values):
        return self.hooks.before_attention(name, queries, keys, values)

    def attend(self, name: str, attention, query, key, value, attn_mask):
        if name == "attn1":
            return self.hooks.attend(name, attention, query, key, value, attn_mask)
        masks = (None, None) if attn_mask is None else attn_mask.chunk(2)
        negative, positive = (
            self.hooks.attend(name, attention, query, *part)
            for part in zip(key.chunk(2), value.chunk(2), masks, strict=True)
        )
        return push_away(positive, negative, self.scale)

    def after_attention(self, name: str, tokens):
        return self.hooks.after_attention(name, tokens)


def push_away(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention (B, heads, N, head_dim) to the prompt and to the negative prompt -> the guided one.

    A token's L1 norm, over all channels, grows at most TAU times; ALPHA of the guided one is mixed with the
    prompt's own.
    """
    guided = negative.lerp(positive, scale)
    norm, before = (tokens.float().abs().sum((1, 3), keepdim=True) for tokens in (guided, positive))
    limited = (TAU * before / norm.clamp(min=1e-6)).clamp(max=1)
    return guided * (ALPHA * limited).to(guided) + (1 - ALPHA) * positive
