"""Our MODEL equals the host's own PixArt, also with LoRAs of every kind, merged, and partially loaded. On the
CPU."""

import json
import re
import shutil
from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.model_management import load_models_gpu
from comfy_extras.nodes_custom_sampler import SamplerCustom
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract
from pack.nodes.few_step import FewStepRecipe
from pack.nodes.host.adapters import patch_model
from pack.nodes.host.lora import PREFIX, authors_names
from pack.nodes.host.transformer import load_model
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.transformer.checkpoint import inspect
from pack.pixart_sigma.transformer.lora import adapter_changes, read_adapter
from pack.pixart_sigma.transformer.merging import Merge, write_merged
from random_models import conditioning, difference, ksampler, normal, transformer
from safetensors.torch import load_file, save_file

# The host's own PixArt knows one width, and positions of 1024-class sizes: 1440 x 96 pixels are one.
SIZE = (180, 12)
WIDTH = 1152
CONDITIONING = conditioning(20, 4096, seed=1), conditioning(20, 4096, seed=2)
QUICK = {"steps": 1, "cfg": 1}


def lora(names, kind="lora_A lora_B"):
    """Small matrices for each weight, under the names that the kind of file has."""
    down, up = kind.split()
    weights = {}
    for index, (name, (rows, columns)) in enumerate(names.items()):
        weights[f"{name}.{down}.weight"] = normal(4, columns, seed=2 * index) / 30
        weights[f"{name}.{up}.weight"] = normal(rows, 4, seed=2 * index + 1) / 30
    return weights


def blocks(width):
    return {
        "transformer_blocks.0.attn1.to_q": (width, width),
        "transformer_blocks.0.attn1.to_v": (width, width),
        "transformer_blocks.0.attn1.to_out.0": (width, width),
        "transformer_blocks.0.attn2.to_k": (width, width),
        "transformer_blocks.0.attn2.to_q": (width, width),
        "transformer_blocks.0.ff.net.0.proj": (4 * width, width),
        "adaln_single.linear": (6 * width, width),
        "proj_out": (32, width),
    }


def fused(width):
    return {
        "blocks.0.attn.qkv": (3 * width, width),
        "blocks.0.cross_attn.kv_linear": (2 * width, width),
        "blocks.0.cross_attn.proj": (width, width),
        "blocks.0.mlp.fc2": (width, 4 * width),
        "t_block.1": (6 * width, width),
    }


NARROW = 144  # for what needs no host's PixArt beside ours


def loras(width):
    """Files by the prefix of their names."""
    split, joined = blocks(width), fused(width)
    kohya = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in joined.items()}
    return {
        "base_model.model.": lora({f"base_model.model.{name}": shape for name, shape in split.items()}),
        "transformer.": lora({f"transformer.{name}": shape for name, shape in split.items()}),
        "diffusion_model.": lora({f"diffusion_model.{name}": shape for name, shape in joined.items()}),
        "lora_unet_": lora(kohya, "lora_down lora_up")
        | {"lora_unet_blocks_0_attn_qkv.alpha": torch.tensor(2.0)},
        "lora_unet_ with lokr and bias": {
            "lora_unet_blocks_0_attn_qkv.lokr_w1": normal(3, 2, seed=3) / 10,
            "lora_unet_blocks_0_attn_qkv.lokr_w2": normal(width, width // 2, seed=4) / 10,
            "lora_unet_blocks_0_attn_qkv.diff_b": normal(3 * width, seed=5),
        },
    }


LORAS = loras(WIDTH)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide_1024.safetensors"
    save_file(transformer(16, 1, 4096).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    return load_model(file)


@pytest.fixture(scope="module")
def narrow_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "narrow" / "model_1024.safetensors"
    path.parent.mkdir()
    save_file(transformer(2, 1, 64).state_dict(), path)
    (path.parent / "config.json").write_text('{"num_attention_heads": 2}')
    return path


@pytest.fixture(scope="module")
def narrow(narrow_file):
    return load_model(narrow_file)


@pytest.fixture(scope="module")
def native(file):
    return comfy.sd.load_diffusion_model(str(file))


@pytest.fixture(scope="module")
def other(file, tmp_path_factory):
    """A file of other weights: each is one of the first with its rows turned round."""
    path = tmp_path_factory.mktemp("models") / "other_1024.safetensors"
    save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(file).items()}, path)
    return path


def sample(model, **settings):
    return ksampler(model, *CONDITIONING, SIZE, **settings)


def sample_narrow(model):
    return ksampler(model, conditioning(7, 64, seed=1), conditioning(7, 64, seed=2), (16, 12), **QUICK)


def anonymous_bytes() -> int:
    """Of this process's memory, what no file stands behind."""
    return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_loading_reads_no_weights_into_ram(file):
    before = anonymous_bytes()
    model = load_model(file)
    assert anonymous_bytes() - before < file.stat().st_size / 4
    assert model.model_size() > file.stat().st_size / 2


def test_it_samples_as_the_hosts_own(ours, native):
    assert difference(sample(ours), sample(native)) < 1e-4


def test_a_few_step_recipe_runs_on_both(ours, native):
    made = []
    for model in (ours, native):
        sigmas, sampler = FewStepRecipe.execute(model, "lcm-2", 1.0).args
        latent = {"samples": torch.zeros(1, 4, *SIZE)}
        run = SamplerCustom.execute(model, True, 0, 1.0, *CONDITIONING, sampler, sigmas, latent)
        made.append(run.args[0]["samples"])
    assert difference(*made) < 1e-4


def patched_weight(model, name):
    """A weight by the authors' name as the patches make it, of either loader's MODEL."""
    names = authors_names(model.model_state_dict()).get(PREFIX + name, (PREFIX + name,))
    return torch.cat([model.patch_weight_to_device(part, return_weight=True) for part in names])


def test_loras_do_what_they_do_to_the_hosts_own(ours, native):
    for name, weights in LORAS.items():
        theirs, result = (
            comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0)[0] for model in (native, ours)
        )
        assert len(theirs.patches) > 1
        for key in theirs.patches:
            made, plain = (patched_weight(model, key.removeprefix(PREFIX)) for model in (theirs, native))
            assert difference(made, plain) > 1e-3, (name, key)
            assert difference(patched_weight(result, key.removeprefix(PREFIX)), made) < 1e-5, (name, key)


def test_a_lora_is_put_on_weights_as_they_come_to_the_device(ours):
    """With half of the weights away from it."""
    network = ours.model.diffusion_model
    inputs = normal(1, 4, *SIZE, seed=6), torch.tensor([500.0]), CONDITIONING[0][0][0]
    ours.detach()
    patched = comfy.sd.load_lora_for_models(ours, None, LORAS["lora_unet_"], 0.8, 0)[0]
    patched.load(torch.device("cpu"), full_load=True)
    expected = network(*inputs)
    patched.detach()
    assert difference(network(*inputs), expected) > 1e-3
    patched.load(torch.device("cpu"), lowvram_model_memory=patched.model_size() // 2)
    assert patched.lowvram_patch_counter() > 3
    assert difference(network(*inputs), expected) < 1e-5
    patched.detach()
    assert not any("blocks.0.attn.qkv" in name for name in ours.model_state_dict())


def test_every_patch_of_a_lora_finds_its_weight(ours):
    targets = comfy.lora.model_lora_keys_unet(ours.model, {})
    for name, weights in LORAS.items():
        patches = comfy.lora.load_lora(weights, targets)
        assert set(ours.clone().add_hook_patches(comfy.hooks.WeightHook(), patches)) == set(patches), name
        assert set(ours.clone().add_patches(patches | {"elsewhere.weight": ()})) == set(patches), name


def test_a_bypassed_lora_does_what_a_loaded_one_does(narrow):
    """Also after another one."""
    files = loras(NARROW)
    plain = sample_narrow(narrow)
    loaded = bypassed = narrow
    for name in ("diffusion_model.", "lora_unet_ with lokr and bias"):
        loaded = comfy.sd.load_lora_for_models(loaded, None, files[name], 0.8, 0)[0]
        bypassed = comfy.sd.load_bypass_lora_for_models(bypassed, None, files[name], 0.8, 0)[0]
        expected = sample_narrow(loaded)
        assert difference(expected, plain) > 1e-3, name
        assert difference(sample_narrow(bypassed), expected) < 1e-4, name
    assert difference(sample_narrow(narrow), plain) == 0
    for name in ("transformer.", "base_model.model."):
        with pytest.raises(SigmaError, match="Load it with Load LoRA"):
            comfy.sd.load_bypass_lora_for_models(narrow, None, files[name], 0.8, 0)


def spelled_loras():
    """By the writer: the weights of a file in its spelling, which the host by itself does not find."""
    plain = {name: shape for name, shape in blocks(NARROW).items() if name != "proj_out"}
    flat = {name.replace(".", "_"): shape for name, shape in plain.items()}
    kohya = "lora_down lora_up"
    made = {
        "OneTrainer": lora({f"lora_transformer_{name}": shape for name, shape in flat.items()}, kohya),
        "ai-toolkit": lora({f"lora_transformer__{name}": shape for name, shape in flat.items()}, kohya),
        "LyCORIS": lora({f"lycoris_{name}": shape for name, shape in flat.items()}, kohya),
        "no prefix": lora(plain),
        "OneTrainer's original": lora(fused(NARROW)),
        "a table and biases": {
            "transformer_blocks.0.scale_shift_table.diff": normal(6, NARROW, seed=7),
            "lora_transformer_transformer_blocks_0_attn1_to_k.diff_b": normal(NARROW, seed=8),
            "lycoris_blocks_0_attn_qkv.diff_b": normal(3 * NARROW, seed=9),
        },
    }
    made["OneTrainer"]["lora_transformer_transformer_blocks_0_attn1_to_q.alpha"] = torch.tensor(2.0)
    return made


@pytest.mark.parametrize("writer", spelled_loras())
def test_every_spelling_is_what_the_engine_makes_of_it(narrow, narrow_file, tmp_path, writer):
    weights = spelled_loras()[writer]
    save_file(weights, tmp_path / "adapter.safetensors")
    adapter = read_adapter(tmp_path / "adapter.safetensors", narrow.model.diffusion_model.sigma_config)
    expected = load_file(narrow_file)
    changes = adapter_changes([(adapter, 0.8)], expected.__getitem__)
    expected |= {name: change(expected[name]) for name, change in changes.items()}
    patched = comfy.sd.load_lora_for_models(narrow, None, weights, 0.8, 0)[0]
    found = weights_of(patched)
    assert len(changes) > 2
    assert_same(found, {name: expected[name] for name in found})
    plain = weights_of(narrow)
    assert {name for name in plain if not torch.equal(plain[name], found[name])} == set(changes)


def test_a_spelled_lora_is_bypassed_too(narrow):
    weights = spelled_loras()["OneTrainer's original"]
    loaded = comfy.sd.load_lora_for_models(narrow, None, weights, 0.8, 0)[0]
    bypassed = comfy.sd.load_bypass_lora_for_models(narrow, None, weights, 0.8, 0)[0]
    expected = sample_narrow(loaded)
    assert difference(expected, sample_narrow(narrow)) > 1e-3
    assert difference(sample_narrow(bypassed), expected) < 1e-4
    weights = spelled_loras()["LyCORIS"]
    loaded = comfy.sd.load_lora_for_models(narrow, None, weights, 0.8, 0)[0]
    bypassed = comfy.sd.load_bypass_lora_for_models(narrow, None, weights, 0.8, 0)[0]
    assert difference(sample_narrow(bypassed), sample_narrow(loaded)) < 1e-4


def joined_loras(width, name="diffusion_model.blocks.0.attn.qkv"):
    """By its kind: a LoRA of q, k and v as one matrix; the last two need all rows."""
    low_rank = lora({name: (3 * width, width)})
    return {
        "DoRA by rows": low_rank | {f"{name}.dora_scale": 30 + normal(3 * width, 1, seed=3)},
        "OFT within q, k and v": {f"{name}.oft_blocks": normal(3 * width // 24, 24, 24, seed=4) / 30},
        "DoRA by columns": low_rank | {f"{name}.dora_scale": 50 + normal(1, width, seed=3)},
        "OFT": {f"{name}.oft_blocks": normal(width // 9, 27, 27, seed=4) / 30},
    }


def test_what_changes_q_k_and_v_as_one_matrix_is_what_it_is_on_the_hosts_own(ours, native):
    for name, weights in joined_loras(WIDTH).items():
        theirs, result = (
            comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0)[0] for model in (native, ours)
        )
        made, plain = (patched_weight(model, "blocks.0.attn.qkv.weight") for model in (theirs, native))
        assert difference(made, plain) > 1e-3, name
        assert difference(patched_weight(result, "blocks.0.attn.qkv.weight"), made) < 1e-5, name


def test_each_part_of_a_joined_matrix_sees_what_the_patches_before_made_of_the_others(narrow):
    """However many weights are on the device, and again after all were taken off it."""
    before = weights_of(narrow)
    named = [f"transformer_blocks.0.attn1.to_{part}.weight" for part in "qkv"]
    first = lora({"transformer_blocks.0.attn1.to_k": (NARROW, NARROW)})
    columns = joined_loras(NARROW)["DoRA by columns"]
    patched = narrow
    for weights in (first, columns, columns):
        patched = comfy.sd.load_lora_for_models(patched, None, weights, 0.8, 0)[0]
    parts = {name: before[name].clone() for name in named}
    parts[named[1]] += 0.8 * first[f"{named[1][:-7]}.lora_B.weight"] @ first[f"{named[1][:-7]}.lora_A.weight"]
    whole = torch.cat(list(parts.values()))
    for _ in range(2):
        key = "diffusion_model.blocks.0.attn.qkv"
        changed = whole + columns[f"{key}.lora_B.weight"] @ columns[f"{key}.lora_A.weight"]
        changed = columns[f"{key}.dora_scale"] * changed / changed.norm(dim=0)
        whole = whole + 0.8 * (changed - whole)
    expected = before | dict(zip(named, whole.chunk(3), strict=True))
    assert_same(weights_of(patched), expected)
    patched.detach()
    assert_same(weights_of(narrow), before)
    inputs = normal(1, 4, 16, 12, seed=6), torch.tensor([500.0]), conditioning(7, 64, seed=1)[0][0]
    network = narrow.model.diffusion_model
    network.load_state_dict(expected)
    made = network(*inputs)
    network.load_state_dict(before)
    patched.load(torch.device("cpu"), lowvram_model_memory=patched.model_size() // 4)
    assert patched.lowvram_patch_counter() > 1
    assert difference(network(*inputs), made) < 1e-4
    patched.detach()
    assert_same(weights_of(narrow), before)


def test_what_sees_all_rows_is_refused_where_it_can_not(narrow):
    targets = comfy.lora.model_lora_keys_unet(narrow.model, {})
    for name in ("DoRA by columns", "OFT"):
        weights = joined_loras(NARROW)[name]
        with pytest.raises(SigmaError, match="a hook changes them one by one"):
            patches = comfy.lora.load_lora(weights, targets)
            narrow.clone().add_hook_patches(comfy.hooks.WeightHook(), patches)
        with pytest.raises(SigmaError, match="bypass loaders can not do"):
            sample_narrow(comfy.sd.load_bypass_lora_for_models(narrow, None, weights, 0.8, 0)[0])


def write(folder, weights, config=None, metadata=None):
    """An adapter's folder, or its file by itself."""
    folder.mkdir(exist_ok=True)
    file = folder / ("adapter_model.safetensors" if config else "lora.safetensors")
    save_file(weights, file, metadata)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder
    return file


def test_load_sigma_lora_is_what_peft_merges(narrow, tmp_path):
    """With what lies beside the tensors, of which the host's own loader knows nothing."""
    peft = pytest.importorskip("peft", reason="no PEFT: pip install peft")
    said = {"r": 4, "lora_alpha": 3, "use_rslora": True, "use_dora": True, "alpha_pattern": {"to_q": 9}}
    chosen = peft.LoraConfig(target_modules=["to_q", "to_k", "proj", "linear"], **said)
    with torch.inference_mode(False):
        model = peft.get_peft_model(transformer(2, 1, 64), chosen)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.data += 0.1 * normal(*parameter.shape, seed=index)
        model.save_pretrained(tmp_path / "peft")
        expected = model.merge_and_unload().state_dict()
    patched, adapter = patch_model(narrow, tmp_path / "peft", 1.0)
    found = weights_of(patched)
    assert adapter.notices == ()
    assert_same(found, {name: expected[name] for name in found})
    hosts = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    theirs = weights_of(comfy.sd.load_lora_for_models(narrow, None, hosts, 1.0, 0)[0])
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert difference(theirs[name], expected[name]) > 0.05


def test_load_sigma_lora_does_the_same_to_the_hosts_own(ours, native, tmp_path):
    qkv = "diffusion_model.blocks.0.attn.qkv"
    weights = joined_loras(WIDTH)["DoRA by columns"] | lora(blocks(WIDTH))
    weights[f"{qkv}.diff_b"] = normal(3 * WIDTH, seed=5)
    weights["transformer_blocks.0.scale_shift_table.diff"] = normal(6, WIDTH, seed=7)
    file = write(tmp_path, weights)
    mine, theirs = (patch_model(model, file, 0.7)[0] for model in (ours, native))
    changed = 0
    for name in native.model_state_dict():
        if name in theirs.patches:
            made = patched_weight(mine, name.removeprefix(PREFIX))
            assert difference(patched_weight(theirs, name.removeprefix(PREFIX)), made) < 1e-5, name
            assert difference(patched_weight(native, name.removeprefix(PREFIX)), made) > 1e-4, name
            changed += 1
    assert changed == 9


def test_load_sigma_lora_composes(narrow, tmp_path):
    """With the host's Load LoRA before and after it, a hook's LoRA, strength 0; and nothing of it stays."""
    plain = weights_of(narrow)
    fused_dora = write(tmp_path, joined_loras(NARROW)["DoRA by columns"])
    rows = lora({"transformer.transformer_blocks.0.attn1.to_q": (NARROW, NARROW)})
    config = narrow.model.diffusion_model.sigma_config
    patched = comfy.sd.load_lora_for_models(narrow, None, rows, 0.5, 0)[0]
    patched, _ = patch_model(patched, fused_dora, 0.8)
    patched = comfy.sd.load_lora_for_models(patched, None, rows, 0.5, 0)[0]
    rows_file = write(tmp_path / "rows", rows)
    steps = [(rows_file, 0.5), (fused_dora, 0.8), (rows_file, 0.5)]
    adapters = [(read_adapter(path, config), strength) for path, strength in steps]
    expected = plain | {
        name: change(plain[name]) for name, change in adapter_changes(adapters, plain.__getitem__).items()
    }
    assert_same(weights_of(patched), expected)
    assert_same(weights_of(patch_model(narrow, fused_dora, 0.0)[0]), plain)
    hook = comfy.hooks.create_hook_lora(rows, 0.5, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(conditioning(7, 64, seed=1), hook)
    dora, _ = patch_model(narrow, fused_dora, 0.8)
    made = ksampler(dora, hooked, conditioning(7, 64, seed=2), (16, 12), **QUICK)
    both = comfy.sd.load_lora_for_models(dora, None, rows, 0.5, 0)[0]
    assert difference(made, sample_narrow(both)) < 1e-4
    assert difference(made, sample_narrow(dora)) > 1e-4


def test_load_sigma_lora_is_for_pixart_sigma_alone(tmp_path):
    file = write(tmp_path, lora({"transformer.transformer_blocks.0.attn1.to_q": (NARROW, NARROW)}))
    sizes = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1]}
    sizes |= {
        "channel_mult": [1],
        "transformer_depth": [0],
        "transformer_depth_output": [0, 0],
        "num_heads": 1,
    }
    sizes |= {
        "image_size": 32,
        "context_dim": 32,
        "transformer_depth_middle": -1,
        "use_spatial_transformer": True,
    }
    device = torch.device("cpu")
    model = comfy.model_base.BaseModel(comfy.supported_models.SD15(sizes))
    with pytest.raises(SigmaError, match="This MODEL is a BaseModel, and Load Σ LoRA is for PixArt-Sigma"):
        patch_model(comfy.model_patcher.ModelPatcher(model, device, device), file, 1.0)
    alpha = transformer(16, 1, 4096, use_additional_conditions=True)
    save_file(alpha.state_dict(), tmp_path / "alpha.safetensors")
    with pytest.raises(SigmaError, match="This MODEL is PixArt-alpha"):
        patch_model(comfy.sd.load_diffusion_model(str(tmp_path / "alpha.safetensors")), file, 1.0)


def test_load_lora_says_which_alpha_it_does_not_read(narrow, caplog):
    layer = "transformer_blocks.0.attn1.to_q"
    plain = lora({f"transformer.{layer}": (NARROW, NARROW)})
    for weights, metadata, words in (
        (lora({f"base_model.model.{layer}": (NARROW, NARROW)}), None, "is PEFT's, whose alpha stands in"),
        (plain, '{"transformer.r": 4, "transformer.lora_alpha": 8}', r"say its alpha (8, rank 4)"),
        (plain, '{"transformer.r": 4, "transformer.lora_alpha": 4}', ""),
        (plain, "no table", ""),
        (plain | {f"transformer.{layer}.alpha": torch.tensor(2.0)}, None, ""),
    ):
        caplog.clear()
        said = {"lora_adapter_metadata": metadata} if metadata else None
        patched = comfy.sd.load_lora_for_models(narrow, None, weights, 1.0, 0, said)[0]
        assert len(patched.patches) == 1
        assert words in caplog.text and ("Load Σ LoRA" in caplog.text) == bool(words)


def test_the_host_finds_and_moves_what_a_patch_holds(narrow, tmp_path):
    """As it does ahead of time for weights that come to the device when they are used."""
    weights = joined_loras(NARROW)["DoRA by columns"]
    patched, _ = patch_model(narrow, write(tmp_path, weights), 0.8)
    name = "diffusion_model.transformer_blocks.0.attn1.to_k.weight"
    ahead = comfy.model_patcher.LowVramPatch(name, patched.patches)
    size = ahead.memory_required()
    assert size >= sum(tensor.nbytes for tensor in weights.values())
    weight = narrow.model_state_dict()[name]
    expected = ahead(weight.clone())
    ahead.prepare(torch.zeros(size, dtype=torch.uint8), None)
    assert torch.equal(ahead(weight.clone()), expected)
    assert difference(expected, weight) > 1e-3


def test_load_sigma_lora_refuses_what_does_not_fit_as_a_whole(narrow, ours, tmp_path):
    good = lora({"transformer.transformer_blocks.0.attn1.to_q": (NARROW, NARROW)})
    elsewhere = lora({"transformer.transformer_blocks.9.attn1.to_q": (NARROW, NARROW)})
    for model, weights, message in (
        (narrow, good | elsewhere, "changes what this transformer does not have"),
        (ours, good, "for one of another width"),
        (
            narrow,
            lora({"lora_unet_down_blocks_0_attentions_0": (NARROW, NARROW)}),
            "of Stable Diffusion or SDXL",
        ),
        (narrow, {name: tensor * torch.nan for name, tensor in good.items()}, "not finite"),
    ):
        with pytest.raises(SigmaError, match=message):
            patch_model(model, write(tmp_path, weights), 1.0)
        assert not model.patches
    file = write(tmp_path, good, metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": "much"}'})
    with pytest.raises(SigmaError, match="lora_alpha 'much'; a number above 0"):
        patch_model(narrow, file, 1.0)
    file = write(tmp_path, good, metadata={"ss_network_alpha": "1", "format": "pt", "made up": "?"})
    name = "transformer_blocks.0.attn1.to_q.weight"
    up, down = (good[f"transformer.{name[:-7]}.lora_{part}.weight"] for part in "BA")
    found = weights_of(patch_model(narrow, file, 1.0)[0])[name]
    assert difference(found, weights_of(narrow)[name] + up @ down) < 1e-5


def test_what_is_not_a_loras_target_is_named_once(ours):
    """Nodes that save or compare a MODEL's weights see each of them, and nothing else."""
    weights = ours.model.state_dict()
    assert {name for name in dict(weights)} == set(ours.model_state_dict()) == {name for name in weights}
    assert all(tensor.numel() for tensor in weights.values())
    fused = "diffusion_model.blocks.0.attn.qkv.weight"
    assert fused in weights.keys() and fused not in weights  # noqa: SIM118
    assert torch.equal(
        weights[fused].chunk(3)[1], weights["diffusion_model.transformer_blocks.0.attn1.to_k.weight"]
    )


def weights_of(model):
    load_models_gpu([model])
    return {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(result[name], expected[name], atol=1e-5), name


def patched_weights(model):
    """What `weights_of` gives, without the loading."""
    names = model.model.diffusion_model.state_dict()
    return {name: model.patch_weight_to_device(PREFIX + name, return_weight=True) for name in names}


def test_merges_are_those_by_hand_whatever_loader_the_other_model_is_from(
    file, other, ours, narrow_file, narrow, tmp_path
):
    turned = tmp_path / "turned" / "model_1024.safetensors"
    shutil.copytree(narrow_file.parent, turned.parent)
    save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(narrow_file).items()}, turned)
    for mine, first, second, load in (
        (narrow, narrow_file, turned, load_model),
        (ours, file, other, lambda path: comfy.sd.load_diffusion_model(str(path))),
    ):
        theirs, first, second = load(second), load_file(first), load_file(second)
        mixed = {name: 0.3 * first[name] + 0.7 * second[name] for name in first}
        assert_same(patched_weights(ModelMergeSimple().merge(mine, theirs, 0.3)[0]), mixed)
        halves = {"blocks.": 0.3, "other": 1.0}
        merged = patched_weights(ModelMergeBlocks().merge(mine, theirs, **halves)[0])
        assert_same(merged, mixed)
        (change,) = ModelSubtract().merge(theirs, mine, 0.5)
        stronger = {name: first[name] + 0.5 * (second[name] - first[name]) for name in first}
        assert_same(patched_weights(ModelAdd().merge(mine, change)[0]), stronger)
        assert_same(patched_weights(mine), first)


def test_what_the_terminal_merged_loads_in_both(file, native, tmp_path):
    """In the authors' names, as the host's own loader needs them."""
    adapter = write(tmp_path, joined_loras(WIDTH)["DoRA by columns"])
    checkpoint = inspect(file)
    merge = Merge(checkpoint, ((read_adapter(adapter, checkpoint.config), 0.8),))
    write_merged(tmp_path / "merged_1024.safetensors", merge, "original")
    name = "blocks.0.attn.qkv.weight"
    expected = patched_weight(patch_model(native, adapter, 0.8)[0], name)
    for load in (load_model, comfy.sd.load_diffusion_model):
        merged = load(str(tmp_path / "merged_1024.safetensors"))
        assert difference(patched_weight(merged, name), expected) < 1e-5
        assert not set(merged.model_state_dict()) - set(load(str(file)).model_state_dict())


def test_a_merge_with_another_kind_of_model_is_refused(ours, tmp_path):
    smaller = tmp_path / "smaller_1024.safetensors"
    save_file(transformer(2, 1, 4096).state_dict(), smaller)
    with pytest.raises(SigmaError, match="differ in size"):
        ModelMergeSimple().merge(ours, load_model(smaller), 0.5)
    deeper = tmp_path / "deeper_1024.safetensors"
    save_file(transformer(16, 2, 4096).state_dict(), deeper)
    with pytest.raises(SigmaError, match="no place for"):
        ModelMergeSimple().merge(ours, comfy.sd.load_diffusion_model(str(deeper)), 0.5)


def test_another_models_weights_act_as_a_hook(ours, native, other):
    """Its names are the authors', and q, k and v one tensor."""
    weights = comfy.hooks.get_patch_weights_from_model(comfy.sd.load_diffusion_model(str(other)))
    made = []
    for model in (native, ours):
        hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 0.5, 0.0)
        hooked = comfy.hooks.set_hooks_for_conditioning(CONDITIONING[0], hooks)
        made.append(ksampler(model, hooked, CONDITIONING[1], SIZE, **QUICK))
    assert difference(made[0], sample(native, **QUICK)) > 1e-3
    assert difference(made[1], made[0]) < 1e-4
