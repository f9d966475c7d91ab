"""Attention of the transformer, and how the tokens of its keys and values are merged."""

import torch
import torch.nn.functional as F

from .hooks import NO_HOOKS
from .kv_rules import KVCompression


class SigmaAttnProcessor:
    """Attention of one diffusers `Attention` module, with KV compression of self-attention.

    `attention(q, k, v, attn_mask=None)` works on (B, heads, tokens, head_dim) and returns that shape.
    """

    def __init__(self, attention=F.scaled_dot_product_attention):
        self.attention = attention

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        grid=None,
        kv_compression=None,
        hooks=NO_HOOKS,
    ):
        """hidden_states (B, N, C), N = rows * columns of `grid` -> (B, N, C); additive mask (B, 1, 1, L)."""
        name = "attn1" if encoder_hidden_states is None else "attn2"
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        queries, keys, values = hooks.before_attention(name, hidden_states, keys, keys)
        # A hook that merged tokens has left no grid to compress.
        if kv_compression is not None and keys.shape[1] != grid[0] * grid[1]:
            kv_compression = None
        trained = kv_compression is not None and kv_compression.operator == "conv"
        if kv_compression is not None and not trained:
            reduced = reduce_tokens(keys, grid, kv_compression)
            values = reduced if values is keys else reduce_tokens(values, grid, kv_compression)
            keys = reduced
        query, key, value = attn.to_q(queries), attn.to_k(keys), attn.to_v(values)
        # The authors normalise over all channels and before compression, diffusers' processors per head.
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if trained:
            key, value = _convolve(attn, key, grid), _convolve(attn, value, grid)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        attended = hooks.attend(self.attention, query, key, value, attention_mask)
        del query, key, value  # the most tensors of tokens are alive here
        return hooks.after_attention(name, attn.to_out[0](attended.transpose(1, 2).flatten(2)))


def reduce_tokens(tokens: torch.Tensor, grid: tuple[int, int], kv_compression: KVCompression) -> torch.Tensor:
    """Tokens (B, N, C) on a grid of N = rows * columns -> the tokens (B, N', C) of keys and values.

    For every operator but `conv`. Each acts on tokens alone, so that it may come before the projections,
    which is the same as the authors' order and cheaper.
    """
    rows, columns = grid
    ratio = kv_compression.ratio
    if kv_compression.operator == "uniform_every":
        return tokens[:, ::ratio]
    picture = tokens.unflatten(1, (rows, columns))
    if kv_compression.operator == "mean":
        windows = F.avg_pool2d(picture.permute(0, 3, 1, 2), ratio, ceil_mode=True, count_include_pad=False)
        return windows.flatten(2).transpose(1, 2)
    if kv_compression.operator == "ave":
        if min(grid) < ratio:
            return tokens
        picture = picture[:, : rows // ratio * ratio, : columns // ratio * ratio]
    return picture[:, ::ratio, ::ratio].flatten(1, 2)


def _convolve(attn, tokens, grid):
    if min(grid) < attn.sr.kernel_size[0]:
        return tokens
    picture = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    return attn.norm(attn.sr(picture).flatten(2).transpose(1, 2))
