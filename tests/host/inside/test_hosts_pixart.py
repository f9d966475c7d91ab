"""Our MODEL equals the host's own PixArt, also with LoRAs of every kind, merged, and partially loaded. On the
CPU."""

import re
from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.sd
import pytest
import torch
from comfy.model_management import load_models_gpu
from comfy_extras.nodes_custom_sampler import SamplerCustom
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract
from pack.nodes.few_step import FewStepRecipe
from pack.nodes.host.transformer import load_model
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.transformer.lora import adapter_changes, read_adapter
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


BLOCKS = {
    "transformer_blocks.0.attn1.to_q": (WIDTH, WIDTH),
    "transformer_blocks.0.attn1.to_v": (WIDTH, WIDTH),
    "transformer_blocks.0.attn1.to_out.0": (WIDTH, WIDTH),
    "transformer_blocks.0.attn2.to_k": (WIDTH, WIDTH),
    "transformer_blocks.0.attn2.to_q": (WIDTH, WIDTH),
    "transformer_blocks.0.ff.net.0.proj": (4 * WIDTH, WIDTH),
    "adaln_single.linear": (6 * WIDTH, WIDTH),
    "proj_out": (32, WIDTH),
}
FUSED = {
    "blocks.0.attn.qkv": (3 * WIDTH, WIDTH),
    "blocks.0.cross_attn.kv_linear": (2 * WIDTH, WIDTH),
    "blocks.0.cross_attn.proj": (WIDTH, WIDTH),
    "blocks.0.mlp.fc2": (WIDTH, 4 * WIDTH),
    "t_block.1": (6 * WIDTH, WIDTH),
}
KOHYA = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in FUSED.items()}
LORAS = {
    "base_model.model.": lora({f"base_model.model.{name}": shape for name, shape in BLOCKS.items()}),
    "transformer.": lora({f"transformer.{name}": shape for name, shape in BLOCKS.items()}),
    "diffusion_model.": lora({f"diffusion_model.{name}": shape for name, shape in FUSED.items()}),
    "lora_unet_": lora(KOHYA, "lora_down lora_up") | {"lora_unet_blocks_0_attn_qkv.alpha": torch.tensor(2.0)},
    "lora_unet_ with lokr and bias": {
        "lora_unet_blocks_0_attn_qkv.lokr_w1": normal(3, 2, seed=3) / 10,
        "lora_unet_blocks_0_attn_qkv.lokr_w2": normal(WIDTH, WIDTH // 2, seed=4) / 10,
        "lora_unet_blocks_0_attn_qkv.diff_b": normal(3 * WIDTH, seed=5),
    },
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide_1024.safetensors"
    save_file(transformer(16, 1, 4096).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    return load_model(file)


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


def test_loras_do_what_they_do_to_the_hosts_own(ours, native):
    expected = sample(native, **QUICK)
    for name, weights in LORAS.items():
        patched = [comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0)[0] for model in (native, ours)]
        theirs, result = (sample(model, **QUICK) for model in patched)
        assert difference(theirs, expected) > 1e-3, name
        assert difference(result, theirs) < 1e-4, name
    assert difference(sample(ours, **QUICK), expected) < 1e-4


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


def test_a_bypassed_lora_does_what_a_loaded_one_does(ours):
    """Also after another one."""
    plain = sample(ours, **QUICK)
    loaded = bypassed = ours
    for name in ("diffusion_model.", "lora_unet_ with lokr and bias"):
        loaded = comfy.sd.load_lora_for_models(loaded, None, LORAS[name], 0.8, 0)[0]
        bypassed = comfy.sd.load_bypass_lora_for_models(bypassed, None, LORAS[name], 0.8, 0)[0]
        expected = sample(loaded, **QUICK)
        assert difference(expected, plain) > 1e-3, name
        assert difference(sample(bypassed, **QUICK), expected) < 1e-4, name
    assert difference(sample(ours, **QUICK), plain) == 0
    for name in ("transformer.", "base_model.model."):
        with pytest.raises(SigmaError, match="Load it with Load LoRA"):
            comfy.sd.load_bypass_lora_for_models(ours, None, LORAS[name], 0.8, 0)


def spelled_loras():
    """By the writer: the weights of a file in its spelling, which the host by itself does not find."""
    plain = {name: shape for name, shape in BLOCKS.items() if name != "proj_out"}
    flat = {name.replace(".", "_"): shape for name, shape in plain.items()}
    kohya = "lora_down lora_up"
    made = {
        "OneTrainer": lora({f"lora_transformer_{name}": shape for name, shape in flat.items()}, kohya),
        "ai-toolkit": lora({f"lora_transformer__{name}": shape for name, shape in flat.items()}, kohya),
        "LyCORIS": lora({f"lycoris_{name}": shape for name, shape in flat.items()}, kohya),
        "no prefix": lora(plain),
        "OneTrainer's original": lora(FUSED),
        "a table and biases": {
            "transformer_blocks.0.scale_shift_table.diff": normal(6, WIDTH, seed=7),
            "lora_transformer_transformer_blocks_0_attn1_to_k.diff_b": normal(WIDTH, seed=8),
            "lycoris_blocks_0_attn_qkv.diff_b": normal(3 * WIDTH, seed=9),
        },
    }
    made["OneTrainer"]["lora_transformer_transformer_blocks_0_attn1_to_q.alpha"] = torch.tensor(2.0)
    return made


@pytest.mark.parametrize("writer", spelled_loras())
def test_every_spelling_is_what_the_engine_makes_of_it(ours, file, tmp_path, writer):
    weights = spelled_loras()[writer]
    save_file(weights, tmp_path / "adapter.safetensors")
    adapter = read_adapter(tmp_path / "adapter.safetensors", ours.model.diffusion_model.sigma_config)
    expected = load_file(file)
    changes = adapter_changes([(adapter, 0.8)], expected.__getitem__)
    expected |= {name: change(expected[name]) for name, change in changes.items()}
    patched = comfy.sd.load_lora_for_models(ours, None, weights, 0.8, 0)[0]
    found = weights_of(patched)
    assert len(changes) > 2
    assert_same(found, {name: expected[name] for name in found})
    plain = weights_of(ours)
    assert {name for name in plain if not torch.equal(plain[name], found[name])} == set(changes)


def test_a_spelled_lora_is_bypassed_too(ours):
    weights = spelled_loras()["OneTrainer's original"]
    loaded = comfy.sd.load_lora_for_models(ours, None, weights, 0.8, 0)[0]
    bypassed = comfy.sd.load_bypass_lora_for_models(ours, None, weights, 0.8, 0)[0]
    expected = sample(loaded, **QUICK)
    assert difference(expected, sample(ours, **QUICK)) > 1e-3
    assert difference(sample(bypassed, **QUICK), expected) < 1e-4
    weights = spelled_loras()["LyCORIS"]
    loaded = comfy.sd.load_lora_for_models(ours, None, weights, 0.8, 0)[0]
    bypassed = comfy.sd.load_bypass_lora_for_models(ours, None, weights, 0.8, 0)[0]
    assert difference(sample(bypassed, **QUICK), sample(loaded, **QUICK)) < 1e-4


def test_rows_of_a_fused_weight_that_depend_on_each_other_are_refused(ours, native):
    """ComfyUI's own PixArt has them as one. Magnitudes of rows and blocks within q, k and v are no matter."""
    name = "diffusion_model.blocks.0.attn.qkv"
    low_rank = lora({name: FUSED["blocks.0.attn.qkv"]})
    by_rows = low_rank | {f"{name}.dora_scale": 30 + normal(3 * WIDTH, 1, seed=3)}
    by_columns = low_rank | {f"{name}.dora_scale": 50 + normal(1, WIDTH, seed=3)}
    within = {f"{name}.oft_blocks": normal(36, 96, 96, seed=4) / 30}
    across = {f"{name}.oft_blocks": normal(2, 1728, 1728, seed=4) / 30}
    for weights in (by_rows, within):
        results = [
            sample(comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0)[0], **QUICK)
            for model in (ours, native)
        ]
        assert difference(*results) < 1e-4
        assert difference(results[0], sample(ours, **QUICK)) > 1e-4
    for weights in (by_columns, across):
        with pytest.raises(SigmaError, match="as one matrix, whose rows depend on each other"):
            comfy.sd.load_lora_for_models(ours, None, weights, 0.8, 0)


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


def test_merges_are_those_by_hand_whatever_loader_the_other_model_is_from(file, other, ours):
    first, second = load_file(file), load_file(other)
    mixed = {name: 0.3 * first[name] + 0.7 * second[name] for name in first}
    stronger = {name: first[name] + 0.5 * (second[name] - first[name]) for name in first}
    for theirs in (load_model(other), comfy.sd.load_diffusion_model(str(other))):
        assert_same(weights_of(ModelMergeSimple().merge(ours, theirs, 0.3)[0]), mixed)
        halves = {"blocks.": 0.3, "other": 1.0}
        blocks = weights_of(ModelMergeBlocks().merge(ours, theirs, **halves)[0])
        assert_same(blocks, mixed)
        (change,) = ModelSubtract().merge(theirs, ours, 0.5)
        assert_same(weights_of(ModelAdd().merge(ours, change)[0]), stronger)
        assert_same(weights_of(ours), first)


def test_the_hosts_own_model_merges_ours_as_its_own(native, other):
    fused, merged = "blocks.0.attn.qkv.weight", []
    unmerged = weights_of(native)[fused]
    for theirs in (load_model(other), comfy.sd.load_diffusion_model(str(other))):
        patched = comfy.sd.load_lora_for_models(theirs, None, LORAS["lora_unet_"], 0.8, 0)[0]
        merged.append(weights_of(ModelMergeSimple().merge(native, patched, 0.3)[0]))
    assert_same(*merged)
    assert difference(merged[0][fused], unmerged) > 0.1


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
