"""Each model is released alone and truthfully, and T5's patcher has what the host asks of it. On the CPU."""

import gc
import inspect
import re
import weakref

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from pack.nodes.host.kv_compression import set_kv_compression
from pack.nodes.host.release import release
from pack.nodes.host.sampling import SamplerSettings, sample
from pack.nodes.host.speed import set_speed
from pack.nodes.host.text_encoder import TextEncoderPatcher, load_clip
from pack.nodes.host.transformer import PaddedCond, load_model
from pack.nodes.host.vae import load_vae
from pack.nodes.memory import ReleaseModel
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import CheckpointError, SigmaError
from random_models import conditioning, ksampler, normal, split, transformer
from safetensors.torch import save_file

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")  # a place that stands for RAM
LATENTS = torch.zeros(1, 4, 8, 8)


def make_patcher() -> ModelPatcher:
    return ModelPatcher(torch.nn.Linear(4, 4), CPU, CPU)


def held(patcher) -> list:
    return [entry for entry in management.current_loaded_models if entry.model is patcher]


def encode(clip):
    return clip.encode_from_tokens(clip.tokenize("a red circle"))


@pytest.fixture(autouse=True)
def the_hosts_list():
    """It stays the object that others may hold."""
    before = management.current_loaded_models
    yield
    assert management.current_loaded_models is before


@pytest.fixture
def vae():
    vae = load_vae(DEMO)
    vae.decode(LATENTS)
    return vae


@pytest.fixture
def clip():
    clip = load_clip(DEMO, "fp32", "cpu")
    encode(clip)
    return clip


@pytest.fixture
def other():
    """The host holds this one too, and may not lose it."""
    patcher = make_patcher()
    management.load_models_gpu([patcher])
    return patcher


def test_a_model_is_released_through_a_clone_of_the_loaded_one(other, clip, vae):
    model = make_patcher()
    twin = model.clone()
    management.load_models_gpu([other, twin])
    release(model, "keep")
    assert held(twin)
    assert ReleaseModel.execute("latents", model, "offload").result == ("latents",)
    assert not held(twin) and held(other) and held(clip.patcher) and held(vae.patcher)
    management.load_models_gpu([model])
    release(twin.clone(), "free")
    assert not held(model) and held(other) and model.model.weight.device == CPU


def test_a_loaded_clone_that_nobody_holds_is_released():
    """And whose origin is gone too."""
    lost = make_patcher()
    copy = lost.clone()
    management.load_models_gpu([lost])
    del lost
    release(copy, "offload")
    assert not [entry for entry in management.current_loaded_models if entry.model is None]


def test_a_vae_is_released_and_loads_again(other, clip, vae):
    release(vae, "free")
    assert not held(vae.patcher) and held(other) and held(clip.patcher)
    vae.decode(LATENTS)
    assert held(vae.patcher)


def test_offload_moves_the_encoder_and_free_drops_it(other, clip, vae):
    expected = encode(clip)
    patcher = clip.patcher
    patcher.offload_device = ELSEWHERE
    size = patcher.model_size()
    assert patcher.loaded_size() == size > 0 and patcher.current_loaded_device() == CPU
    patcher.detach(unpatch_all=False)
    assert patcher.loaded_size() == size
    release(clip.clone(), "offload")
    assert not held(patcher) and held(other) and held(vae.patcher)
    assert patcher.loaded_size() == 0 and patcher.current_loaded_device() == ELSEWHERE
    assert clip.cond_stage_model.encoder.device == ELSEWHERE
    assert torch.equal(encode(clip), expected)
    assert patcher.loaded_size() == patcher.model_size() == size
    release(clip, "free")
    assert clip.cond_stage_model.encoder is None and patcher.loaded_size() == 0
    assert torch.equal(encode(clip), expected)


def quantized_tensors() -> int:
    gc.collect()
    return sum(type(thing).__name__ in ("Int8Params", "Params4bit") for thing in gc.get_objects())


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_offload_drops_what_can_not_be_moved(precision):
    """No tensor of it is left."""
    small = load_clip(DEMO, precision, "cpu")
    small.patcher.offload_device = ELSEWHERE
    first = encode(small)
    assert quantized_tensors() > 0
    release(small, "offload")
    assert small.cond_stage_model.encoder is None
    assert quantized_tensors() == 0
    assert torch.equal(encode(small), first)
    release(small, "free")


def test_the_host_evicts_the_encoder_outside_of_a_run_too(other):
    """Where inference tensors could not be moved."""
    small = load_clip(DEMO, "bf16", "cpu")
    small.load_model()
    small.patcher.offload_device = ELSEWHERE
    others = [entry for entry in management.current_loaded_models if entry.model is not small.patcher]
    with torch.inference_mode(False):
        management.free_memory(1e30, CPU, others)
    assert not held(small.patcher) and small.patcher.loaded_size() == 0 and held(other)


def test_a_clip_that_nobody_holds_leaves_the_hosts_list(other, clip, vae):
    small = load_clip(DEMO, "bf16", "cpu")
    small.load_model()
    del small
    gc.collect()
    assert len(management.current_loaded_models) == len(held(other) + held(vae.patcher) + held(clip.patcher))


def test_only_models_are_released_and_in_known_ways(clip):
    with pytest.raises(ValueError, match="gone"):
        release(clip, "gone")
    with pytest.raises(ValueError, match="not str"):
        release("clip", "free")


KNOWN = {
    "load_device",
    "offload_device",
    "parent",
    "model",
    "is_dynamic",
    "model_size",
    "loaded_size",
    "current_loaded_device",
    "model_dtype",
    "model_patches_to",
    "model_patches_models",
    "partially_load",
    "partially_unload",
    "detach",
    "is_clone",
    "lowvram_patch_counter",
    "clone_base_uuid",
    "get_nested_additional_models",
    "__class__",
}
ASKED_OF_DYNAMIC_PATCHERS_ONLY = {
    "loaded_ram_size",
    "pinned_memory_size",
    "partially_unload_ram",
    "unregister_inactive_pins",
    "set_in_use_by_current_prompt",
}


def test_the_patcher_has_what_the_installed_host_asks_for():
    functions = (
        "LoadedModel",
        "free_memory",
        "load_models_gpu",
        "unload_model_and_clones",
        "use_more_memory",
        "offloaded_memory",
        "cleanup_models_gc",
        "loaded_models",
    )
    source = "".join(inspect.getsource(getattr(management, name)) for name in functions)
    touched = set(re.findall(r"(?:\.model|\bmodel|\bx|add_model)\.([a-z_]\w*)", source))
    assert {"detach", "partially_load", "is_clone"} <= touched
    assert touched <= KNOWN | ASKED_OF_DYNAMIC_PATCHERS_ONLY, "the host asks more of a patcher"
    clip = load_clip(DEMO, "int8", "cpu")
    patcher = clip.patcher
    if hasattr(
        comfy.model_patcher, "is_model_patcher_output"
    ):  # how eviction under RAM pressure finds models
        assert comfy.model_patcher.is_model_patcher_output(clip)
    absent = {name for name in touched if not hasattr(patcher, name)}
    assert absent <= {"unregister_inactive_pins", "set_in_use_by_current_prompt"}
    assert patcher.is_dynamic() is False and patcher.lowvram_patch_counter() == 0
    assert patcher.model_patches_models() == [] and patcher.get_nested_additional_models() == []
    assert patcher.clone().is_clone(patcher) and patcher.clone().parent is patcher


def test_the_patchers_methods_take_what_the_hosts_take():
    for name in (
        "load",
        "partially_load",
        "partially_unload",
        "patch_model",
        "unpatch_model",
        "detach",
        "add_patches",
    ):
        theirs = inspect.signature(getattr(ModelPatcher, name)).parameters
        assert set(theirs) <= set(inspect.signature(getattr(TextEncoderPatcher, name)).parameters), name


def test_a_clone_of_the_clip_has_what_the_hosts_has():
    ours = {
        "patcher",
        "cond_stage_model",
        "tokenizer",
        "tokenizer_options",
        "layer_idx",
        "use_clip_schedule",
        "apply_hooks_to_conds",
    }
    clone = inspect.getsource(comfy.sd.CLIP.clone)
    assert set(re.findall(r"n\.(\w+) =", clone)) <= ours, "the host's CLIP has a new attribute"


# ---- a MODEL that the host's MultiGPU CFG Split has copied to a second device

PROMPT, NEGATIVE, SIZE = conditioning(5, 64, seed=1), conditioning(5, 64, seed=2), (16, 8)
QKV = "lora_unet_blocks_0_attn_qkv"
LORA = {
    f"{QKV}.lora_down.weight": normal(4, 144, seed=3) / 10,
    f"{QKV}.lora_up.weight": normal(432, 4, seed=4) / 10,
}
BY_COLUMNS = {f"{QKV}.dora_scale": 1 + normal(1, 144, seed=5).abs()}  # q, k and v as one matrix


@pytest.fixture
def file(tmp_path):
    save_file(transformer(2, 2, 64).state_dict(), tmp_path / "tiny_1024.safetensors")
    return tmp_path / "tiny_1024.safetensors"


def with_lora(model, lora, load=comfy.sd.load_lora_for_models):
    return load(model, None, lora, 1.0, 0)[0]


def test_two_devices_draw_what_one_draws(file, monkeypatch):
    """Bit for bit, where the one is given the prompt and the negative prompt in turn too, with all that a
    MODEL carries, put on it before it is copied or after."""
    monkeypatch.setattr(PaddedCond, "can_concat", lambda self, other: False)
    model, used = load_model(file), []
    for parameter in model.model.parameters():  # as the copy's are: where a file's lie, CPUs round otherwise
        parameter.data = parameter.data.clone()
    apply_model = type(model.model).apply_model
    monkeypatch.setattr(
        type(model.model),
        "apply_model",
        lambda self, *given, **named: used.append(self) or apply_model(self, *given, **named),
    )

    def changed(model):
        compressed = set_kv_compression(with_lora(model, LORA | BY_COLUMNS), "mean:2:all")
        return set_speed(compressed, "forecast:1:1:30-90%")

    expected = ksampler(changed(model), PROMPT, NEGATIVE, SIZE, steps=6)
    for divided in (split(changed(model), monkeypatch)[0], changed(split(model, monkeypatch)[0])):
        used.clear()
        assert torch.equal(ksampler(divided, PROMPT, NEGATIVE, SIZE, steps=6), expected)
        assert len(set(used)) == 2 and used.count(model.model) == len(used) / 2


def test_a_copy_is_released_with_its_model(file, monkeypatch):
    """Also after a node that runs a clone of the MODEL, which it drops."""
    model = load_model(file)
    divided, copy = split(model, monkeypatch)
    for run in range(2):
        sample(divided, PROMPT, NEGATIVE, {"samples": torch.zeros(1, 4, *SIZE)}, SamplerSettings(steps=1))
        gc.collect()
        assert model.loaded_size() == copy.loaded_size() > 0
        assert {entry.model.model for entry in management.current_loaded_models} == {model.model, copy.model}
        release(divided if run else model, "free")
        assert not management.current_loaded_models and model.loaded_size() == copy.loaded_size() == 0
    weights = weakref.ref(copy.model)
    del divided, copy
    assert weights() is None  # at once: nothing of it refers to itself


def test_a_file_that_was_changed_is_not_copied(file, monkeypatch):
    weights = transformer(2, 2, 64).state_dict()
    model = load_model(file)
    split(model, monkeypatch)
    for change in ({"proj_out.bias": weights["proj_out.bias"] + 1}, None):
        if change:
            save_file(weights | change, file)
        else:
            file.unlink()
        with pytest.raises(CheckpointError, match="was changed" if change else "tiny_1024"):
            split(model, monkeypatch)


def test_a_bypassed_lora_is_refused_on_two_devices(file, monkeypatch):
    """It would change the layers of the first alone."""
    model = load_model(file)
    bypassed = with_lora(model, LORA, comfy.sd.load_bypass_lora_for_models)
    with pytest.raises(SigmaError, match="from a bypass loader"):
        split(bypassed, monkeypatch)
    divided, _ = split(model, monkeypatch)
    late = with_lora(divided, LORA, comfy.sd.load_bypass_lora_for_models)
    with pytest.raises(SigmaError, match="from a bypass loader"):
        ksampler(late, PROMPT, NEGATIVE, SIZE)
