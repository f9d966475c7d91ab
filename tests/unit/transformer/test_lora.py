"""Adapters change the weights as their own trainers do, under whatever names they are written.

Files are written by PEFT and LyCORIS themselves, and compared with what those merge; where a trainer is not a
library, its arithmetic is written down here once more.
"""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.lora import adapter_changes, merged, read_adapter
from pixart_sigma.transformer.lora_names import split_name

WIDTH = 144
QKV = [f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
KV = [f"transformer_blocks.1.attn2.to_{part}" for part in "kv"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj", "linear", "linear_1", "linear_2", "proj_out", "net.2"]


@pytest.fixture(scope="module")
def config(transformer_folder):
    return inspect(transformer_folder).config


@pytest.fixture
def after(config, diffusers_state_dict):
    """`after(file, ..., strengths=None)`: all weights once the adapters are merged, by diffusers' names."""

    def change(*files, strengths=None):
        strengths = strengths or [1.0] * len(files)
        adapters = [
            (read_adapter(file, config), strength) for file, strength in zip(files, strengths, strict=True)
        ]
        return merged(
            diffusers_state_dict, adapter_changes(adapters, lambda name: diffusers_state_dict[name])
        )

    return change


def random_like(shape, seed=0, scale=0.1):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.dist(found[name], weight) <= tolerance * weight.norm(), name


def changed_names(found, before):
    return {name for name, weight in before.items() if not torch.equal(found[name], weight)}


def randomise(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_", "oft_", "modules_to_save")):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            near = "magnitude" in name or "modules_to_save" in name
            parameter.data.copy_(parameter.data + noise if near else noise)


# The class of PEFT's configuration, and what it is told.
PEFT = {
    "alpha": ("Lora", {"r": 4, "lora_alpha": 7}),
    "rslora": ("Lora", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "patterns": (
        "Lora",
        {
            "r": 4,
            "lora_alpha": 3,
            "alpha_pattern": {"to_q": 9, "transformer_blocks.0.ff.net.0.proj": 2},
            "rank_pattern": {"to_k": 6},
        },
    ),
    "DoRA": ("Lora", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "biases": ("Lora", {"lora_alpha": 6, "lora_bias": True, "target_modules": ["to_q", "proj_out"]}),
    "modules to save": ("Lora", {"target_modules": ["to_q"], "modules_to_save": ["proj_out"]}),
    "LoHa": ("LoHa", {"r": 4, "alpha": 6}),
    "LoKr": ("LoKr", {"r": 2, "alpha": 6, "decompose_both": True}),
    "LoKr in full": ("LoKr", {"r": 400, "alpha": 100, "target_modules": ["to_q", "proj_out"]}),
    "OFT": ("OFT", {"target_modules": ["to_q", "net.2", "pos_embed.proj"]}),
    "OFT in 3 terms": ("OFT", {"num_cayley_neumann_terms": 3}),
    "OFT, exact": ("OFT", {"use_cayley_neumann": False}),
    "OFT, shared": ("OFT", {"block_share": True}),
}


def wrap(peft, transformer, kind, said):
    """The transformer as PEFT trains it, with random numbers in the adapter."""
    if kind == "OFT":
        said = {"r": 0, "oft_block_size": 8, "target_modules": ["to_q"], "use_cayley_neumann": True} | said
    chosen = getattr(peft, f"{kind}Config")(**{"target_modules": TARGETS} | said)
    model = peft.get_peft_model(copy.deepcopy(transformer), chosen)
    randomise(model)
    return model


@pytest.mark.parametrize("name", list(PEFT))
def test_what_peft_writes_is_what_it_merges(name, tmp_path, tiny_transformer, diffusers_state_dict, after):
    peft = pytest.importorskip("peft", reason="no PEFT: pip install peft")
    model = wrap(peft, tiny_transformer, *PEFT[name])
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()
    found = after(tmp_path)
    assert_equal(found, expected)
    assert changed_names(found, diffusers_state_dict)
    # The file by itself, with its configuration beside it.
    assert_equal(after(tmp_path / "adapter_model.safetensors"), expected)


def test_the_metadata_of_diffusers_says_alpha(tmp_path, tiny_transformer, after):
    peft = pytest.importorskip("peft", reason="no PEFT: pip install peft")
    from diffusers.loaders.lora_base import LoraBaseMixin

    model = wrap(peft, tiny_transformer, "Lora", {"r": 4, "lora_alpha": 11, "use_rslora": True})
    weights = {
        f"transformer.{name.removeprefix('base_model.model.')}": tensor
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    said = {
        f"transformer.{name}": value
        for name, value in model.peft_config["default"].to_dict().items()
        if not isinstance(value, set)
    }
    LoraBaseMixin.write_lora_layers(weights, tmp_path, True, None, None, True, lora_adapter_metadata=said)
    assert_equal(after(tmp_path), model.merge_and_unload().state_dict())


LYCORIS = {
    "LoCon": {"algo": "lora", "linear_dim": 4, "linear_alpha": 3, "conv_dim": 4, "conv_alpha": 3},
    "LoCon, tucker": {"algo": "lora", "linear_dim": 4, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 1}
    | {"use_tucker": True},
    "LoCon, rsLoRA": {"algo": "lora", "linear_dim": 4, "linear_alpha": 3, "rs_lora": True},
    "LoHa": {"algo": "loha", "linear_dim": 4, "linear_alpha": 4, "conv_dim": 4, "conv_alpha": 4},
    "LoHa, tucker": {"algo": "loha", "linear_dim": 4, "linear_alpha": 4, "conv_dim": 2, "conv_alpha": 2}
    | {"use_tucker": True},
    "LoKr": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 4, "factor": 8, "conv_dim": 1, "conv_alpha": 1},
    "LoKr, both": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 2, "factor": 12, "decompose_both": True},
    "LoKr, full": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 8, "full_matrix": True},
    "DoRA": {"algo": "lora", "linear_dim": 4, "linear_alpha": 4, "dora_wd": True},
    "DoRA by columns": {"algo": "lora", "linear_dim": 4, "linear_alpha": 4, "dora_wd": True}
    | {"wd_on_output": False},
    "LoKr with DoRA": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 4, "factor": 8, "dora_wd": True},
    "full": {"algo": "full"},
    "OFT": {"algo": "diag-oft", "linear_dim": 8, "constraint": 0, "rescaled": True},
    "OFT, constrained": {"algo": "diag-oft", "linear_dim": 8, "constraint": 1e-3},
}


@pytest.mark.parametrize("name", list(LYCORIS))
def test_what_lycoris_writes_is_what_it_computes(
    name, tmp_path, tiny_transformer, diffusers_state_dict, after
):
    reason = "no LyCORIS: pip install lycoris-lora toml"
    create_lycoris = pytest.importorskip("lycoris", reason=reason, exc_type=ImportError).create_lycoris
    model = copy.deepcopy(tiny_transformer)
    network = create_lycoris(model, 1.0, **{"linear_dim": 4, "linear_alpha": 4} | LYCORIS[name])
    expected = dict(diffusers_state_dict)
    generator = torch.Generator().manual_seed(7)
    places = {id(module): place for place, module in model.named_modules()}
    for module in network.loras:
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        place = places[id(module.org_module[0])]
        weight = expected[f"{place}.weight"]
        if name.startswith(("LoHa", "LoKr")):  # get_merged_weight has the scale twice, the forward pass once
            made = weight + module.get_weight(weight.shape)
            made, bias = module.apply_weight_decompose(made) if module.wd else made, None
        else:
            made, bias = module.get_merged_weight()
        expected[f"{place}.weight"] = made.detach().clone()
        if bias is not None:
            expected[f"{place}.bias"] = bias.detach().clone()
    network.apply_to()
    tensors = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, tmp_path / "l.safetensors")
    found = after(tmp_path / "l.safetensors")
    assert_equal(found, expected)
    assert len(changed_names(found, diffusers_state_dict)) >= 20


def low_rank(names, rank=4, seed=1, width=WIDTH, parts=1):
    """(name, A (r, in), B (out, r)) for each."""
    return [
        (
            name,
            random_like((rank, width), seed + 2 * index),
            random_like((parts * width, rank), seed + 2 * index + 1),
        )
        for index, name in enumerate(names)
    ]


ADAPTED = "transformer_blocks.1.attn1.to_out.0"
# (the layer's name, the ends of A and B, the alpha in the file, what it then is over the rank of 4)
SPELLINGS = {
    "PEFT": (f"base_model.model.{ADAPTED}", "AB", None, 1.0),
    "PEFT with the adapter's name": (f"base_model.model.{ADAPTED}", "default", None, 1.0),
    "train_pixart_lora_hf": (f"unet.base_model.model.{ADAPTED}", "AB", None, 1.0),
    "diffusers, SimpleTuner": (f"transformer.{ADAPTED}", "AB", None, 1.0),
    "SimpleTuner for ComfyUI": (f"transformer.{ADAPTED}", "AB", 2.0, 0.5),
    "SimpleTuner LyCORIS": (f"lycoris_{ADAPTED.replace('.', '_')}", "down", 2.0, 0.5),
    "OneTrainer COMFY_LORA": ("diffusion_model.blocks.1.attn.proj", "AB", 8.0, 2.0),
    "OneTrainer ORIGINAL_LORA": ("blocks.1.attn.proj", "AB", 8.0, 2.0),
    "OneTrainer KOHYA_LORA": ("lora_unet_blocks_1_attn_proj", "down", 8.0, 2.0),
    "OneTrainer LEGACY": (f"lora_transformer_{ADAPTED.replace('.', '_')}", "down", 8.0, 2.0),
    "old ai-toolkit": (f"lora_transformer__{ADAPTED.replace('.', '_')}", "down", 8.0, 2.0),
    "a whole ComfyUI model": ("model.diffusion_model.blocks.1.attn.proj", "down", None, 1.0),
    "no prefix": (ADAPTED, "AB", None, 1.0),
    "kohya with diffusers' names": (f"lora_unet_{ADAPTED.replace('.', '_')}", "down", 1.0, 0.25),
}
ENDS = {
    "AB": ("lora_A.weight", "lora_B.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
    "down": ("lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_each_spelling(name, tmp_path, diffusers_state_dict, after):
    layer, ends, alpha, scale = SPELLINGS[name]
    [(_, a, b)] = low_rank([layer])
    tensors = {f"{layer}.{ENDS[ends][0]}": a, f"{layer}.{ENDS[ends][1]}": b}
    if alpha:
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    torch.save(tensors, tmp_path / "lora.pt")
    expected = dict(diffusers_state_dict)
    expected[f"{ADAPTED}.weight"] = expected[f"{ADAPTED}.weight"] + scale * (b @ a)
    assert_equal(after(tmp_path / "lora.safetensors"), expected)
    assert_equal(after(tmp_path / "lora.pt"), expected)


FUSED = {
    "diffusion_model.blocks.0.attn.qkv": QKV,
    "lora_unet_blocks_0_attn_qkv": QKV,
    "blocks.1.cross_attn.kv_linear": KV,
    "lora_transformer_blocks_1_cross_attn_kv_linear": KV,
}


def fused_weight(weights, names):
    return torch.cat([weights[f"{name}.weight"] for name in names])


def split_into(weights, names, whole):
    parts = whole.chunk(len(names))
    return dict(weights) | {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}


def column_dora(weight, delta, magnitude):
    whole = weight + delta
    return magnitude * whole / whole.norm(dim=0, keepdim=True)


@pytest.mark.parametrize("layer", list(FUSED))
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "DoRA", "DoRA by rows", "OFT", "OFTv2", "diff"])
def test_fused_layers_are_computed_whole(layer, kind, tmp_path, diffusers_state_dict, after):
    names = FUSED[layer]
    weight = fused_weight(diffusers_state_dict, names)
    rows = len(weight)
    [(_, a, b)] = low_rank([layer], parts=len(names))
    delta = 0.5 * b @ a
    tensors = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(2.0)}
    if kind == "LoRA":
        expected = weight + delta
    elif kind == "LoHa":
        c, d = random_like((rows, 4), 8), random_like((4, WIDTH), 9)
        tensors = {"hada_w1_a": b, "hada_w1_b": a, "hada_w2_a": c, "hada_w2_b": d}
        expected = weight + (b @ a) * (c @ d)
    elif kind == "LoKr":
        w1, w2 = random_like((rows // 16, 12), 8), random_like((16, 12), 9)
        tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(123.0)}
        expected = weight + torch.kron(w1, w2)
    elif kind == "DoRA":
        tensors["dora_scale"] = 1 + random_like((1, WIDTH), 8)
        expected = column_dora(weight, delta, tensors["dora_scale"])
    elif kind == "DoRA by rows":
        tensors["dora_scale"] = 1 + random_like((rows, 1), 8)
        whole = weight + delta
        expected = tensors["dora_scale"] * whole / whole.norm(dim=1, keepdim=True)
    elif kind == "OFT":
        size = 54 if len(names) == 3 else 96  # which do not divide the 144 rows of q, k and v
        blocks = random_like((rows // size, size, size), 8, 0.01)
        skew, eye = blocks - blocks.mT, torch.eye(size)
        turn = torch.block_diag(*((eye + skew) @ torch.linalg.inv(eye - skew)))
        tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
        expected = turn.T @ weight
    elif kind == "OFTv2":
        upper = random_like((WIDTH // 8, 28), 8)
        skew = torch.zeros(WIDTH // 8, 8, 8)
        above = torch.triu_indices(8, 8, 1)
        skew[:, above[0], above[1]] = upper / (2 * math.sqrt(7))
        skew = skew - skew.mT
        turn = torch.eye(8) + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew
        turn = torch.block_diag(*(turn + skew @ skew @ skew @ skew))
        tensors = {"oft_R.weight": upper, "oft_R.scaled_oft": torch.tensor(True)}
        expected = weight @ turn.T
    else:
        tensors = {"diff": random_like((rows, WIDTH), 8), "diff_b": random_like((rows,), 9)}
        expected = weight + tensors["diff"]
    save_file({f"{layer}.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    expected = split_into(diffusers_state_dict, names, expected)
    if kind == "diff":
        for name, part in zip(names, tensors["diff_b"].chunk(len(names)), strict=True):
            expected[f"{name}.bias"] = expected[f"{name}.bias"] + part
    assert_equal(after(tmp_path / "lora.safetensors"), expected)


def test_layers_outside_of_the_blocks_and_tables(tmp_path, diffusers_state_dict, after):
    table = random_like((6, WIDTH), 1)
    last = random_like((2, WIDTH), 2)
    up, down = random_like((WIDTH, 3, 1, 1), 3), random_like((3, 4, 2, 2), 4)
    step = random_like((6 * WIDTH, WIDTH), 5)
    save_file(
        {
            "transformer_blocks.0.scale_shift_table.diff": table,
            "lora_unet_final_layer_scale_shift_table.diff": last,
            "transformer.pos_embed.proj.lora_A.weight": down,
            "transformer.pos_embed.proj.lora_B.weight": up,
            "t_block.1.diff": step,
        },
        tmp_path / "lora.safetensors",
    )
    expected = dict(diffusers_state_dict)
    for name, delta in {
        "transformer_blocks.0.scale_shift_table": table,
        "scale_shift_table": last,
        "pos_embed.proj.weight": (up.flatten(1) @ down.flatten(1)).reshape(WIDTH, 4, 2, 2),
        "adaln_single.linear.weight": step,
    }.items():
        expected[name] = expected[name] + delta
    assert_equal(after(tmp_path / "lora.safetensors"), expected)


def write_lora(path, layer=QKV[0], seed=1, **more):
    [(_, a, b)] = low_rank([layer], seed=seed, parts=3 if layer.endswith("qkv") else 1)
    save_file(
        {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        | {f"{layer}.{end}": tensor for end, tensor in more.items()},
        path,
    )
    return path, b @ a


def test_strength_scales_and_zero_is_exactly_off(tmp_path, diffusers_state_dict, after, config):
    file, delta = write_lora(tmp_path / "one.safetensors")
    name = f"{QKV[0]}.weight"
    expected = dict(diffusers_state_dict)
    for strength in (0.5, -1.0, 2.0):
        expected[name] = diffusers_state_dict[name] + strength * delta
        assert_equal(after(file, strengths=[strength]), expected)
    off = after(file, strengths=[0.0])
    assert not changed_names(off, diffusers_state_dict)
    assert adapter_changes([(read_adapter(file, config), 0.0)], diffusers_state_dict.get) == {}


def test_strength_goes_that_share_of_the_way_for_what_is_not_added(tmp_path, diffusers_state_dict, after):
    name = f"{QKV[0]}.weight"
    magnitude = 1 + random_like((1, WIDTH), 3)
    dora, _ = write_lora(tmp_path / "dora.safetensors", dora_scale=magnitude)
    save_file({f"{QKV[0]}.oft_blocks": random_like((9, 16, 16), 4)}, tmp_path / "oft.safetensors")
    save_file({f"{QKV[0]}.oft_R.weight": random_like((9, 120), 4)}, tmp_path / "oft2.safetensors")
    replaced, _ = write_lora(tmp_path / "replaced.safetensors", QKV[1])
    both = load_file(replaced) | {"proj_out.weight": random_like((32, WIDTH), 5)}
    save_file(both, tmp_path / "replaced.safetensors")
    for file, changed in (
        (dora, name),
        (tmp_path / "oft.safetensors", name),
        (tmp_path / "oft2.safetensors", name),
        (tmp_path / "replaced.safetensors", "proj_out.weight"),
    ):
        weight, whole = diffusers_state_dict[changed], after(file)[changed]
        half = after(file, strengths=[0.3])[changed]
        assert torch.dist(half, weight + 0.3 * (whole - weight)) <= 1e-5 * weight.norm(), file.name
        assert torch.dist(whole, weight) > 0.01 * weight.norm(), file.name


def test_onetrainer_turns_a_convolution_the_other_way_round(tmp_path, diffusers_state_dict, after):
    upper = random_like((4, 6), 3)
    skew = torch.zeros(4, 4, 4)
    above = torch.triu_indices(4, 4, 1)
    skew[:, above[0], above[1]] = upper
    skew = skew - skew.mT
    power = [torch.matrix_power(skew, exponent) for exponent in range(5)]
    turn = power[0] + 2 * (power[1] + power[2] + power[3]) + power[4]
    save_file({"transformer.pos_embed.proj.oft_R.weight": upper}, tmp_path / "oft.safetensors")
    weight = diffusers_state_dict["pos_embed.proj.weight"]
    turned = torch.einsum("ork,rkc->orc", weight.reshape(WIDTH, 4, 4), turn).reshape(weight.shape)
    expected = dict(diffusers_state_dict) | {"pos_embed.proj.weight": turned}
    assert_equal(after(tmp_path / "oft.safetensors"), expected)


def test_several_adapters_each_change_what_the_one_before_left(tmp_path, diffusers_state_dict, after):
    one, first = write_lora(tmp_path / "one.safetensors", QKV[1])
    magnitude = 1 + random_like((1, WIDTH), 3)
    two, delta = write_lora(tmp_path / "two.safetensors", "blocks.0.attn.qkv", seed=9, dora_scale=magnitude)
    weights = dict(diffusers_state_dict)
    weights[f"{QKV[1]}.weight"] = weights[f"{QKV[1]}.weight"] + first
    whole = column_dora(fused_weight(weights, QKV), delta, magnitude)
    assert_equal(after(one, two), split_into(weights, QKV, whole))
    # The other way round the DoRA has other weights, and the same file twice acts twice.
    whole = column_dora(fused_weight(diffusers_state_dict, QKV), delta, magnitude)
    expected = split_into(diffusers_state_dict, QKV, whole)
    expected[f"{QKV[1]}.weight"] = expected[f"{QKV[1]}.weight"] + first
    assert_equal(after(two, one), expected)
    whole = column_dora(whole, delta, magnitude)
    assert_equal(after(two, two), split_into(diffusers_state_dict, QKV, whole))


def test_changes_keep_the_weight_and_its_dtype(tmp_path, config, diffusers_state_dict):
    file, delta = write_lora(tmp_path / "one.safetensors")
    name = f"{QKV[0]}.weight"
    changes = adapter_changes([(read_adapter(file, config), 1.0)], diffusers_state_dict.get)
    weight = diffusers_state_dict[name].to(torch.bfloat16)
    before = weight.clone()
    changed = changes[name](weight)
    assert torch.equal(weight, before) and changed.dtype == torch.bfloat16
    assert torch.equal(changed, (before.float() + delta).to(torch.bfloat16))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_a_loaded_transformer_has_the_changes(stored, stream, tmp_path, diffusers_state_dict, config):
    magnitude = 1 + random_like((1, WIDTH), 3)
    file, delta = write_lora(tmp_path / "lora.safetensors", "blocks.0.attn.qkv", dora_scale=magnitude)
    weights = {name: weight.to(stored) for name, weight in diffusers_state_dict.items()}
    save_file(weights, tmp_path / "model-1024.safetensors")
    changes = adapter_changes([(read_adapter(file, config), 1.0)], weights.get)
    loaded = load_transformer(
        tmp_path / "model-1024.safetensors", dtype=torch.bfloat16, stream=stream, changes=changes
    ).state_dict()
    plain = {name: weight.float() for name, weight in weights.items()}
    expected = split_into(plain, QKV, column_dora(fused_weight(plain, QKV), delta, magnitude))
    for name, weight in expected.items():
        assert (loaded[name] == weight.to(torch.bfloat16)).float().mean() > 0.995, name  # rounded once
        if not name.startswith("transformer_blocks.0.attn1.to_"):
            assert torch.equal(loaded[name], weight.to(torch.bfloat16)), name
    unchanged = load_transformer(tmp_path / "model-1024.safetensors", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(unchanged[name], plain[name].to(torch.bfloat16)) for name in plain)


def test_a_change_of_what_is_not_there_is_refused(diffusers_file):
    with pytest.raises(ValueError, match="A change is for transformer_blocks.7.attn1.to_q.weight"):
        load_transformer(diffusers_file, changes={"transformer_blocks.7.attn1.to_q.weight": lambda w: w})


def test_what_peft_wrote_says_what_its_tensors_are(tmp_path, tiny_transformer):
    """Every name that PEFT gives for the targets of PixArt-Sigma's own script is read."""
    peft = pytest.importorskip("peft", reason="no PEFT: pip install peft")
    model = wrap(peft, tiny_transformer, "Lora", {"r": 2, "use_dora": True})
    model.save_pretrained(tmp_path)
    parts = {split_name(name)[1] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert parts == {"lora_down", "lora_up", "magnitude"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
