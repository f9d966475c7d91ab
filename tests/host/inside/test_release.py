"""Each model is released alone and truthfully, and T5's patcher has what the host asks of it. On the CPU."""

import gc
import inspect
import re

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from pack.nodes.host.release import release
from pack.nodes.host.text_encoder import TextEncoderPatcher, load_clip
from pack.nodes.host.vae import load_vae
from pack.nodes.memory import ReleaseModel
from pack.pixart_sigma import DEMO

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
