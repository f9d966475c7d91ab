from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pixart_sigma.errors import SigmaError
from pixart_sigma.transformer import kv_rules as kv_compression
from pixart_sigma.transformer.checkpoint import KVWeights, TransformerConfig
from pixart_sigma.transformer.kv_rules import OFF, KVCompression, acting, multiply_adds, parse, resolve, spell
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
    torch.testing.assert_close(attn(x, grid=grid, kv_compression=setting), expected, rtol=1e-5, atol=1e-5)
    if operator:
        assert not torch.allclose(expected, original_attention(x, grid, None, ratio, weights), atol=1e-3)


@pytest.mark.parametrize("operator", [None, "conv", "uniform"])
def test_qk_norm_is_over_all_channels_and_before_compression(operator):
    attn, weights = attention_module(2, qk_norm=True)
    x = torch.randn(1, 24, WIDTH, generator=torch.Generator().manual_seed(1))
    setting = KVCompression(operator, 2, (0,)) if operator else None
    expected = original_attention(x, (4, 6), operator, 2, weights)
    torch.testing.assert_close(attn(x, grid=(4, 6), kv_compression=setting), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("operator", "tokens"), [("mean", 1), ("uniform", 1), ("ave", 3), ("conv", 3)])
def test_a_grid_smaller_than_one_window_still_attends(operator, tokens):
    seen = []
    attn, _ = attention_module(4)

    def attention(q, k, v, attn_mask=None):
        seen.append(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v)

    attn.processor.attention = attention
    out = attn(torch.randn(1, 3, WIDTH), grid=(1, 3), kv_compression=KVCompression(operator, 4, (0,)))
    assert seen == [tokens] and torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", OFF),
        ("mean:2:14-27", (KVCompression("mean", 2, tuple(range(14, 28))),)),
        ("mean:3:all", (KVCompression("mean", 3, tuple(range(28))),)),
        (" Conv:2:Deep ", (KVCompression("conv", 2, tuple(range(14, 28))),)),
        ("ave:4:27,0-1,1", (KVCompression("ave", 4, (0, 1, 27)),)),
        ("uniform:2:5:20-80%", (KVCompression("uniform", 2, (5,), 0.2, 0.8),)),
        (
            "mean:4:20-27+mean:2:14-27:0-50%",
            (
                KVCompression("mean", 4, tuple(range(20, 28))),
                KVCompression("mean", 2, tuple(range(14, 28)), 0, 0.5),
            ),
        ),
    ],
)
def test_parse(text, expected):
    assert parse(text, 28) == expected
    assert parse(spell(expected), 28) == expected


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("mean:0:all", "'0'"),
        ("mean:1:all", "'1'"),
        ("mean:7:all", "'7'"),
        ("mean:-2:all", "'-2'"),
        ("mean:2.0:all", "'2.0'"),
        ("mean:two:all", "'two'"),
        ("mean:2:28", "'28'"),
        ("mean:2:20-40", "'20-40'"),
        ("mean:2:27-14", "'27-14'"),
        ("mean:2:-1", "'-1'"),
        ("mean:2:", "''"),
        ("mean:2:1,,2", "'1,,2'"),
        ("pool:2:all", "'pool'"),
        ("mean:2", "'mean:2'"),
        ("", "''"),
        ("auto", "'auto'"),
        ("mean:2:all:80-20%", "'80-20%'"),
        ("mean:2:all:0-101%", "'0-101%'"),
        ("mean:2:all:half", "'half'"),
        ("mean:2:all+", "''"),
        ("mean:2:all+off", "'off'"),
        ("mean:2:all:0-50%:x", "'mean:2:all:0-50%:x'"),
    ],
)
def test_parse_errors_name_the_value(text, seen):
    with pytest.raises(SigmaError) as error:
        parse(text, 28)
    assert seen in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("pool", 2, (0,)),
        ("mean", 1, (0,)),
        ("mean", True, (0,)),
        ("mean", 2, (-1,)),
        ("mean", 2, ()),
        ("mean", 2, (0,), 0.5, 0.5),
        ("mean", 2, (0,), 0.0, float("nan")),
    ],
)
def test_settings_refuse_nonsense(arguments):
    with pytest.raises(SigmaError):
        KVCompression(*arguments)


def test_resolve_without_trained_weights():
    config = SimpleNamespace(num_layers=28, kv_compression=None)
    deep, first = KVCompression("mean", 2, tuple(range(14, 28))), KVCompression("mean", 2, (0,))
    assert resolve(None, config, 4096, 4096) == OFF
    assert resolve("off", config, 4096, 4096) == OFF
    assert resolve("auto", config, 1024, 1024) == OFF
    assert resolve("auto", config, 2048, 512) == OFF
    assert resolve("auto", config, 1024, 1024, calibrated=(first,)) == OFF
    assert resolve("auto", config, 1024, 1040) == (deep,)
    assert resolve("auto", config, 1024, 1040, calibrated=(first,)) == (first,)
    assert resolve("auto", config, 1024, 1040, calibrated=OFF) == OFF
    assert resolve("mean:2:0", config, 64, 64, calibrated=(deep,)) == (first,)
    with pytest.raises(SigmaError, match="has none"):
        resolve("conv:2:all", config, 1024, 1024)
    with pytest.raises(SigmaError, match="layer 28"):
        resolve((first, KVCompression("mean", 2, (27, 28))), config, 1024, 1024)


def test_resolve_with_trained_weights():
    config = SimpleNamespace(num_layers=28, kv_compression=KVWeights(ratio=2, layers=(14, 15)))
    trained = (KVCompression("conv", 2, (14, 15)),)
    for size in (256, 4096):
        assert resolve(None, config, size, size) == trained
        assert resolve("auto", config, size, size) == trained
    assert resolve("off", config, 256, 256) == OFF
    assert resolve("mean:2:0", config, 256, 256) == (KVCompression("mean", 2, (0,)),)
    assert resolve("conv:2:15", config, 256, 256) == (KVCompression("conv", 2, (15,)),)
    for other in ("conv:4:14-15", "conv:2:13-15"):
        with pytest.raises(SigmaError, match="conv:2:14-15"):
            resolve(other, config, 256, 256)


def test_auto_says_once_that_it_was_not_measured(caplog):
    config = SimpleNamespace(num_layers=28, kv_compression=None)
    kv_compression._say_not_measured.cache_clear()
    for _ in range(2):
        resolve("auto", config, 2048, 2048)
    (message,) = caplog.messages
    assert "mean:2:14-27" in message and "not measured" in message


def test_the_first_rule_that_acts_on_a_layer_counts():
    early, late = KVCompression("mean", 4, (1, 2), 0.0, 0.5), KVCompression("mean", 2, (2, 3))
    rules = (early, late)
    assert [acting(rules, layer, 999) for layer in range(4)] == [None, early, early, late]
    assert [acting(rules, layer, 0) for layer in range(4)] == [None, None, late, late]


def test_window_is_a_part_of_the_noise_schedule():
    setting = KVCompression("mean", 2, (0,), 0.2, 0.8)
    assert [setting.acts_at(t) for t in (999, 900, 700, 300, 100, 0)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    late = KVCompression("mean", 2, (0,), 0.5, 1.0)
    assert late.acts_at(0) and not late.acts_at(999)
    assert KVCompression("mean", 2, (0,), 0.0, 0.5).acts_at(999)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (2048, 2048), (768, 1360), (4096, 4096)])
@pytest.mark.parametrize(
    "setting", ["off", "mean:2:deep", "mean:4:all", "uniform:3:all", "conv:2:deep", "conv:4:all"]
)
def test_multiply_adds_are_those_that_are_run(size, setting):
    """XL/2 on the meta device, which counts and computes nothing; a block of each kind stands for all."""
    rule = next(iter(parse(setting, 28)), None)
    kv = (
        KVWeights(rule.ratio, tuple(layer // 14 for layer in rule.layers if layer % 14 == 0))
        if "conv" in setting
        else None
    )
    config = TransformerConfig(
        sample_size=128, interpolation_scale=2, num_layers=2, num_attention_heads=16, attention_head_dim=72,
        in_channels=4, out_channels=8, patch_size=2, caption_channels=4096, cross_attention_dim=1152,
        kv_compression=kv,
    )  # fmt: skip
    rules = () if rule is None else (replace(rule, layers=(0, 1) if len(rule.layers) == 28 else (1,)),)

    def attention(query, key, value, attn_mask=None):
        return (query @ key.transpose(-1, -2)) @ value

    transformer = build_transformer(config, attention=attention)
    meta = {"device": "meta"}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(
            torch.empty(1, 4, size[0] // 8, size[1] // 8, **meta),
            torch.empty(1, **meta),
            torch.empty(1, 300, 4096, **meta),
            kv_compression=rules,
        )
    expected = multiply_adds(config, *size, 300, rules)
    assert abs(counter.get_total_flops() / 2 / expected - 1) < 1e-3


def test_multiply_adds_of_the_published_network():
    """The figures of the paper's network, 28 layers of width 1152, in multiply-adds."""
    config = SimpleNamespace(
        num_layers=28,
        patch_size=2,
        cross_attention_dim=1152,
        caption_channels=4096,
        in_channels=4,
        out_channels=8,
    )
    for size, rules, expected in [
        (1024, "off", 3.32e12),
        (2048, "off", 26.18e12),
        (4096, "off", 312.5e12),
        (4096, "mean:2:all", 312.5e12 / 3.09),
        (4096, "mean:4:all", 312.5e12 / 6.49),
        (2048, "mean:2:deep", 26.18e12 / 1.36),
    ]:
        counted = multiply_adds(config, size, size, 300, parse(rules, 28))
        assert abs(counted / expected - 1) < 5e-3, (size, rules, counted)
