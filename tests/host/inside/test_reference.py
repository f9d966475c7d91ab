"""Our MODEL and sampler equal diffusers' pipeline, and do what the host's own nodes ask. On the CPU."""

import os
import shutil

import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.model_management import current_loaded_models, load_models_gpu
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_model_merging import save_checkpoint
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
from pack.nodes.host.sampling import reference_sigmas
from pack.nodes.host.transformer import load_model
from pack.nodes.sampling import ReferenceSchedule, Sampler
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import SigmaError
from random_models import conditioning, difference, ksampler, normal, transformer
from safetensors.torch import save_file

import nodes as host_nodes

SIZE = (16, 24)
CONDITIONING = conditioning(9, 64, seed=1), conditioning(5, 64, seed=2)
GIVEN = normal(1, 4, *SIZE, seed=3)
STEPS = 10


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By name: a transformer of diffusers, the file of its weights, and the latents' size to sample at."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, size, config in (
        ("tiny_256", (32, 32), {"sample_size": 32, "interpolation_scale": 0.5}),
        ("tiny_2K", (12, 48), {"sample_size": 256, "interpolation_scale": 4}),
        ("tiny_1024", (36, 20), {}),
    ):
        theirs, path = transformer(2, 3, 64, **config), folder / f"{name}.safetensors"
        save_file(theirs.state_dict(), path)
        made[name] = theirs, path, size
    return made


@pytest.fixture(scope="module")
def file(files):
    return files["tiny_1024"][1]


@pytest.fixture(scope="module")
def model(file):
    return load_model(file)


@pytest.fixture(scope="module")
def plain(model):
    """What an unchanged model makes."""
    return sample(model)


def sigma_sampler(model, positive, negative, size=SIZE, **changes):
    settings = {
        "latent_image": {"samples": torch.zeros(1, 4, *size)},
        "seed": 0,
        "steps": 3,
        "cfg": 4.5,
        "sampler_name": "dpmpp_2m",
        "schedule": "reference",
        "denoise": 1.0,
        "kv_compression": "off",
        "after_use": "keep",
    }
    made = Sampler.execute(model=model, positive=positive, negative=negative, **(settings | changes))
    return made.args[0]["samples"]


def sample(model, steps=STEPS, **changes):
    return sigma_sampler(model, *CONDITIONING, steps=steps, **changes)


@pytest.fixture
def scheduler():
    made = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    made.set_timesteps(20)
    return made


def test_the_schedule_is_that_of_diffusers(files, scheduler):
    for name, (_, path, _) in files.items():
        model = load_model(path)
        table = model.get_model_object("model_sampling").sigmas.double()
        assert difference(1 / (1 + table**2), scheduler.alphas_cumprod.double()) < 1e-6, name
        (sigmas,) = ReferenceSchedule.execute(model, 20, 1.0).args
        assert sigmas.shape == (21,) and sigmas[-1] == 0, name
        assert difference(sigmas[:-1] / scheduler.sigmas[:-1], torch.ones(20)) < 1e-5, name


def test_a_file_that_is_cut_off_ends_a_run_and_not_the_host(file, tmp_path):
    """Its weights are mapped, and copied to the device before each run."""
    shutil.copy(file, tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 4096)
    with pytest.raises(SigmaError, match="model.safetensors was cut off while its weights are in use"):
        sample(model)


def test_whole_runs_are_those_of_diffusers(files, scheduler):
    for name, (theirs, path, size) in files.items():
        model = load_model(path)
        assert isinstance(model, ModelPatcher) and model.model.diffusion_model.sigma_config.num_layers == 3
        expected = run_of_diffusers(theirs, scheduler, size)
        result = sigma_sampler(model, *CONDITIONING, size, steps=20) * 0.13025
        assert difference(result, expected) < 1e-5, name


SCHEDULES = {
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "v-prediction": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "sample": {"prediction_type": "sample", "timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
}


def pipeline_folder(file, folder, scheduler):
    """A folder of diffusers with a transformer and a scheduler."""
    (folder / "transformer").mkdir(parents=True)
    shutil.copy(file, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_noise_schedule_of_a_folder_is_obeyed(files, tmp_path, kind):
    theirs, path, size = files["tiny_1024"]
    scheduler = DPMSolverMultistepScheduler(**SCHEDULES[kind])
    model = load_model(pipeline_folder(path, tmp_path / "models", scheduler))
    expected = run_of_diffusers(theirs, scheduler, size)
    result = sigma_sampler(model, *CONDITIONING, size, steps=20) * 0.13025
    assert difference(result, expected) < 1e-4, kind
    if kind == "v-prediction":  # which the host's own sampler needs to know as well
        (node,) = ModelSamplingDiscrete().patch(load_model(path), "v_prediction", True)
        assert difference(ksampler(model, *CONDITIONING, size), ksampler(node, *CONDITIONING, size)) < 1e-3

    save_checkpoint(model, filename_prefix="saved", output_dir=str(tmp_path))
    again = load_model(tmp_path / "saved_00001_.safetensors")
    assert again.model.noise_schedule == model.model.noise_schedule != load_model(path).model.noise_schedule
    assert (
        difference(sigma_sampler(again, *CONDITIONING, size), sigma_sampler(model, *CONDITIONING, size)) == 0
    )


def test_a_flow_of_a_folder_is_obeyed(files, tmp_path):
    _, path, size = files["tiny_1024"]
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    model = load_model(pipeline_folder(path, tmp_path / "models", scheduler))
    scheduler.set_timesteps(20)
    assert difference(reference_sigmas(model, 20), scheduler.sigmas) < 1e-5
    x, sigma, embeds = normal(1, 4, *size, seed=3), torch.tensor([0.75]), CONDITIONING[0][0][0]
    predicted = model.model.diffusion_model(x, sigma * 1000, embeds)
    assert difference(model.model.apply_model(x, sigma, c_crossattn=embeds), x - 0.75 * predicted) < 1e-5


def test_what_a_node_puts_in_place_of_the_noise_schedule_goes_first(files, tmp_path):
    folder = pipeline_folder(
        files["tiny_1024"][1], tmp_path / "models", DPMSolverMultistepScheduler(use_karras_sigmas=True)
    )
    model = load_model(folder)
    (patched,) = ModelSamplingDiscrete().patch(model, "v_prediction", True)
    assert reference_sigmas(model, 5)[0] < 200 < 4000 < reference_sigmas(patched, 5)[0]


def run_of_diffusers(network, scheduler, size):
    """Latents of CONDITIONING, its shorter prompt padded as their pipeline does it."""
    pipeline = PixArtSigmaPipeline(None, None, None, network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    positive, negative = (entry[0][0] for entry in CONDITIONING)
    return pipeline(
        prompt=None,
        negative_prompt=None,
        latents=comfy.sample.prepare_noise(torch.zeros(1, 4, *size), 0),
        num_inference_steps=20,
        guidance_scale=4.5,
        height=size[0] * 8,
        width=size[1] * 8,
        use_resolution_binning=False,
        output_type="latent",
        prompt_embeds=positive,
        prompt_attention_mask=torch.ones(1, 9),
        negative_prompt_embeds=torch.cat([negative, torch.zeros(1, 4, 64)], dim=1),
        negative_prompt_attention_mask=torch.arange(9)[None] < 5,
    ).images


def count_calls(model):
    """A clone of the model, and the batch sizes that it is called with."""
    calls = []
    model = model.clone()

    def count(executor, x, *arguments, **options):
        calls.append(len(x))
        return executor(x, *arguments, **options)

    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, count)
    return model, calls


def test_prompts_of_any_two_lengths_share_one_call(model, monkeypatch):
    short = conditioning(1, 64, seed=4)
    for length in (300, 301, 600):
        long = conditioning(length, 64, seed=5)
        counted, calls = count_calls(model)
        together = sigma_sampler(counted, long, short)
        assert calls == [2, 2, 2]
        apart, calls = count_calls(model)
        with monkeypatch.context() as patch:
            patch.setattr(model.model, "memory_required", lambda *arguments, **named: 1e30)
            expected = sigma_sampler(apart, long, short)
        assert calls == [1] * 6
        assert difference(together, expected) < 1e-4
    padded = torch.cat([short[0][0], normal(1, 6, 64, seed=6)], dim=1)
    masked = [[padded, {"attention_mask": torch.arange(7)[None] < 1}]]
    assert difference(sigma_sampler(model, long, masked), expected) < 1e-4


def test_guidance_and_step_caches_of_the_hosts_own_nodes_act(model, plain):
    skipping = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "").args[0]
    assert difference(sample(skipping), plain) > 1e-3
    attending = NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]
    assert difference(sample(attending), plain) > 1e-3

    cached = EasyCacheNode.execute(model, 1.0, 0.15, 0.95, False).args[0]
    runs = []
    counting = model.model.diffusion_model.proj_out.register_forward_hook(lambda *_: runs.append(1))
    made = sample(cached)
    counting.remove()
    assert len(runs) < STEPS and made.isfinite().all()
    assert difference(sample(model), plain) == 0


def test_a_hypernetwork_acts_on_both_attentions(model, plain, tmp_path):
    def layer(seed):
        return {
            "linear.0.weight": normal(144, 144, seed=seed) / 30,
            "linear.0.bias": normal(144, seed=seed + 1) / 30,
        }

    torch.save({144: [layer(7), layer(9)]}, tmp_path / "hypernetwork.pt")
    for kind in ("attn1", "attn2"):
        patched = model.clone()
        patch = load_hypernetwork_patch(str(tmp_path / "hypernetwork.pt"), 1.0)
        patched.set_model_patch(patch, f"{kind}_patch")
        assert difference(sample(patched), plain) > 1e-3, kind


def test_patches_see_each_attention_and_block(model, plain):
    patched_attentions, attentions, blocks = [], [], []

    def look(q, k, v, extra_options):
        patched_attentions.append(
            (extra_options["block"], extra_options["block_index"], extra_options["n_heads"])
        )
        assert "sigmas" in extra_options and "patches" not in extra_options and q.shape[-1] == 144
        return q, k, v

    def override(function, *arguments, **options):
        attentions.append(options["transformer_options"]["block_index"])
        return function(*arguments, **options)

    def rerun(args, extra):
        blocks.append(set(args))
        return extra["original_block"](args)

    watched = model.clone()
    watched.set_model_attn1_patch(look)
    watched.set_model_attn2_patch(look)
    watched.model_options["transformer_options"]["optimized_attention_override"] = override
    watched.set_model_patch_replace(rerun, "dit", "double_block", 1)
    assert difference(sample(watched), plain) < 1e-6
    one_step = [(("double_block", index), index, 2) for index in (0, 0, 1, 1, 2, 2)]
    assert patched_attentions == one_step * STEPS
    assert attentions == [0, 0, 1, 1, 2, 2] * STEPS and len(blocks) == STEPS
    assert difference(sample(model), plain) == 0


def test_kv_compression_is_a_setting_of_the_run(model, plain):
    """Other MODELs and clones know nothing of it."""
    assert difference(sample(model, kv_compression="mean:2:all"), plain) > 1e-4
    assert model.model_options["transformer_options"] == {}
    assert difference(sample(model, kv_compression="auto"), plain) == 0


def test_inpainting_keeps_what_is_masked_out(model):
    mask = torch.zeros(1, 128, 192)
    mask[..., :96] = 1
    painted = sample(model, steps=3, latent_image={"samples": GIVEN, "noise_mask": mask})
    assert difference(painted[..., 14:], GIVEN[..., 14:]) < 1e-4 < difference(painted, GIVEN)


def test_the_hosts_samplers_and_schedules_work(model):
    expected = ksampler(model, *CONDITIONING, SIZE)
    assert difference(ksampler(model.clone(), *CONDITIONING, SIZE), expected) == 0
    assert difference(sample(model, schedule="normal", steps=2), expected) == 0


def test_denoise_starts_late(model):
    assert len(reference_sigmas(model, 5, 0.5)) == 6 and len(reference_sigmas(model, 5, 0)) == 0
    assert reference_sigmas(model, 5, 0.001).diff().lt(0).all()
    kept = sample(model, steps=3, latent_image={"samples": GIVEN}, denoise=0.0)
    assert torch.equal(kept, GIVEN)


def test_a_pictures_noise_is_that_of_its_place_in_the_batch(model, plain):
    two = {"samples": torch.zeros(2, 4, *SIZE), "batch_index": [0, 3]}
    both = sample(model, latent_image=two)
    assert difference(both[:1], plain) < 1e-4 < difference(both[1:], plain)


def test_half_precision_takes_half_the_memory(model, file, plain):
    half = load_model(file, dtype="fp16")
    assert half.model.get_dtype() == torch.float16 and half.model_size() * 1.9 < model.model_size()
    assert difference(sample(half), plain) < 0.2
    half.partially_load(torch.device("cpu"), half.model_size() // 2)


def test_the_sampler_releases_the_model(model):
    def held():
        return [entry for entry in current_loaded_models if entry.model.model is model.model]

    network = model.model.diffusion_model
    sample(model, steps=3)
    assert held() and network._positions
    sample(model, steps=3, after_use="free")
    assert not held() and not network._positions


def test_a_partially_loaded_model_casts_and_computes_the_same(model):
    network = model.model.diffusion_model
    inputs = GIVEN, torch.tensor([500.0]), CONDITIONING[0][0][0]
    model.load(torch.device("cpu"), lowvram_model_memory=model.model_size() // 2)
    casting = [module for module in network.modules() if getattr(module, "comfy_cast_weights", False)]
    assert 0 < len(casting) < 40
    exact = network(*inputs)
    model.detach()
    assert difference(network(*inputs), exact) < 1e-5


def test_what_the_host_saves_can_be_loaded_again(model, plain, tmp_path):
    comfy.utils.save_torch_file(model.state_dict_for_saving(), str(tmp_path / "saved.safetensors"))
    again = load_model(tmp_path / "saved.safetensors", "1024")
    assert difference(sample(again), plain) < 1e-6


def test_every_input_and_output_has_a_tooltip():
    for node in (ReferenceSchedule, Sampler):
        info = node.GET_NODE_INFO_V1()
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        assert all(options["tooltip"] for _, options in inputs.values()) and all(info["output_tooltips"])


def test_what_people_do_wrong_is_explained(model):
    wrong = conditioning(5, 4096, seed=7)
    with pytest.raises(SigmaError, match="is 4096 wide, and this transformer reads 64"):
        sigma_sampler(model, wrong, wrong)
    with pytest.raises(SigmaError, match="another kind"):
        sample(model, latent_image={"samples": normal(1, 16, 8, 8, seed=8)})
    with pytest.raises(SigmaError, match="NaN"):
        sample(model, latent_image={"samples": GIVEN * float("nan")})
    with pytest.raises(SigmaError, match="not understood"):
        sample(model, kv_compression="mean")


def run_of_the_hosts_nodes(model, positive, negative, latents):
    """By each of the nodes that sample with a MODEL: a function that does it."""
    latent, sigmas = {"samples": latents}, torch.tensor([10.0, 0.0])
    euler, custom = comfy.samplers.sampler_object("euler"), nodes_custom_sampler
    noise = custom.RandomNoise.execute(0).args[0]
    guider = custom.CFGGuider.execute(model, positive, negative, 4.5).args[0]
    return (
        lambda: host_nodes.KSampler().sample(model, 0, 1, 4.5, "euler", "normal", positive, negative, latent),
        lambda: custom.SamplerCustom.execute(model, True, 0, 4.5, positive, negative, euler, sigmas, latent),
        lambda: custom.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, latent),
        lambda: sigma_sampler(model, positive, negative, latent_image=latent),
    )


def test_every_sampler_explains_what_is_not_for_the_model(model):
    image = normal(1, 16, 8, 8, seed=8)
    shapes = {
        r"\(1, 16, 8, 8\)": image,
        r"\(1, 4, 3, 8, 8\)": normal(1, 4, 3, 8, 8, seed=8),
        r"\(1, 4, 64\)": normal(1, 4, 64, seed=8),
        "nested": NestedTensor([image, normal(1, 8, 20, seed=8)]),
    }
    for message, latents in shapes.items():
        for run in run_of_the_hosts_nodes(model, *CONDITIONING, latents):
            with pytest.raises(SigmaError, match=f"The latents are {message}"):
                run()
    embeds = {
        "is 4096 wide, and this transformer reads 64": normal(1, 5, 4096, seed=7),
        r"is \(5, 64\), and this transformer reads \(batch, tokens, 64\)": normal(5, 64, seed=7),
        "no prompt embeddings": None,
    }
    for message, wrong in embeds.items():
        for run in run_of_the_hosts_nodes(model, CONDITIONING[0], [[wrong, {}]], GIVEN):
            with pytest.raises(SigmaError, match=message):
                run()


def test_nodes_for_other_networks_are_refused(model):
    for node in (FreeU, FreeU_V2):
        with pytest.raises(SigmaError, match="model_channels, which PixArt-Sigma has not.*FreeU"):
            node.execute(model, 1.1, 1.2, 0.9, 0.2)
    assert model.model.model_config.unet_config.get("model_channels") is None


def test_a_patched_table_is_used_and_saved(model):
    """The host's own patcher passes over weights of modules that hold others."""
    name = "diffusion_model.transformer_blocks.1.scale_shift_table"
    plain = model.model_state_dict()[name].clone()
    patched = model.clone()
    patched.add_patches({"diffusion_model.blocks.1.scale_shift_table": ("diff", (torch.ones(6, 144),))}, 0.5)
    load_models_gpu([patched])
    saved = patched.state_dict_for_saving()["model.diffusion_model.blocks.1.scale_shift_table"]
    assert torch.allclose(saved, plain + 0.5)
    patched.detach()
    assert torch.equal(model.model_state_dict()[name], plain)


def test_torch_compile_makes_one_graph(model):
    """With the attention that the host takes on a CPU."""
    compiled = torch.compile(model.model.diffusion_model, backend="eager", fullgraph=True)
    inputs = GIVEN, torch.tensor([500.0]), CONDITIONING[0][0][0]
    assert difference(compiled(*inputs), model.model.diffusion_model(*inputs)) < 1e-5


def test_previews_have_factors_and_the_scale_is_sdxls():
    latent_format = load_model(DEMO).model.latent_format
    factors = torch.tensor(latent_format.latent_rgb_factors)
    assert factors.shape == (4, 3) and factors.abs().max() > 0.05
    assert latent_format.scale_factor == 0.13025
