"""Each model is released alone and truthfully; what the stages cost is recorded. On the CPU."""

RELEASE = """
import gc
import torch
import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from pack.nodes.host.release import release
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.host.vae import load_vae
from pack.nodes.memory import ReleaseModel, MemoryReport
from pack.pixart_sigma import DEMO

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")

def held(patcher):
    return [entry for entry in management.current_loaded_models if entry.model is patcher]

def quantized_tensors():
    return sum(type(thing).__name__ in ("Int8Params", "Params4bit") for thing in gc.get_objects())

def raises(kind, message, act):
    try:
        act()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was raised instead of {message}")

with torch.inference_mode():
    def patcher():
        return ModelPatcher(torch.nn.Linear(4, 4), CPU, CPU)
    other, model = patcher(), patcher()
    vae, clip = load_vae(DEMO), load_clip(DEMO, "fp32", "cpu")
    vae.decode(torch.zeros(1, 4, 8, 8))
    expected = clip.encode_from_tokens(clip.tokenize("a red circle"))
    twin = model.clone()
    management.load_models_gpu([other, twin])

    # MODEL: through a clone of the one that is loaded; the others stay
    before = management.current_loaded_models
    release(model, "keep")
    assert held(twin)
    assert ReleaseModel.execute("latents", model, "offload").result == ("latents",)
    assert not held(twin) and held(other) and held(clip.patcher) and held(vae.patcher)
    management.load_models_gpu([model])
    release(twin.clone(), "free")
    assert not held(model) and held(other) and model.model.weight.device == CPU

    # a loaded clone that nobody holds any more, and whose origin is gone too
    lost = patcher()
    copy = lost.clone()
    management.load_models_gpu([lost])
    del lost
    release(copy, "offload")
    assert not [entry for entry in management.current_loaded_models if entry.model is None]

    # VAE
    release(vae, "free")
    assert not held(vae.patcher) and held(other) and held(clip.patcher)
    vae.decode(torch.zeros(1, 4, 8, 8))
    assert held(vae.patcher)

    # CLIP: offload moves what can be moved (to a place that stands for RAM), free drops it
    clip.patcher.offload_device = ELSEWHERE
    size = clip.patcher.model_size()
    assert clip.patcher.loaded_size() == size > 0 and clip.patcher.current_loaded_device() == CPU
    clip.patcher.detach(unpatch_all=False)
    assert clip.patcher.loaded_size() == size
    release(clip.clone(), "offload")
    assert not held(clip.patcher) and held(other) and held(vae.patcher)
    assert clip.patcher.loaded_size() == 0 and clip.patcher.current_loaded_device() == ELSEWHERE
    assert clip.cond_stage_model.encoder.device == ELSEWHERE
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a red circle")), expected)
    assert clip.patcher.loaded_size() == clip.patcher.model_size() == size
    release(clip, "free")
    assert clip.cond_stage_model.encoder is None and clip.patcher.loaded_size() == 0
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a red circle")), expected)

    # 8 and 4 bit can not be moved: offload drops them; no tensor of them is left
    for precision in ("int8", "nf4"):
        small = load_clip(DEMO, precision, "cpu")
        small.patcher.offload_device = ELSEWHERE
        first = small.encode_from_tokens(small.tokenize("a red circle"))
        gc.collect()
        assert quantized_tensors() > 0
        release(small, "offload")
        assert small.cond_stage_model.encoder is None
        assert quantized_tensors() == 0
        assert torch.equal(small.encode_from_tokens(small.tokenize("a red circle")), first)
        release(small, "free")

    # the host evicts it, also outside of a run, where inference tensors could not be moved
    small = load_clip(DEMO, "bf16", "cpu")
    small.load_model()
    small.patcher.offload_device = ELSEWHERE
    with torch.inference_mode(False):
        management.free_memory(1e30, CPU, [entry for entry in management.current_loaded_models
                                           if entry.model is not small.patcher])
    assert not held(small.patcher) and small.patcher.loaded_size() == 0 and held(other)

    # a CLIP that nobody holds leaves the list
    small.load_model()
    del small
    gc.collect()
    assert len(management.current_loaded_models) == len(held(other) + held(vae.patcher) + held(clip.patcher))

    raises(ValueError, "gone", lambda: release(clip, "gone"))
    raises(ValueError, "not str", lambda: release("clip", "free"))
    assert management.current_loaded_models is before
    print("done")
"""

CANARY = """
import inspect, re
import torch
import comfy.model_management as management
import comfy.model_patcher, comfy.sd
from pack.nodes.host.text_encoder import TextEncoderPatcher, load_clip
from pack.pixart_sigma import DEMO

KNOWN = {
    "load_device", "offload_device", "parent", "model", "is_dynamic", "model_size", "loaded_size",
    "current_loaded_device", "model_dtype", "model_patches_to", "model_patches_models", "partially_load",
    "partially_unload", "detach", "is_clone", "lowvram_patch_counter", "clone_base_uuid",
    "get_nested_additional_models", "__class__",
    # asked of dynamic patchers only
    "loaded_ram_size", "pinned_memory_size", "partially_unload_ram", "unregister_inactive_pins",
    "set_in_use_by_current_prompt",
}
source = "".join(
    inspect.getsource(getattr(management, name))
    for name in ("LoadedModel", "free_memory", "load_models_gpu", "unload_model_and_clones",
                 "use_more_memory", "offloaded_memory", "cleanup_models_gc", "loaded_models")
)
touched = set(re.findall(r"(?:\\.model|\\bmodel|\\bx|add_model)\\.([a-z_]\\w*)", source))
assert {"detach", "partially_load", "is_clone"} <= touched, touched
assert touched <= KNOWN, f"the host now also asks a patcher for {sorted(touched - KNOWN)}"
clip = load_clip(DEMO, "int8", "cpu")
patcher = clip.patcher
if hasattr(comfy.model_patcher, "is_model_patcher_output"):  # how eviction under RAM pressure finds models
    assert comfy.model_patcher.is_model_patcher_output(clip)
absent = [name for name in touched if not hasattr(patcher, name) and name in KNOWN]
assert set(absent) <= {"unregister_inactive_pins", "set_in_use_by_current_prompt"}, absent
assert patcher.is_dynamic() is False and patcher.lowvram_patch_counter() == 0
assert patcher.model_patches_models() == [] and patcher.get_nested_additional_models() == []
assert patcher.clone().is_clone(patcher) and patcher.clone().parent is patcher
for name in ("load", "partially_load", "partially_unload", "patch_model", "unpatch_model", "detach",
             "add_patches"):
    theirs = inspect.signature(getattr(TextEncoderPatcher.__mro__[1], name)).parameters
    assert set(theirs) <= set(inspect.signature(getattr(TextEncoderPatcher, name)).parameters), name
fresh = {"patcher", "cond_stage_model", "tokenizer", "tokenizer_options", "layer_idx", "use_clip_schedule",
         "apply_hooks_to_conds"}
clone = inspect.getsource(comfy.sd.CLIP.clone)
assert set(re.findall(r"n\\.(\\w+) =", clone)) <= fresh, "the host's CLIP has a new attribute"
print("done")
"""

REPORT = """
import json, os, sys
import comfy.model_management, comfy.model_patcher
import torch
from PIL import Image
from comfy_execution.utils import CurrentNodeContext
from pack.nodes.host.memory import record, stages
from pack.nodes.memory import MemoryReport, ReleaseModel

ReleaseModel.GET_NODE_INFO_V1(), MemoryReport.GET_NODE_INFO_V1()
picture, table, figures = MemoryReport.execute().result
assert picture.shape[0] == 1 and picture.shape[3] == 3 and "has run yet" in table
assert json.loads(figures)["stages"] == json.loads(figures)["held"] == []

with CurrentNodeContext("run 1", "1"):
    with record("Encode the prompts"):
        block = torch.ones(100_000_000 // 4)
        import time; time.sleep(0.1)
        del block
    try:
        with record("A stage that fails"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
first, second = stages()
assert first.peak - first.before > 80e6 and first.after - first.before < 40e6 and first.seconds > 0.1, first
assert second.name == "A stage that fails"
for index in range(60):
    with record("Decode"):
        pass
assert len(stages()) == 50
with CurrentNodeContext("run 2", "1"):
    for name in ("Encode the prompts", "Sample", "Decode with a name that is too long"):
        with record(name):
            held = torch.ones(50_000_000 // 4)
assert [stage.name for stage in stages()][:2] == ["Encode the prompts", "Sample"] and len(stages()) == 3
picture, table, figures = MemoryReport.execute(after="picture").result
assert picture.dtype == torch.float32 and 0 <= picture.min() < picture.max() <= 1
assert [line.split()[0] for line in table.splitlines()] == ["Memory", "stage", "Encode", "Sample", "Decode"]

# another pack's models are told apart from what a stage loads and frees
def patcher(name, size):
    module = type(name, (torch.nn.Module,), {})()
    module.weight = torch.nn.Parameter(torch.zeros(size // 4), requires_grad=False)
    return comfy.model_patcher.ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))

from pack.nodes.host.release import release
sizes = {"Foreign": 40_000_000, "Evicted": 20_000_000, "Ours": 80_000_000}
foreign, evicted, ours = (patcher(*given) for given in sizes.items())
comfy.model_management.load_models_gpu([foreign, evicted])
with CurrentNodeContext("run 3", "1"):
    with record("Sample"):
        release(evicted, "offload")
        comfy.model_management.load_models_gpu([ours])
        activations = torch.ones(400_000_000 // 4)
        release(ours, "free")
        del activations
    with record("Decode"):
        comfy.model_management.load_models_gpu([ours])
    with record("Decode again"):
        comfy.model_management.load_models_gpu([ours])
assert [(stage.loaded, stage.freed) for stage in stages()] == [
    (80_000_000, 100_000_000), (80_000_000, 0), (0, 0)], stages()
first = stages()[0]
assert first.peak - first.before > 300e6, first
budget = (first.before + first.peak) / 2
picture, table, figures = MemoryReport.execute(budget=budget / 1e9).result
report = json.loads(figures)
assert [model["model"] for model in report["held"]] == ["Ours", "Foreign"]
assert report["held"][0] == {"model": "Ours", "device": "cpu", "bytes": 80_000_000}
assert report["budget"] == int(budget) and report["stages"][0]["freed"] == 100_000_000
assert "over budget" in table and "still held: Foreign, 40 MB on cpu" in table and "budget:" in table
Image.fromarray((picture[0] * 255).round().byte().numpy()).save(os.environ["ARGUMENT_0"])
pixels = (picture[0] * 255).round().int()
def columns(color):
    return (pixels == torch.tensor(color)).all(-1).any(0).nonzero().flatten().tolist()
line, over = columns((0xb3, 0x26, 0x1e)), columns((0xe4, 0x57, 0x2e))
assert min(abs(x - (250 + 590 * budget / first.peak)) for x in line) < 2
assert max(over) == 840 and columns((0x9a, 0xa5, 0xb1))
_, _, figures = MemoryReport.execute().result
assert json.loads(figures)["budget"] is None
for wrong in (-1.0, float("nan")):
    try:
        MemoryReport.execute(budget=wrong)
    except ValueError as error:
        assert "budget" in str(error)
    else:
        raise AssertionError(wrong)
assert MemoryReport.fingerprint_inputs() != MemoryReport.fingerprint_inputs()
print("done")
"""

EXECUTOR = """
import json
import torch
import comfy.model_management as management
import execution, nodes
from comfy_api.latest import io
from pack.nodes.loaders import LoadTextEncoder
from pack.nodes.memory import MemoryReport, ReleaseModel
from pack.nodes.text import TextEncode
from pack.pixart_sigma import TextEncoder

seen = []
class Probe:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = ("*",), "run", True, "test"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (io.AnyType.io_type,)}, "optional": {"seed": ("INT", {"default": 0})}}
    def run(self, value, seed=0):
        seen.append(value)
        return (value,)

for node in (LoadTextEncoder, TextEncode, ReleaseModel, MemoryReport):
    nodes.NODE_CLASS_MAPPINGS[node.GET_SCHEMA().node_id] = node
nodes.NODE_CLASS_MAPPINGS["Probe"] = Probe

loads = []
load = TextEncoder.load
TextEncoder.load = classmethod(lambda cls, *given, **options: loads.append(1) or load(*given, **options))

class Server:
    client_id = last_node_id = last_prompt_id = None
    sockets_metadata = {}
    def send_sync(self, event, data, client=None):
        pass

executor = execution.PromptExecutor(Server(), cache_type=execution.CacheType.CLASSIC,
                                    cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
def run(name, positive="a red circle", seed=0):
    seen.clear()
    graph = {
        "t5": ("PixArtSigmaLoadTextEncoder",
               {"text_encoder": "demo (built in)", "precision": "int8", "device": "cpu"}),
        "text": ("PixArtSigmaTextEncode", {"clip": ["t5", 0], "positive": positive, "negative": "",
                                           "clean_caption": False, "after_use": "free"}),
        "sample": ("Probe", {"value": ["text", 0], "seed": seed}),
        "release": ("PixArtSigmaReleaseModel",
                    {"after": ["sample", 0], "model": ["t5", 0], "mode": "offload"}),
        "report": ("PixArtSigmaMemoryReport", {"after": ["release", 0]}),
        "show": ("Probe", {"value": ["report", 1]}),
        "figures": ("Probe", {"value": ["report", 2]}),
    }
    prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
    executor.execute(prompt, name, {}, ["show", "figures", "sample", "release"])
    assert executor.success, executor.status_messages
    assert management.current_loaded_models == []
    texts = [text for text in seen if isinstance(text, str)]
    (table,) = [text for text in texts if not text.startswith("{")]
    (figures,) = [json.loads(text) for text in texts if text.startswith("{")]
    for stage in figures["stages"]:
        assert (stage["loaded"] > 400_000) == (stage["name"] == "Encode the prompts"), stage
        assert stage["freed"] == stage["loaded"], stage
    return [line.split("  ")[0] for line in table.splitlines()[2:]]

assert run("first") == ["Encode the prompts", "Release a model"] and len(loads) == 1
assert run("only the seed", seed=1) == ["Release a model"] and len(loads) == 1, "a freed T5 was loaded again"
assert isinstance(seen[0], list) and seen[0][0][0].shape[2] == 128
run("nothing new", seed=1)
assert len(loads) == 1 and len(seen) == 2, "only the report is made anew"
assert run("the prompt", "a blue circle", 1) == ["Encode the prompts", "Release a model"] and len(loads) == 2
print("done")
"""


def test_release_touches_the_connected_model_and_nothing_else(run_in_host):
    assert run_in_host(RELEASE).strip().endswith("done")


def test_the_patcher_has_what_the_installed_host_asks_for(run_in_host):
    assert run_in_host(CANARY).strip().endswith("done")


def test_the_report_shows_what_was_recorded(run_in_host, tmp_path):
    assert run_in_host(REPORT, tmp_path / "report.png").strip().endswith("done")


def test_a_freed_encoder_is_not_loaded_for_a_cached_prompt(run_in_host):
    assert run_in_host(EXECUTOR).strip().endswith("done")
