"""What a caller can change inside one forward pass of the transformer."""


class Hooks:
    """Called around every block and attention; this one changes nothing.

    A subclass's instance is given to one call of the transformer, so it may keep the state of that call.
    """

    def run_block(self, index: int, block, hidden_states, prompt_embeds, *arguments):
        """Block `index` from 0: hidden_states (B, N, C) and prompt_embeds (B, L, C) -> both after it.

        `arguments` are the additive mask (B, 1, 1, L) or None, the modulation, the grid and KV compression.
        """
        return block(hidden_states, prompt_embeds, *arguments, hooks=self), prompt_embeds

    def before_attention(self, name: str, queries, keys, values):
        """Tokens (B, N, C) before they are compressed and projected.

        `name` is "attn1" for self-attention and "attn2" for attention to the prompt. Keys and values are
        one tensor as long as no hook has changed one of them.
        """
        return queries, keys, values

    def attend(self, attention, query, key, value, attn_mask):
        """`attention` is the transformer's own; all are (B, heads, tokens, head_dim)."""
        return attention(query, key, value, attn_mask=attn_mask)

    def after_attention(self, name: str, tokens):
        """The attention's result (B, N, C), before it is added to the hidden states."""
        return tokens


NO_HOOKS = Hooks()
