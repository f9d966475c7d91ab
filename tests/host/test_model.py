"""Our MODEL in the real host: equal to the references, and open to the host's own nodes. On the CPU."""

from host_common import COMMON

# The host's own PixArt knows one width, and positions of 1024-class sizes: 1440 x 96 pixels are one.
NATIVE = (
    COMMON
    + """
import comfy.hooks
import comfy.lora
import comfy.sd
SIZE = (180, 12)

def lora(names, kind="lora_A lora_B"):
    # Small matrices for each weight, under the names that the kind of file has.
    down, up = kind.split()
    weights = {}
    for name, (rows, columns) in names.items():
        weights[f"{name}.{down}.weight"] = normal(4, columns) / 30
        weights[f"{name}.{up}.weight"] = normal(rows, 4) / 30
    return weights

W = 1152
blocks = {
    "transformer_blocks.0.attn1.to_q": (W, W), "transformer_blocks.0.attn1.to_v": (W, W),
    "transformer_blocks.0.attn1.to_out.0": (W, W), "transformer_blocks.0.attn2.to_k": (W, W),
    "transformer_blocks.0.attn2.to_q": (W, W), "transformer_blocks.0.ff.net.0.proj": (4 * W, W),
    "adaln_single.linear": (6 * W, W), "proj_out": (32, W),
}
fused = {
    "blocks.0.attn.qkv": (3 * W, W), "blocks.0.cross_attn.kv_linear": (2 * W, W),
    "blocks.0.cross_attn.proj": (W, W), "blocks.0.mlp.fc2": (W, 4 * W), "t_block.1": (6 * W, W),
}
loras = {
    "base_model.model.": lora({f"base_model.model.{name}": shape for name, shape in blocks.items()}),
    "transformer.": lora({f"transformer.{name}": shape for name, shape in blocks.items()}),
    "diffusion_model.": lora({f"diffusion_model.{name}": shape for name, shape in fused.items()}),
    "lora_unet_": lora(
        {"lora_unet_" + name.replace(".", "_"): shape for name, shape in fused.items()},
        "lora_down lora_up",
    ) | {"lora_unet_blocks_0_attn_qkv.alpha": torch.tensor(2.0)},
    "lora_unet_ with lokr and bias": {
        "lora_unet_blocks_0_attn_qkv.lokr_w1": normal(3, 2) / 10,
        "lora_unet_blocks_0_attn_qkv.lokr_w2": normal(W, W // 2) / 10,
        "lora_unet_blocks_0_attn_qkv.diff_b": normal(3 * W),
    },
}

with torch.inference_mode():
    path = folder / "wide_1024.safetensors"
    save_file(transformer(16, 1, 4096).state_dict(), path)
    anonymous = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
    before = anonymous()
    ours = load_model(path)
    assert anonymous() - before < path.stat().st_size / 2**20 / 4, "the weights were read into RAM"
    native = comfy.sd.load_diffusion_model(str(path))
    conds = conditioning(20, 4096), conditioning(20, 4096)
    expected = ksampler(native, *conds, SIZE)
    assert difference(ksampler(ours, *conds, SIZE), expected) < 1e-4

    expected = ksampler(native, *conds, SIZE, steps=1, cfg=1)
    for name, weights in loras.items():
        patched = [comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0)[0] for model in (native, ours)]
        theirs, result = (ksampler(model, *conds, SIZE, steps=1, cfg=1) for model in patched)
        assert difference(theirs, expected) > 1e-3, (name, difference(theirs, expected))
        assert difference(result, theirs) < 1e-4, (name, difference(result, theirs))
    assert difference(ksampler(ours, *conds, SIZE, steps=1, cfg=1), expected) < 1e-4

    # half of the weights away from the device, LoRA put on them as they come
    network, inputs = ours.model.diffusion_model, (normal(1, 4, *SIZE), torch.tensor([500.0]), conds[0][0][0])
    ours.detach()
    patched = comfy.sd.load_lora_for_models(ours, None, loras["lora_unet_"], 0.8, 0)[0]
    patched.load(torch.device("cpu"), full_load=True)
    expected = network(*inputs)
    patched.detach()
    assert difference(network(*inputs), expected) > 1e-3
    patched.load(torch.device("cpu"), lowvram_model_memory=patched.model_size() // 2)
    assert patched.lowvram_patch_counter() > 3
    assert difference(network(*inputs), expected) < 1e-5
    patched.detach()
    assert not any("blocks.0.attn.qkv" in name for name in ours.model_state_dict())
    targets = comfy.lora.model_lora_keys_unet(ours.model, {})
    for name, weights in loras.items():
        patches = comfy.lora.load_lora(weights, targets)
        assert set(ours.clone().add_hook_patches(comfy.hooks.WeightHook(), patches)) == set(patches), name
        assert set(ours.clone().add_patches(patches | {"elsewhere.weight": ()})) == set(patches), name
"""
)

REFERENCE = (
    COMMON
    + """
import comfy.sample
import comfy.samplers
from comfy.model_management import current_loaded_models
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
from pack.nodes.host.sampling import reference_sigmas
from pack.nodes.sampling import ReferenceSchedule, Sampler
from pack.pixart_sigma import DEMO
SIZE = (16, 24)

def saved(name, **config):
    made = transformer(2, 3, 64, **config)
    save_file(made.state_dict(), folder / f"{name}.safetensors")
    return made, folder / f"{name}.safetensors"

def sigma_sampler(model, positive, negative, size=SIZE, kv_compression="off", **changes):
    settings = dict(
        model=model, positive=positive, negative=negative, latent_image={"samples": torch.zeros(1, 4, *size)},
        seed=0, steps=3, cfg=4.5, sampler_name="dpmpp_2m", schedule="reference", denoise=1.0,
        kv_compression=kv_compression, after_use="keep",
    )
    return Sampler.execute(**(settings | changes)).args[0]["samples"]

def count_calls(model):
    calls = []
    model = model.clone()
    def count(executor, x, *arguments, **options):
        calls.append(len(x))
        return executor(x, *arguments, **options)
    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, count)
    return model, calls

with torch.inference_mode():
    # the schedule, and whole runs, are those of diffusers
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    files = {
        "tiny_256": ((32, 32), {"sample_size": 32, "interpolation_scale": 0.5}),
        "tiny_2K": ((12, 48), {"sample_size": 256, "interpolation_scale": 4}),
        "tiny_1024": ((36, 20), {}),
    }
    for name, (size, config) in files.items():
        theirs, path = saved(name, **config)
        model = load_model(path)
        assert isinstance(model, ModelPatcher) and model.model.diffusion_model.sigma_config.num_layers == 3
        table = model.get_model_object("model_sampling").sigmas.double()
        assert difference(1 / (1 + table**2), scheduler.alphas_cumprod.double()) < 1e-6
        scheduler.set_timesteps(20)
        (sigmas,) = ReferenceSchedule.execute(model, 20, 1.0).args
        assert sigmas.shape == (21,) and sigmas[-1] == 0
        assert difference(sigmas[:-1] / scheduler.sigmas[:-1], torch.ones(20)) < 1e-5
        pipeline = PixArtSigmaPipeline(None, None, None, theirs, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        positive, negative = conditioning(9, 64), conditioning(5, 64)
        padded = torch.cat([negative[0][0], torch.zeros(1, 4, 64)], dim=1)
        noise = comfy.sample.prepare_noise(torch.zeros(1, 4, *size), 0)
        expected = pipeline(
            prompt=None, negative_prompt=None, latents=noise, num_inference_steps=20, guidance_scale=4.5,
            height=size[0] * 8, width=size[1] * 8, use_resolution_binning=False, output_type="latent",
            prompt_embeds=positive[0][0], prompt_attention_mask=torch.ones(1, 9),
            negative_prompt_embeds=padded, negative_prompt_attention_mask=torch.arange(9)[None] < 5,
        ).images
        result = sigma_sampler(model, positive, negative, size, steps=20) * 0.13025
        assert difference(result, expected) < 1e-5, difference(result, expected)
    print("reference", flush=True)

    # prompts of any two lengths share one call
    for length in (300, 301, 600):
        long, short = conditioning(length, 64), conditioning(1, 64)
        counted, calls = count_calls(model)
        together = sigma_sampler(counted, long, short)
        assert calls == [2, 2, 2]
        apart, calls = count_calls(model)
        model.model.memory_required = lambda *arguments, **named: 1e30
        expected = sigma_sampler(apart, long, short)
        del model.model.memory_required
        assert calls == [1] * 6, calls
        assert difference(together, expected) < 1e-4, difference(together, expected)
    masked = [[torch.cat([short[0][0], normal(1, 6, 64)], 1), {"attention_mask": torch.arange(7)[None] < 1}]]
    assert difference(sigma_sampler(model, long, masked), expected) < 1e-4
    print("lengths", flush=True)

    # hooks, with the host's own nodes where it has one
    steps = {"steps": 10}
    conds = conditioning(9, 64), conditioning(5, 64)
    plain = sigma_sampler(model, *conds, **steps)
    skipping = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "").args[0]
    assert difference(sigma_sampler(skipping, *conds, **steps), plain) > 1e-3
    assert difference(sigma_sampler(NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0], *conds), plain) > 1e-3
    cached = EasyCacheNode.execute(model, 1.0, 0.15, 0.95, False).args[0]
    runs = []
    counting = model.model.diffusion_model.proj_out.register_forward_hook(lambda *_: runs.append(1))
    cached = sigma_sampler(cached, *conds, **steps)
    counting.remove()
    assert len(runs) < 10 and cached.isfinite().all(), len(runs)

    layer = lambda: {"linear.0.weight": normal(144, 144) / 30, "linear.0.bias": normal(144) / 30}
    torch.save({144: [layer(), layer()]}, folder / "hypernetwork.pt")
    for kind in ("attn1", "attn2"):
        patched = model.clone()
        patch = load_hypernetwork_patch(str(folder / "hypernetwork.pt"), 1.0)
        patched.set_model_patch(patch, f"{kind}_patch")
        assert difference(sigma_sampler(patched, *conds, **steps), plain) > 1e-3, kind
    seen = []
    def look(q, k, v, extra_options):
        seen.append((extra_options["block"], extra_options["block_index"], extra_options["n_heads"]))
        assert "sigmas" in extra_options and "patches" not in extra_options and q.shape[-1] == 144
        return q, k, v
    watched = model.clone()
    watched.set_model_attn1_patch(look)
    watched.set_model_attn2_patch(look)
    attentions = []
    def override(function, *arguments, **options):
        attentions.append(options["transformer_options"]["block_index"])
        return function(*arguments, **options)
    watched.model_options["transformer_options"]["optimized_attention_override"] = override
    args_seen = []
    def rerun(args, extra):
        args_seen.append(set(args))
        return extra["original_block"](args)
    watched.set_model_patch_replace(rerun, "dit", "double_block", 1)
    assert difference(sigma_sampler(watched, *conds, **steps), plain) < 1e-6
    one_step = [(("double_block", index), index, 2) for index in (0, 0, 1, 1, 2, 2)]
    assert seen == one_step * 10 and attentions == [0, 0, 1, 1, 2, 2] * 10 and len(args_seen) == 10
    assert difference(sigma_sampler(model, *conds, **steps), plain) == 0
    print("hooks", flush=True)

    # KV compression is a setting of the run; other MODELs and clones know nothing of it
    network = model.model.diffusion_model
    compressed = sigma_sampler(model, *conds, kv_compression="mean:2:all", **steps)
    assert difference(compressed, plain) > 1e-4
    assert model.model_options["transformer_options"] == {}
    assert difference(sigma_sampler(model, *conds, kv_compression="auto", **steps), plain) == 0

    # inpainting keeps what is masked out, native samplers and schedules work, denoise starts late
    mask = torch.zeros(1, 128, 192)
    mask[..., :96] = 1
    given = normal(1, 4, *SIZE)
    painted = sigma_sampler(model, *conds, latent_image={"samples": given, "noise_mask": mask})
    assert difference(painted[..., 14:], given[..., 14:]) < 1e-4 < difference(painted, given)
    assert difference(ksampler(model, *conds, SIZE), ksampler(model.clone(), *conds, SIZE)) == 0
    normally = sigma_sampler(model, *conds, schedule="normal", steps=2)
    assert difference(normally, ksampler(model, *conds, SIZE)) == 0
    assert len(reference_sigmas(model, 5, 0.5)) == 6 and len(reference_sigmas(model, 5, 0)) == 0
    assert reference_sigmas(model, 5, 0.001).diff().lt(0).all()
    assert torch.equal(sigma_sampler(model, *conds, latent_image={"samples": given}, denoise=0.0), given)

    two = {"samples": torch.zeros(2, 4, *SIZE), "batch_index": [0, 3]}
    both = sigma_sampler(model, *conds, latent_image=two, **steps)
    assert difference(both[:1], plain) < 1e-4 < difference(both[1:], plain)

    # dtypes, partial loading, release
    half = load_model(path, dtype="fp16")
    assert half.model.get_dtype() == torch.float16 and half.model_size() * 1.9 < model.model_size()
    assert difference(sigma_sampler(half, *conds, **steps), plain) < 0.2
    half.partially_load(torch.device("cpu"), half.model_size() // 2)
    held = lambda: [entry for entry in current_loaded_models if entry.model.model is model.model]
    assert held() and network._positions
    sigma_sampler(model, *conds, after_use="free")
    assert not held() and not network._positions
    model.load(torch.device("cpu"), lowvram_model_memory=model.model_size() // 2)
    casting = [module for module in network.modules() if getattr(module, "comfy_cast_weights", False)]
    assert 0 < len(casting) < 40
    embeds = conds[0][0][0]
    exact = network(given, torch.tensor([500.0]), embeds)
    model.detach()
    assert difference(network(given, torch.tensor([500.0]), embeds), exact) < 1e-5

    # what the host saves can be loaded again
    comfy.utils.save_torch_file(model.state_dict_for_saving(), str(folder / "saved.safetensors"))
    again = load_model(folder / "saved.safetensors", "1024")
    assert difference(sigma_sampler(again, *conds, **steps), plain) < 1e-6

    # what people read
    for node in (ReferenceSchedule, Sampler):
        info = node.GET_NODE_INFO_V1()
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        assert all(options["tooltip"] for _, options in inputs.values()) and all(info["output_tooltips"])

    # what people do wrong
    wrong = conditioning(5, 4096)
    raises("is 4096 wide, and this transformer reads 64", lambda: sigma_sampler(model, wrong, wrong))
    start = lambda samples: sigma_sampler(model, *conds, latent_image={"samples": samples})
    raises("another kind", lambda: start(normal(1, 16, 8, 8)))
    raises("NaN", lambda: start(given * float("nan")))
    raises("not understood", lambda: sigma_sampler(model, *conds, kv_compression="mean"))
    demo = load_model(DEMO)
    factors = torch.tensor(demo.model.latent_format.latent_rgb_factors)
    assert factors.shape == (4, 3) and factors.abs().max() > 0.05
    assert demo.model.latent_format.scale_factor == 0.13025
    print("rest", flush=True)
"""
)

# Bytes alive in a forward pass, counted at the true width on the meta device, which computes nothing.
MEMORY = """
import sys
import weakref
from types import SimpleNamespace
import comfy.memory_management
import comfy.ops
import pack.nodes.loaders
import pack.nodes.sampling
import torch

assert "diffusers" not in sys.modules, "importing the nodes is slow"

from torch.utils._python_dispatch import TorchDispatchMode
from pack.nodes.host.network import build_network
from pack.nodes.host.transformer import SigmaModel, _host_config, load_model
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.transformer.config import TransformerConfig

class LiveBytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(made) and made.is_meta:
                self.add(made.untyped_storage())
        return result

    def add(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, identity, size):
        self.known.discard(identity)
        self.live -= size

with torch.inference_mode():
    # the host makes layers without weights where it loads them on demand
    plain = load_model(DEMO).model.diffusion_model
    comfy.memory_management.aimdo_enabled = True
    lazy = load_model(DEMO).model.diffusion_model
    comfy.memory_management.aimdo_enabled = False
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500.0]), torch.ones(1, 3, 128)
    assert torch.equal(plain(*inputs), lazy(*inputs))
    assert plain.state_dict().keys() == lazy.state_dict().keys()

sizes = TransformerConfig(128, 2.0, 2, 16, 72, 4, 8, 2, 4096, 1152)
with torch.inference_mode():
    network = build_network(sizes, comfy.ops.disable_weight_init)
    config = _host_config(SimpleNamespace(config=sizes, dtype=torch.float32), 10**9, "fp32")
    model = SigmaModel(config, network)
    network.dtype = torch.float32
    network.set_attn_processor(type(network.transformer_blocks[0].attn1.processor)(
        lambda query, key, value, mask, options: torch.empty_like(query)
    ))
    runs = (2, 32, 32, 300), (2, 128, 128, 20), (4, 61, 97, 120), (1, 512, 512, 600)
    for batch, height, width, length in runs:
        with LiveBytes() as counted:
            latents = torch.empty(batch, 4, height, width, device="meta")
            context = torch.empty(batch, length, 4096, device="meta")
            mask = torch.empty(batch, length, device="meta")
            network(latents, torch.empty(batch, device="meta"), context, mask)
        shapes = {"c_crossattn": [[batch // 2 or 1, length, 4096], [batch // 2 or 1, 1, 4096]]}
        estimate = model.memory_required([batch, 4, height, width], shapes)
        print(batch, height, width, length, estimate / counted.peak)
        assert 0.9 < estimate / counted.peak < 1.1, (batch, height, width, length, estimate / counted.peak)
"""


def test_it_equals_the_hosts_own_pixart_also_with_loras(run_in_host, tmp_path):
    run_in_host(NATIVE, tmp_path)


def test_it_equals_diffusers_and_the_hosts_nodes_act_on_it(run_in_host, tmp_path):
    assert run_in_host(REFERENCE, tmp_path).split()[-1] == "rest"


def test_the_memory_it_asks_for_is_what_it_uses(run_in_host):
    print(run_in_host(MEMORY))
