import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.transformer import network as engine
from pixart_sigma.transformer.config import KVWeights, TransformerConfig
from pixart_sigma.transformer.kv_rules import OFF, KVCompression
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.network import build_transformer

CAPTION = 12
TABLES = {
    256: (alpha.ASPECT_RATIO_256_BIN, 32, 0.5),
    512: (alpha.ASPECT_RATIO_512_BIN, 64, 1),
    1024: (alpha.ASPECT_RATIO_1024_BIN, 128, 2),
    2048: (sigma.ASPECT_RATIO_2048_BIN, 256, 4),
}


def make_config(heads=2, head_dim=8, layers=2, sample_size=32, scale=0.5, qk_norm=False, kv=None):
    return TransformerConfig(
        sample_size=sample_size,
        interpolation_scale=scale,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        caption_channels=CAPTION,
        cross_attention_dim=heads * head_dim,
        qk_norm=qk_norm,
        kv_compression=kv,
    )


def random_weights(model, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) * scale for k, v in model.state_dict().items()}


def make_pair(**settings):
    """Our transformer and diffusers' with the same weights."""
    config = make_config(**settings)
    ours = build_transformer(config)
    weights = random_weights(ours)
    ours.load_state_dict(weights, assign=True)
    reference = PixArtTransformer2DModel(**config.to_diffusers())
    reference.load_state_dict(weights)
    return ours.eval().requires_grad_(False), reference.eval().requires_grad_(False)


def make_input(height, width, lengths=(5,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(lengths), 4, height, width, generator=generator)
    embeds = torch.randn(len(lengths), max(lengths), CAPTION, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return latents, embeds, mask


def predict(reference, latents, timestep, embeds, mask=None):
    timestep = torch.as_tensor(timestep).expand(len(latents))
    conditions = {"resolution": None, "aspect_ratio": None}
    out = reference(
        latents,
        encoder_hidden_states=embeds,
        timestep=timestep,
        encoder_attention_mask=mask,
        added_cond_kwargs=conditions,
    )
    return out.sample[:, :4]


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Reached(Exception):
    pass


def before_the_blocks(network, run):
    """What the first block is given, patches and positions, in `run()`, which ends there."""

    def stop(block, arguments):
        raise Reached(arguments[0])

    hook = network.transformer_blocks[0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(Reached) as reached:
            run()
    finally:
        hook.remove()
    return reached.value.args[0]


@pytest.mark.parametrize("base", TABLES)
def test_equal_to_diffusers_at_every_bucket(base):
    table, sample_size, scale = TABLES[base]
    ours, reference = make_pair(heads=1, layers=1, sample_size=sample_size, scale=scale)
    assert len(table) == (40 if base == 2048 else 33)
    for index, (height, width) in enumerate(table.values()):
        latents, embeds, _ = make_input(int(height) // 8, int(width) // 8)
        actual = before_the_blocks(ours, lambda: ours(latents, 500, embeds))  # noqa: B023
        expected = before_the_blocks(reference, lambda: predict(reference, latents, 500, embeds))  # noqa: B023
        assert error(actual, expected) <= 1e-5, (height, width)
        if index in (0, len(table) - 1):  # the tallest and the widest; the blocks know no sizes
            actual = ours(latents, 500, embeds)
            assert actual.shape == latents.shape
            assert error(actual, predict(reference, latents, 500, embeds)) <= 1e-5, (height, width)


@pytest.mark.parametrize("lengths", [(1, 300), (300, 20), (301, 1), (600, 7, 1)])
def test_equal_to_diffusers_with_masks_and_lengths(lengths):
    ours, reference = make_pair()
    latents, embeds, mask = make_input(8, 12, lengths)
    timestep = torch.tensor([999.0, 20.0, 413.5][: len(lengths)])
    expected = predict(reference, latents, timestep, embeds, mask.float())
    for kind in (torch.bool, torch.int64, torch.float32):
        assert error(ours(latents, timestep, embeds, mask.to(kind)), expected) <= 1e-5
    for index, length in enumerate(lengths):
        alone = ours(latents[index : index + 1], timestep[index], embeds[index : index + 1, :length])
        assert error(alone, expected[index : index + 1]) <= 1e-5
    assert error(ours(latents, timestep, embeds), expected) > 1e-3


def test_timestep_forms_are_equal():
    ours, _ = make_pair()
    latents, embeds, _ = make_input(4, 4, (3, 3))
    expected = ours(latents, torch.tensor([700, 700]), embeds)
    for timestep in (700, 700.0, torch.tensor(700), torch.tensor([700.0])):
        torch.testing.assert_close(ours(latents, timestep, embeds), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (1, 6), (8, 3)])
def test_sizes_off_the_patch_grid(size):
    ours, reference = make_pair()
    latents, embeds, _ = make_input(*size)
    padded = F.pad(latents, (0, size[1] % 2, 0, size[0] % 2), mode="replicate")
    expected = predict(reference, padded, 500, embeds)[..., : size[0], : size[1]]
    actual = ours(latents, 500, embeds)
    assert actual.shape == latents.shape
    assert error(actual, expected) <= 1e-5


@pytest.mark.parametrize(
    ("grid", "base", "scale"), [((16, 16), 16, 0.5), ((7, 31), 64, 2), ((256, 64), 128, 4)]
)
def test_positions_are_bit_equal_to_diffusers(grid, base, scale):
    rows, columns = engine.get_positions(*grid, 72, base, scale)
    expected = get_2d_sincos_pos_embed(72, grid, base_size=base, interpolation_scale=scale).float()
    table = torch.cat([columns.expand(*grid, 36), rows[:, None].expand(*grid, 36)], -1)
    assert torch.equal(table.flatten(0, 1), expected)


def test_positions_are_computed_once_per_size_and_bounded(monkeypatch):
    computed = []
    original = engine.get_positions
    monkeypatch.setattr(engine, "get_positions", lambda *args: computed.append(args[:2]) or original(*args))
    ours, _ = make_pair()
    for size in [(8, 8), (8, 12), (8, 8), (7, 11), (8, 12)]:
        latents, embeds, _ = make_input(*size)
        ours(latents, 500, embeds)
    assert computed == [(4, 4), (4, 6)]
    for width in range(2, 62, 2):
        latents, embeds, _ = make_input(2, width)
        ours(latents, 500, embeds)
    assert len(ours._positions) == engine.CACHED_SIZES


def test_bfloat16_is_as_close_as_diffusers():
    ours, reference = make_pair(sample_size=128, scale=2)
    latents, embeds, _ = make_input(32, 48)
    exact = predict(reference, latents, 500, embeds)
    tokens = torch.zeros(1, 16 * 24, 16, dtype=torch.bfloat16)
    positions = get_2d_sincos_pos_embed(16, (16, 24), base_size=64, interpolation_scale=2).bfloat16()
    assert torch.equal(ours.embed_positions(tokens, (16, 24))[0], positions)
    latents, embeds = latents.bfloat16(), embeds.bfloat16()
    actual = ours.bfloat16()(latents, 500, embeds)
    theirs = predict(reference.bfloat16(), latents, 500, embeds)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).norm() <= 1.25 * (theirs - exact).norm()


def test_kv_settings_hold_for_one_call_alone():
    ours, reference = make_pair()
    latents, embeds, _ = make_input(12, 16)
    dense = ours(latents, 500, embeds)
    setting = (KVCompression("mean", 2, (1,)),)
    compressed = ours(latents, 500, embeds, kv_compression=setting)
    clone = copy.deepcopy(ours)
    assert error(compressed, dense) > 1e-4
    assert torch.equal(ours(latents, 500, embeds), dense)
    assert torch.equal(clone(latents, 500, embeds, kv_compression=setting), compressed)
    assert torch.equal(ours(latents, 500, embeds, kv_compression=setting), compressed)
    assert torch.equal(ours(latents, 500, embeds, kv_compression=OFF), dense)
    assert error(predict(reference, latents, 500, embeds), dense) <= 1e-5


def test_kv_layers_and_window_are_respected():
    keys = []

    def attention(q, k, v, attn_mask=None):
        keys.append(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    config = make_config(layers=3)
    ours = build_transformer(config, attention=attention)
    ours.load_state_dict(random_weights(ours), assign=True)
    latents, embeds, _ = make_input(8, 8)
    setting = (KVCompression("mean", 2, (1,), 0.2, 0.8),)
    for timestep, middle in [(900, 16), (500, 4), (100, 16)]:
        keys.clear()
        ours(latents, timestep, embeds, kv_compression=setting)
        assert keys[::2] == [16, middle, 16] and keys[1::2] == [5, 5, 5]


def test_the_mlp_takes_large_pictures_in_runs_of_tokens(monkeypatch):
    ours, _ = make_pair()
    latents, embeds, _ = make_input(12, 16)
    whole = ours(latents, 500, embeds)
    runs = []
    ours.transformer_blocks[0].ff.register_forward_pre_hook(lambda _, given: runs.append(given[0].shape[1]))
    channels = ours.inner_dim
    monkeypatch.setattr(engine, "MLP_BYTES", len(latents) * 4 * channels * 4 * 20)
    torch.testing.assert_close(ours(latents, 500, embeds), whole, rtol=1e-5, atol=1e-5)
    assert runs == [20, 20, 8]


def test_conv_without_trained_weights_is_refused():
    ours, _ = make_pair()
    latents, embeds, _ = make_input(8, 8)
    with pytest.raises(SigmaError, match="trained weights"):
        ours(latents, 500, embeds, kv_compression=(KVCompression("conv", 2, (0,)),))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 0, 8)}, r"\(1, 4, 0, 8\)"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents need 2 prompt embeddings"),
        ({"prompt_embeds": torch.zeros(1, 5, 77)}, r"\(1, 5, 77\)"),
        ({"prompt_embeds": torch.zeros(1, 0, CAPTION)}, r"\(1, 0, 12\)"),
        ({"prompt_mask": torch.ones(1, 4)}, r"\(1, 4\)"),
        ({"timestep": torch.zeros(3)}, "3 timesteps"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, seen):
    ours, _ = make_pair()
    arguments = {
        "latents": torch.zeros(1, 4, 8, 8),
        "timestep": 5,
        "prompt_embeds": torch.zeros(1, 5, CAPTION),
    }
    with pytest.raises(SigmaError, match=seen):
        ours(**(arguments | change))


def test_layer_classes_are_used_throughout_and_restored():
    class Linear(torch.nn.Linear):
        pass

    class Conv2d(torch.nn.Conv2d):
        pass

    class LayerNorm(torch.nn.LayerNorm):
        pass

    before = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.Embedding)
    config = make_config(qk_norm=True, kv=KVWeights(ratio=2, layers=(1,)))
    operations = SimpleNamespace(Linear=Linear, Conv2d=Conv2d, LayerNorm=LayerNorm)
    model = build_transformer(config, operations)
    for plain, own in zip(before, (Linear, Conv2d, LayerNorm), strict=False):
        layers = [m for m in model.modules() if isinstance(m, plain)]
        assert layers and all(type(m) is own for m in layers)
    assert before == (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.Embedding)

    class Broken(torch.nn.Linear):
        def __init__(self, *args, **kwargs):
            raise RuntimeError("no layer")

    with pytest.raises(RuntimeError, match="no layer"):
        build_transformer(config, SimpleNamespace(Linear=Broken, Conv2d=Conv2d))
    assert before == (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.Embedding)


def original_positions(grid, width, base_size, scale):
    """The authors' sine-cosine table (N, C), one token at a time."""
    omega = 1 / 10000 ** (torch.arange(width // 4).double() / (width // 4))
    table = torch.zeros(*grid, width)
    for row in range(grid[0]):
        for column in range(grid[1]):
            across = column / (grid[1] / base_size) / scale * omega
            down = row / (grid[0] / base_size) / scale * omega
            table[row, column] = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()]).float()
    return table.flatten(0, 1)


def original_network(weights, latents, timestep, embeds, heads, base_size, scale, ratio=2):
    """PixArtMS of the authors, from scratch on original keys: fused qkv, every prompt token is real."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(q, k, v):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def norm(x, name=None, eps=1e-6):
        affine = (weights[f"{name}.weight"], weights[f"{name}.bias"]) if name else (None, None)
        return F.layer_norm(x, x.shape[-1:], *affine, eps=eps)

    def compress(x, name):
        picture = x.transpose(1, 2).unflatten(2, grid)
        picture = F.conv2d(
            picture,
            weights[f"{name}.sr.weight"],
            weights[f"{name}.sr.bias"],
            stride=ratio,
            groups=x.shape[-1],
        )
        return norm(picture.flatten(2).transpose(1, 2), f"{name}.norm", eps=1e-5)

    grid = (latents.shape[2] // 2, latents.shape[3] // 2)
    x = F.conv2d(latents, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=2)
    x = x.flatten(2).transpose(1, 2)
    x = x + original_positions(grid, x.shape[-1], base_size, scale)

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = timestep.float()[:, None] * frequencies
    t = linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")
    t = linear(F.silu(t), "t_embedder.mlp.2")
    t_block = linear(F.silu(t), "t_block.1")
    y = linear(F.gelu(linear(embeds, "y_embedder.y_proj.fc1"), approximate="tanh"), "y_embedder.y_proj.fc2")

    index = 0
    while f"blocks.{index}.scale_shift_table" in weights:
        name = f"blocks.{index}"
        table = weights[f"{name}.scale_shift_table"] + t_block.reshape(len(x), 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
        q, k, v = linear(norm(x) * (1 + scale1) + shift1, f"{name}.attn.qkv").chunk(3, dim=-1)
        if f"{name}.attn.q_norm.weight" in weights:
            q, k = norm(q, f"{name}.attn.q_norm", 1e-5), norm(k, f"{name}.attn.k_norm", 1e-5)
        if f"{name}.attn.sr.weight" in weights:
            k, v = compress(k, f"{name}.attn"), compress(v, f"{name}.attn")
        x = x + gate1 * linear(attend(q, k, v), f"{name}.attn.proj")
        k, v = linear(y, f"{name}.cross_attn.kv_linear").chunk(2, dim=-1)
        x = x + linear(attend(linear(x, f"{name}.cross_attn.q_linear"), k, v), f"{name}.cross_attn.proj")
        hidden = F.gelu(linear(norm(x) * (1 + scale2) + shift2, f"{name}.mlp.fc1"), approximate="tanh")
        x = x + gate2 * linear(hidden, f"{name}.mlp.fc2")
        index += 1

    shift, scale_ = (weights["final_layer.scale_shift_table"] + t[:, None]).chunk(2, dim=1)
    x = linear(norm(x) * (1 + scale_) + shift, "final_layer.linear")
    x = x.reshape(len(x), *grid, 2, 2, 8)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 8, *latents.shape[2:])[:, :4]


def original_weights(width, layers, qk_norm=False, kv_layers=(), base_size=16):
    shapes = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "t_block.1": (6 * width, width),
        "y_embedder.y_proj.fc1": (width, CAPTION),
        "y_embedder.y_proj.fc2": (width, width),
        "final_layer.linear": (32, width),
    }
    generator = torch.Generator().manual_seed(3)
    tables = {"final_layer.scale_shift_table": (2, width)}
    for i in range(layers):
        name = f"blocks.{i}"
        tables[f"{name}.scale_shift_table"] = (6, width)
        shapes |= {
            f"{name}.attn.qkv": (3 * width, width),
            f"{name}.attn.proj": (width, width),
            f"{name}.cross_attn.q_linear": (width, width),
            f"{name}.cross_attn.kv_linear": (2 * width, width),
            f"{name}.cross_attn.proj": (width, width),
            f"{name}.mlp.fc1": (4 * width, width),
            f"{name}.mlp.fc2": (width, 4 * width),
        }
        if qk_norm:
            shapes |= {f"{name}.attn.q_norm": (width,), f"{name}.attn.k_norm": (width,)}
        if i in kv_layers:
            shapes |= {f"{name}.attn.sr": (width, 1, 2, 2), f"{name}.attn.norm": (width,)}
    for name, shape in shapes.items():
        tables[f"{name}.weight"] = shape
        tables[f"{name}.bias"] = shape[:1]
    weights = {k: torch.randn(shape, generator=generator) * 0.15 for k, shape in tables.items()}
    extra = {
        "y_embedder.y_embedding": torch.zeros(300, CAPTION),
        "pos_embed": torch.zeros(1, base_size**2, width),
    }
    return weights, weights | extra


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv_layers", [(), (1,)])
def test_original_keys_equal_the_original_network(tmp_path, qk_norm, kv_layers):
    weights, stored = original_weights(144, 2, qk_norm, kv_layers)
    path = tmp_path / "PixArt-Sigma-XL-2-256x256.pth"
    torch.save({"state_dict": stored}, path)
    model = load_transformer(path)
    heads = model.sigma_config.num_attention_heads
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for size in [(8, 8), (12, 6), (6, 10)]:
        latents, embeds, _ = make_input(*size, (5, 5))
        timestep = torch.tensor([900, 10])
        expected = original_network(weights, latents, timestep, embeds, heads, base_size=16, scale=0.5)
        assert error(model(latents, timestep, embeds), expected) <= 1e-5
    dense = {k: v for k, v in weights.items() if ".sr." not in k}
    uncompressed = original_network(dense, latents, timestep, embeds, heads, base_size=16, scale=0.5)
    assert error(model(latents, timestep, embeds, kv_compression=OFF), uncompressed) <= 1e-5
    assert bool(kv_layers) == (error(expected, uncompressed) > 1e-4)


def test_loading_casts_and_reports_what_is_missing(tmp_path):
    _, stored = original_weights(144, 2)
    path = tmp_path / "PixArt-Sigma-XL-2-256x256.pth"
    torch.save(stored, path)
    model = load_transformer(path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    missing = {k: v for k, v in stored.items() if k != "blocks.1.attn.proj.bias"}
    torch.save(missing, path)
    with pytest.raises(CheckpointError, match="attn"):
        load_transformer(path)


def test_a_prompt_may_be_projected_before():
    ours, _ = make_pair()
    generator = torch.Generator().manual_seed(0)
    latents, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 4, 6, 8), (2, 5, CAPTION)))
    tokens = ours.project_prompt(embeds)
    assert torch.equal(ours(latents, 9, tokens, prompt_projected=True), ours(latents, 9, embeds))
    with pytest.raises(SigmaError, match=r"projected prompt must be \(B, tokens, 16\)"):
        ours(latents, 9, embeds, prompt_projected=True)
    with pytest.raises(SigmaError, match=r"must be \(B, tokens, 12\) for this transformer"):
        ours.project_prompt(tokens)
