"""Attention with merged keys and values: equal to the authors' arithmetic, written out."""

import pytest
import torch
import torch.nn.functional as F

from pixart_sigma.transformer.config import KVWeights, TransformerConfig
from pixart_sigma.transformer.hooks import NO_HOOKS, BlockCall
from pixart_sigma.transformer.kv_rules import KVCompression
from pixart_sigma.transformer.network import build_transformer

HEADS, WIDTH = 2, 16
GRIDS = [(4, 4), (8, 12), (12, 6), (9, 8), (7, 5)]


def attention_module(ratio, qk_norm=False):
    config = TransformerConfig(
        sample_size=32,
        interpolation_scale=0.5,
        num_layers=1,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        caption_channels=12,
        cross_attention_dim=WIDTH,
        qk_norm=qk_norm,
        kv_compression=KVWeights(ratio=ratio, layers=(0,)),
    )
    attn = build_transformer(config).transformer_blocks[0].attn1
    generator = torch.Generator().manual_seed(ratio)
    weights = {k: torch.randn(v.shape, generator=generator) * 0.4 for k, v in attn.state_dict().items()}
    attn.load_state_dict(weights, assign=True)
    return attn.requires_grad_(False), weights


def call_of(grid, rule):
    return BlockCall(0, grid, torch.zeros(1, 6 * WIDTH), None, rule, NO_HOOKS)


def merge_as_the_authors(tokens, grid, operator, ratio, weights):
    """The original network's downsample_2d, on projected keys or values (B, N, C); `mean` by hand."""
    batch, _, channels = tokens.shape
    rows, columns = grid
    if operator == "uniform_every":
        return tokens[:, ::ratio]
    picture = tokens.reshape(batch, rows, columns, channels).permute(0, 3, 1, 2)
    if operator == "conv":
        merged = F.conv2d(picture, weights["sr.weight"], weights["sr.bias"], stride=ratio, groups=channels)
    elif operator == "ave":
        merged = F.interpolate(picture, scale_factor=1 / ratio, mode="nearest")
    elif operator == "uniform":
        merged = picture[:, :, ::ratio, ::ratio]
    else:
        windows = [
            picture[:, :, y : y + ratio, x : x + ratio].flatten(2).mean(-1)
            for y in range(0, rows, ratio)
            for x in range(0, columns, ratio)
        ]
        return torch.stack(windows, dim=1)
    merged = merged.reshape(batch, channels, -1).permute(0, 2, 1)
    if operator == "conv":
        merged = F.layer_norm(merged, (channels,), weights["norm.weight"], weights["norm.bias"], eps=1e-5)
    return merged


def original_attention(x, grid, operator, ratio, weights):
    """AttentionKVCompress of the original network: project, normalise, merge, split heads, softmax."""
    q, k, v = (F.linear(x, weights[f"to_{n}.weight"], weights[f"to_{n}.bias"]) for n in "qkv")
    if "norm_q.weight" in weights:
        q = F.layer_norm(q, (WIDTH,), weights["norm_q.weight"], weights["norm_q.bias"])
        k = F.layer_norm(k, (WIDTH,), weights["norm_k.weight"], weights["norm_k.bias"])
    if operator:
        k = merge_as_the_authors(k, grid, operator, ratio, weights)
        v = merge_as_the_authors(v, grid, operator, ratio, weights)
    out = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / (WIDTH // HEADS) ** 0.5
        out.append(scores.softmax(-1) @ v[..., part])
    return F.linear(torch.cat(out, -1), weights["to_out.0.weight"], weights["to_out.0.bias"])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("operator", [None, "mean", "conv", "uniform", "uniform_every", "ave"])
def test_operators_equal_the_written_out_arithmetic(operator, ratio, grid):
    attn, weights = attention_module(ratio)
    x = torch.randn(2, grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(1))
    setting = KVCompression(operator, ratio, (0,)) if operator else None
    expected = original_attention(x, grid, operator, ratio, weights)
    torch.testing.assert_close(attn(x, call=call_of(grid, setting)), expected, rtol=1e-5, atol=1e-5)
    if operator:
        assert not torch.allclose(expected, original_attention(x, grid, None, ratio, weights), atol=1e-3)


@pytest.mark.parametrize("operator", [None, "conv", "uniform"])
def test_qk_norm_is_over_all_channels_and_before_compression(operator):
    attn, weights = attention_module(2, qk_norm=True)
    x = torch.randn(1, 24, WIDTH, generator=torch.Generator().manual_seed(1))
    setting = KVCompression(operator, 2, (0,)) if operator else None
    expected = original_attention(x, (4, 6), operator, 2, weights)
    torch.testing.assert_close(attn(x, call=call_of((4, 6), setting)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("operator", "tokens"), [("mean", 1), ("uniform", 1), ("ave", 3), ("conv", 3)])
def test_a_grid_smaller_than_one_window_still_attends(operator, tokens):
    seen = []
    attn, _ = attention_module(4)

    def attention(q, k, v, attn_mask=None):
        seen.append(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v)

    attn.processor.attention = attention
    out = attn(torch.randn(1, 3, WIDTH), call=call_of((1, 3), KVCompression(operator, 4, (0,))))
    assert seen == [tokens] and torch.isfinite(out).all()


@pytest.mark.parametrize("operator", [None, "mean", "conv", "uniform"])
def test_a_cpu_reads_keys_and_values_one_head_after_the_other(operator, monkeypatch):
    """Which is faster there, and the same bit for bit."""
    attn, _ = attention_module(2)
    original, together = F.scaled_dot_product_attention, []

    def attention(query, key, value, **named):
        together.append(key.is_contiguous() and value.is_contiguous())
        return original(query, key, value, **named)

    rule = KVCompression(operator, 2, (0,)) if operator else None
    x = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    made = attn(x, call=call_of((4, 6), rule))
    attn.processor.attention = attention  # as the projections leave them
    assert torch.equal(attn(x, call=call_of((4, 6), rule)), made)
    assert together == [True, False]
