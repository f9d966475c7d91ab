"""Names of layers in adapters, and files that are refused: with one sentence, and nothing applied."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.config import XL_2, expected_shapes
from pixart_sigma.transformer.lora import any_names, read_adapter
from pixart_sigma.transformer.lora_names import DOTTED, FLATTENED, LayerNames, split_name

WIDTH, RANK = 144, 4
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def config(transformer_folder):
    return inspect(transformer_folder).config


@pytest.fixture(scope="module")
def names():
    return LayerNames(expected_shapes(XL_2))


def test_every_layer_is_found_under_every_prefix(names):
    weights = expected_shapes(XL_2)
    modules = {name.removesuffix(".weight").removesuffix(".bias") for name in weights}
    for module in modules:
        for prefix in DOTTED:
            assert names.find(prefix + module).modules == (module,), prefix
        for prefix in FLATTENED:
            flat = module.replace(".", "_")
            assert names.find(prefix + flat).modules == (module,), prefix
            if prefix:
                assert names.find(f"{prefix}_{flat}").modules == (module,), prefix


def test_the_authors_names_of_fused_layers(names):
    qkv = tuple(f"transformer_blocks.27.attn1.to_{part}" for part in "qkv")
    kv = tuple(f"transformer_blocks.3.attn2.to_{part}" for part in "kv")
    for name, modules in {
        "diffusion_model.blocks.27.attn.qkv": qkv,
        "lora_unet_blocks_27_attn_qkv": qkv,
        "blocks.3.cross_attn.kv_linear": kv,
        "lora_transformer__blocks_3_cross_attn_kv_linear": kv,
        "model.diffusion_model.final_layer.linear": ("proj_out",),
        "lora_unet_t_embedder_mlp_2": ("adaln_single.emb.timestep_embedder.linear_2",),
        "x_embedder.proj": ("pos_embed.proj",),
    }.items():
        assert names.find(name).modules == modules, name


def test_the_longest_prefix_says_whose_the_name_is(names):
    for prefix, spelling in {"base_model.model.": "PEFT", "transformer.": "diffusers"}.items():
        assert names.find(prefix + LAYER).spelling == spelling
    assert names.find("lora_unet_blocks_0_attn_qkv").spelling == "kohya"


def test_other_models_layers_are_not_found(names):
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "transformer_blocks.28.attn1.to_q",
        "lora_unet_transformer_blocks_0_attn1_to",
        "transformer_blocks.0.attn1.to.q",
    ):
        assert names.find(name) is None, name


def test_a_name_of_two_modules_is_an_error():
    names = LayerNames(["a.b_c.weight", "a_b.c.weight"])
    assert names.find("a_b.c").modules == ("a_b.c",)
    with pytest.raises(SigmaError, match="lora_unet_a_b_c may be a.b_c or a_b.c"):
        names.find("lora_unet_a_b_c")


def test_all_spellings_are_found_again(names):
    spelled = dict(names.spellings())
    assert len(spelled) > 10_000
    assert all(names.find(name).modules == modules for name, modules in list(spelled.items())[::7])


def test_the_ends_of_names():
    for end, part in {
        "lora_A.weight": "lora_down",
        "lora_B.default.weight": "lora_up",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
        "oft_R.weight": "oft_R",
        "lokr_w2_a": "lokr_w2_a",
        "alpha": "alpha",
    }.items():
        assert split_name(f"{LAYER}.{end}") == (LAYER, part)
    assert split_name(f"{LAYER}.glora_a1") == ("", "")


def lora(layer=LAYER, rank=RANK, width=WIDTH, **more):
    tensors = {"lora_A.weight": torch.ones(rank, width), "lora_B.weight": torch.ones(width, rank)}
    return {f"{layer}.{end}": tensor for end, tensor in (tensors | more).items()}


def without(tensors, end):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def nan(tensors, name=f"{LAYER}.lora_A.weight"):
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = float("nan")
    return tensors


SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED = {
    "SDXL": (lora(SDXL), r"is an adapter of Stable Diffusion or SDXL \(lora_unet_down_blocks_1.*not of Pix"),
    "alpha": (
        lora() | lora("lora_unet_adaln_single_emb_resolution_embedder_linear_1"),
        "is an adapter of PixArt-alpha .*another model",
    ),
    "another width": (
        lora(width=1152),
        r"changes transformer_blocks.0.attn1.to_q as \(1152, 1152\).*\(144, 144\).*another width",
    ),
    "another depth": (
        lora() | lora("transformer_blocks.9.attn1.to_q"),
        "transformer_blocks.9.attn1.to_q.lora_A",
    ),
    "A without B": (without(lora(), "lora_B.weight"), "lacks lora_up for transformer_blocks.0.attn1.to_q"),
    "B without A": (without(lora(), "lora_A.weight"), "lacks lora_down for transformer_blocks.0.attn1.to_q"),
    "alpha alone": ({f"{LAYER}.alpha": torch.tensor(1.0)}, "has alpha for .*nothing that it is of"),
    "NaN": (nan(lora()), r"not finite \(NaN\) in lora_down of transformer_blocks.0.attn1.to_q"),
    "infinite alpha": (lora(alpha=torch.tensor(float("inf"))), "says alpha inf"),
    "two alphas": (lora(alpha=torch.ones(2)), r"says alpha \[1.0, 1.0\]"),
    "rank 0": (lora(rank=0), "has rank 0 for transformer_blocks.0.attn1.to_q"),
    "alpha 0": (lora(alpha=torch.tensor(0.0)), "says alpha 0 for transformer_blocks.0.attn1.to_q"),
    "integers": ({k: v.to(torch.int8) for k, v in lora().items()}, "stores lora_down of .* as torch.int8"),
    "other ranks": (
        lora() | {f"{LAYER}.lora_B.weight": torch.ones(WIDTH, RANK + 1)},
        r"do not fit together: lora_down \(4, 144\), lora_up \(144, 5\)",
    ),
    "magnitudes": (lora(dora_scale=torch.ones(1, 7)), r"magnitudes of .* are \(1, 7\), for a weight of"),
    "two kinds": (lora(diff=torch.ones(WIDTH, WIDTH)), "LoRA and full-rank for .* at once"),
    "one twice": (lora() | lora(f"transformer.{LAYER}"), "lora_down of .* twice, under two names"),
    "unmatched": (
        lora() | {f"other.{number}.lora_A.weight": torch.ones(1) for number in range(5)},
        "other.0.lora_A.weight, other.1.lora_A.weight, other.2.lora_A.weight and 2 more",
    ),
    "another kind": (lora() | {f"{LAYER}.glora_a1": torch.ones(1)}, "does not have: .*glora_a1"),
    "BOFT": ({f"{LAYER}.oft_blocks": torch.ones(2, 3, 4, 4)}, "is BOFT"),
    "OFT of another width": ({f"{LAYER}.oft_R.weight": torch.ones(3, 28)}, r"as \(144, 24\)"),
    "half a LoKr": (
        {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2_a": torch.ones(72, 2)},
        "lacks lokr_w2_b",
    ),
    "LoKr of another size": (
        {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(99999, 2)},
        r"as \(199998, 4\)",
    ),
    "a bias that is not there": (
        {"scale_shift_table.diff_b": torch.ones(2)},
        "changes a bias of scale_shift_table, which has none",
    ),
    "not an adapter": ({"some.weight": torch.ones(2)}, "is no adapter of PixArt-Sigma: it has some.weight"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused(name, tmp_path, config):
    tensors, words = REFUSED[name]
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words) as raised:
        read_adapter(path, config)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_whole_transformer_is_no_adapter(diffusers_file, config):
    with pytest.raises(CheckpointError, match="holds whole weights and no changes.*as the transformer"):
        read_adapter(diffusers_file, config)


def test_code_in_a_pickle_is_never_run(tmp_path, config):
    import pickle

    class Code:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "lora.pt"
    path.write_bytes(pickle.dumps({"a": Code()}))
    with pytest.raises(CheckpointError, match="no weights that can be read safely"):
        read_adapter(path, config)


def test_what_is_not_the_transformers_is_told(tmp_path, config):
    tensors = lora("lora_transformer_" + LAYER.replace(".", "_"))
    tensors |= lora("lora_te_encoder_block_0_layer_0_SelfAttention_q")
    tensors |= lora("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q")
    tensors["bundle_emb.cat.t5"] = torch.ones(2, 4096)
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = read_adapter(tmp_path / "lora.safetensors", config)
    assert [edit.names for edit in adapter.edits] == [(f"{LAYER}.weight",)]
    (embeddings,) = adapter.notices
    assert "also changes the text encoder (4 tensors)" in adapter.text.left_out
    assert "(1 tensors)" in embeddings


def write_peft(folder, config=None, **tensors):
    save_file(lora(f"base_model.model.{LAYER}", **tensors), folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def scale_of(folder, config):
    [edit] = read_adapter(folder, config).edits
    return edit.kind.scale


def test_alpha_is_where_the_format_has_it(tmp_path, config):
    said = {"r": RANK, "lora_alpha": 8}
    assert scale_of(write_peft(tmp_path, said), config) == 2
    assert scale_of(write_peft(tmp_path, said | {"use_rslora": True}), config) == 4
    assert scale_of(write_peft(tmp_path, said | {"alpha_pattern": {"attn1.to_q": 1}}), config) == 0.25
    assert scale_of(write_peft(tmp_path, said | {"alpha_pattern": {"to": 1, "^to_q": 1}}), config) == 2
    assert scale_of(write_peft(tmp_path, said, alpha=torch.tensor(1.0)), config) == 0.25


def test_a_peft_file_without_its_configuration_is_told(tmp_path, config):
    adapter = read_adapter(write_peft(tmp_path), config)
    assert "adapter_config.json" in adapter.notices[0] and adapter.edits[0].kind.scale == 1
    # Another file's configuration is not its own.
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    assert scale_of(tmp_path / "mine.safetensors", config) == 1


@pytest.mark.parametrize(
    "said, words",
    [
        ({"lora_alpha": "8"}, "says lora_alpha '8'"),
        ({"lora_alpha": 0}, "says lora_alpha 0"),
        ({"alpha_pattern": {"(a|a)*b": 1}}, "has the alpha_pattern"),
        ({"alpha_pattern": [1]}, "which is no table of layers"),
        ({"alpha_pattern": {"to_q": None, "to_k": True}}, "says alpha_pattern of to_k True"),
        ({"coft": True}, "constrained OFT"),
    ],
)
def test_a_configuration_that_can_not_be_obeyed(said, words, tmp_path, config):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_adapter(write_peft(tmp_path, said), config)


def test_the_fingerprint_is_of_all_that_decides_what_it_does(tmp_path, config):
    found = {
        read_adapter(write_peft(tmp_path, {"lora_alpha": alpha}), config).fingerprint for alpha in (1, 2)
    }
    write_peft(tmp_path, {"lora_alpha": 1}, alpha=torch.tensor(1.0))
    assert len(found | {read_adapter(tmp_path, config).fingerprint}) == 3


def test_names_are_known_without_a_transformer():
    names = any_names()
    assert names.find("lora_unet_blocks_41_attn_qkv").modules[1] == "transformer_blocks.41.attn1.to_k"
    assert names.find("transformer_blocks.3.attn1.norm_q") and not LayerNames(
        expected_shapes(replace(XL_2, num_layers=3))
    ).find("transformer_blocks.3.attn1.to_q")
