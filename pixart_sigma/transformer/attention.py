"""Attention of the transformer, and how the tokens of its keys and values are merged."""

import torch
import torch.nn.functional as F

from .hooks import BlockCall
from .kv_rules import KVCompression


def torch_attention(query, key, value, attn_mask=None):
    """Torch's own attention, on (B, heads, tokens, head_dim)."""
    return F.scaled_dot_product_attention(query, head_by_head(key), head_by_head(value), attn_mask=attn_mask)


def head_by_head(tokens: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, heads, tokens, head_dim), on a CPU with each head's tokens next to each other.

    Torch reads them once for each run of queries; see `benchmarks/attention_layout.py`. On other devices that
    was not measured.
    """
    return tokens.contiguous() if tokens.device.type == "cpu" else tokens


class SigmaAttnProcessor:
    """Attention of one diffusers `Attention` module, with KV compression of self-attention.

    `attention(q, k, v, attn_mask=None)` works on (B, heads, tokens, head_dim) and returns that shape.
    """

    def __init__(self, attention=torch_attention):
        self.attention = attention

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        *,
        call: BlockCall,
    ):
        """hidden_states (B, N, C) and, for attention to the prompt, its tokens (B, L, C) and an additive mask
        (B, 1, 1, L) -> (B, N, C)."""
        if encoder_hidden_states is None:
            name, keys, rule = "attn1", hidden_states, call.kv_compression
        else:
            name, keys, rule = "attn2", encoder_hidden_states, None
        queries, keys, values = call.hooks.before_attention(name, hidden_states, keys, keys)
        # A hook that merged tokens has left no grid to compress.
        if rule is not None and keys.shape[1] != call.grid[0] * call.grid[1]:
            rule = None
        trained = rule is not None and rule.operator == "conv"
        if rule is not None and not trained:
            reduced = reduce_tokens(keys, call.grid, rule)
            values = reduced if values is keys else reduce_tokens(values, call.grid, rule)
            keys = reduced
        query, key, value = attn.to_q(queries), attn.to_k(keys), attn.to_v(values)
        # The authors normalise over all channels and before compression, diffusers' processors per head.
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if trained:
            key, value = _convolve(attn, key, call.grid), _convolve(attn, value, call.grid)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        attended = call.hooks.attend(name, self.attention, query, key, value, attention_mask)
        del query, key, value  # the most tensors of tokens are alive here
        return call.hooks.after_attention(name, attn.to_out[0](attended.transpose(1, 2).flatten(2)))


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
