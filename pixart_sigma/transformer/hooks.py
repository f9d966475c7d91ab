"""What a block is given in one forward pass of the transformer, and what a caller can change there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kv_rules import KVCompression

if TYPE_CHECKING:
    import torch


class Hooks:
    """Called around every block and attention; this one changes nothing.

    A subclass's instance is given to one call of the transformer, so it may keep the state of that call.
    """

    def start(self, transformer, latents):
        """Before the first block; latents (B, 4, h, w) as the transformer was given them."""

    def run_block(self, block, hidden_states, prompt_embeds, call: BlockCall):
        """hidden_states (B, N, C) and prompt_embeds (B, L, C) -> both after the block."""
        return block(hidden_states, prompt_embeds, call), prompt_embeds

    def before_attention(self, name: str, queries, keys, values):
        """Tokens (B, N, C) before they are compressed and projected.

        `name` is "attn1" for self-attention and "attn2" for attention to the prompt. Keys and values are
        one tensor as long as no hook has changed one of them.
        """
        return queries, keys, values

    def attend(self, name: str, attention, query, key, value, attn_mask):
        """`attention` is the transformer's own; all are (B, heads, tokens, head_dim)."""
        return attention(query, key, value, attn_mask=attn_mask)

    def after_attention(self, name: str, tokens):
        """The attention's result (B, N, C), before it is added to the hidden states."""
        return tokens


NO_HOOKS = Hooks()


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What a block is given beside its tokens (B, N, C) and the prompt's (B, L, C).

    index: the block's, from 0.
    grid: rows and columns of the patches, N = rows * columns.
    modulation: (B or 1, 6 * C), what the timestep alone says of shifts, scales and gates.
    prompt_bias: (B, 1, 1, L), added to the scores of attention to the prompt; None where all its tokens are
        real.
    kv_compression: the rule that acts on this block now, or None.
    hooks: those of this call of the transformer.
    """

    index: int
    grid: tuple[int, int]
    modulation: torch.Tensor
    prompt_bias: torch.Tensor | None
    kv_compression: KVCompression | None
    hooks: Hooks  # of its own default torch.compile can make no graph
