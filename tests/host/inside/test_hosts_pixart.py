"""Our MODEL equals the host's own PixArt, also with LoRAs of every kind, and partially loaded. On the CPU."""

import re
from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.sd
import pytest
import torch
from pack.nodes.host.transformer import load_model
from random_models import conditioning, difference, ksampler, normal, transformer
from safetensors.torch import save_file

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
