"""Recipes of few-step weights in the host equal the engine's, through Σ Sampler and through SamplerCustom."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from pack.nodes.few_step import FewStepRecipe
from pack.nodes.host.speed import set_speed
from pack.nodes.host.transformer import load_model
from pack.nodes.sampling import Sampler
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.prompt_embeds import Prompts
from pack.pixart_sigma.recipes import RECIPE_NAMES
from pack.pixart_sigma.sampling.denoise import denoise
from pack.pixart_sigma.sampling.guidance import guide
from pack.pixart_sigma.settings import Settings
from pack.pixart_sigma.transformer.checkpoint import inspect
from pack.pixart_sigma.transformer.loading import load_transformer
from random_models import conditioning, difference, normal, transformer
from safetensors.torch import save_file

SIZE = (12, 20)
SEED = 7
SCALE = 0.13025
EMPTY, GIVEN = torch.zeros(1, 4, *SIZE), normal(1, 4, *SIZE, seed=3)
# In tests the fresh noise of a step has to be the engine's, which draws it from a generator that it is given:
# this is what the host's own default does on a CPU.
FRESH = SEED + 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By name: the file or folder of a transformer, and its conditioning."""
    made = tmp_path_factory.mktemp("models")
    tiny, wide = transformer(2, 3, 64), conditioning(9, 64, seed=1)
    save_file(tiny.state_dict(), made / "tiny_1024.safetensors")
    folder = made / "v"
    (folder / "transformer").mkdir(parents=True)
    save_file(tiny.state_dict(), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    DPMSolverMultistepScheduler(
        prediction_type="v_prediction", beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).save_pretrained(folder / "scheduler")
    width = inspect(DEMO).config.caption_channels
    return {
        "tiny": (made / "tiny_1024.safetensors", wide),
        "v-prediction": (folder, wide),
        "demo": (DEMO, conditioning(7, width, seed=2)),
    }


@pytest.fixture(scope="module")
def models(folders):
    return {name: load_model(path, dtype="fp32") for name, (path, _) in folders.items()}


@pytest.fixture(scope="module")
def engines(folders):
    """By name: the engine's run of a recipe from the host's noise, to latents in the host's scale."""
    made = {}
    for name, (path, ((embeds, _),)) in folders.items():
        checkpoint, network = inspect(path), load_transformer(path, dtype=torch.float32)

        def run(recipe, latents=None, checkpoint=checkpoint, network=network, embeds=embeds, **settings):
            named = {"mask": settings.pop("mask", None)}
            settings = Settings(recipe=recipe, **settings)
            noise = comfy.sample.prepare_noise(EMPTY, SEED)
            latents = latents if latents is None else latents * SCALE
            finished = denoise(
                guide(network, Prompts(embeds), settings),
                noise,
                settings,
                noise_schedule=checkpoint.noise_schedule,
                image_latents=latents,
                generator=torch.Generator().manual_seed(FRESH),
                **named,
            )
            return finished / SCALE

        made[name] = run
    return made


def sigma_sampler(model, words, recipe, latent=None, **changes):
    settings = {
        "latent_image": {"samples": EMPTY} if latent is None else latent,
        "seed": SEED,
        "steps": 20,
        "cfg": 4.5,
        "sampler_name": "dpmpp_2m",
        "schedule": recipe,
        "denoise": 1.0,
        "kv_compression": "off",
        "after_use": "keep",
    }
    made = Sampler.execute(model=model, positive=words, negative=words, **(settings | changes))
    return made.args[0]["samples"]


def sampler_custom(model, words, recipe, latent=None, cfg=1.0, denoise=1.0, **node):
    sigmas, sampler = FewStepRecipe.execute(model, recipe, denoise, **node).args
    latent = {"samples": EMPTY} if latent is None else latent
    custom = nodes_custom_sampler.SamplerCustom
    return custom.execute(model, True, SEED, cfg, words, words, sampler, sigmas, latent).args[0]["samples"]


@pytest.mark.parametrize("name", ["tiny", "v-prediction", "demo"])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_each_recipe_makes_the_engines_latents(folders, models, engines, name, recipe):
    model, words = models[name], folders[name][1]
    expected = engines[name](recipe)
    assert difference(sigma_sampler(model, words, recipe), expected) < 1e-4
    assert difference(sampler_custom(model, words, recipe), expected) < 1e-4


@pytest.mark.parametrize("recipe", ["x0:400:sigma", "ddim:999,500:sigma", "x0:899,300", "lcm-3", "tcd:899,0"])
def test_a_recipe_of_ones_own_makes_the_engines_latents(folders, models, engines, recipe):
    made = sampler_custom(models["tiny"], folders["tiny"][1], "custom", custom_recipe=recipe)
    assert difference(made, engines["tiny"](recipe)) < 1e-4
    linked = sampler_custom(models["tiny"], folders["tiny"][1], recipe)
    assert torch.equal(linked, made)


def test_the_network_sees_unit_noise_and_one_forward_per_step(folders, models):
    calls = []

    def watch(apply_model, arguments):
        scale = 1 / torch.sqrt(1 + arguments["timestep"] ** 2)
        calls.append((len(arguments["input"]), (arguments["input"] * scale[:, None, None, None])))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    watched = models["tiny"].clone()
    watched.set_model_unet_function_wrapper(watch)
    noise = comfy.sample.prepare_noise(EMPTY, SEED)
    sigma_sampler(watched, folders["tiny"][1], "one-step")
    ((rows, seen),) = calls
    assert rows == 1 and difference(seen, noise) < 1e-5
    calls.clear()
    sigma_sampler(watched, folders["tiny"][1], "lcm-4")
    assert [rows for rows, _ in calls] == [1] * 4


def test_one_step_is_ddpms_clean_prediction_at_400(folders, models):
    """As the distilled weights' authors run it: unit noise, timesteps=[400]."""
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(timesteps=[400])
    noise, ((embeds, _),) = comfy.sample.prepare_noise(EMPTY, SEED), folders["tiny"][1]
    network = load_transformer(folders["tiny"][0], dtype=torch.float32)
    with torch.no_grad():
        predicted = network(noise, torch.tensor([400]), embeds, None)
    expected = scheduler.step(predicted, 400, noise).pred_original_sample / SCALE
    assert difference(sigma_sampler(models["tiny"], folders["tiny"][1], "one-step"), expected) < 1e-4


@pytest.mark.parametrize("recipe", ["phased-4", "four-step", "lcm-4", "tcd-4"])
def test_a_picture_starts_at_the_last_steps(folders, models, engines, recipe):
    latent, words = {"samples": GIVEN}, folders["tiny"][1]
    expected = engines["tiny"](recipe, GIVEN, strength=0.5)
    assert difference(sigma_sampler(models["tiny"], words, recipe, latent, denoise=0.5), expected) < 1e-4
    assert difference(sampler_custom(models["tiny"], words, recipe, latent, denoise=0.5), expected) < 1e-4
    kept = sigma_sampler(models["tiny"], words, recipe, latent, denoise=0.0)
    assert torch.equal(kept, GIVEN)


def test_a_mask_keeps_what_is_not_painted(folders, models):
    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[..., :64] = 1
    latent = {"samples": GIVEN, "noise_mask": mask}
    for recipe in ("one-step", "phased-4", "lcm-4", "tcd-4"):
        painted = sigma_sampler(models["tiny"], folders["tiny"][1], recipe, latent)
        assert difference(painted[..., 10:], GIVEN[..., 10:]) < 1e-4 < difference(painted, GIVEN)


def test_the_advanced_sampler_with_its_unguided_guider(folders, models):
    words, custom = folders["tiny"][1], nodes_custom_sampler
    sigmas, sampler = FewStepRecipe.execute(models["tiny"], "lcm-4", 1.0).args
    noise = custom.RandomNoise.execute(SEED).args[0]
    guider = custom.BasicGuider.execute(models["tiny"], words).args[0]
    run = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, {"samples": EMPTY})
    assert torch.equal(run.args[0]["samples"], sampler_custom(models["tiny"], words, "lcm-4"))


def test_half_of_the_sigmas_in_another_sampler_is_that_half(folders, models):
    """Split: the first half with one node of the host, the second with another, is the whole."""
    words, custom = folders["tiny"][1], nodes_custom_sampler
    sigmas, sampler = FewStepRecipe.execute(models["tiny"], "phased-4", 1.0).args
    high, low = custom.SplitSigmas.execute(sigmas, 2).args
    arguments = models["tiny"], True, SEED, 1.0, words, words, sampler
    half = custom.SamplerCustom.execute(*arguments, high, {"samples": EMPTY}).args[0]
    whole = custom.SamplerCustom.execute(models["tiny"], False, SEED, *arguments[3:], low, half).args[0]
    assert difference(whole["samples"], sampler_custom(models["tiny"], words, "phased-4")) < 1e-4


def test_what_people_do_wrong_is_explained(folders, models, tmp_path):
    model, words = models["tiny"], folders["tiny"][1]
    with pytest.raises(SigmaError, match="cfg is 4.5, and a few-step recipe .* Set cfg to 1"):
        sampler_custom(model, words, "phased-4", cfg=4.5)
    with pytest.raises(SigmaError, match="sampler is that of Σ Few-Step Recipe"):
        sampler_custom(set_speed(model, "auto"), words, "lcm-8")
    with pytest.raises(SigmaError, match="schedule is lcm-8, of few steps"):
        sigma_sampler(model, words, "lcm-8", speed="every other step")
    with pytest.raises(SigmaError, match="custom_recipe is empty"):
        sampler_custom(model, words, "custom")
    with pytest.raises(SigmaError, match="recipe is 'fast'; choose one-step"):
        sampler_custom(model, words, "custom", custom_recipe="fast")
    with pytest.raises(SigmaError, match="denoise is 0.5; of the 1 steps of one-step it leaves none"):
        sigma_sampler(model, words, "one-step", {"samples": GIVEN}, denoise=0.5)
    (zero,) = ModelSamplingDiscrete().patch(model, "v_prediction", True)
    assert FewStepRecipe.execute(zero, "phased-4", 1.0).args[0][0] > 1000


def test_a_flow_is_refused_by_name(folders, tmp_path):
    folder = tmp_path / "flow"
    (folder / "transformer").mkdir(parents=True)
    weights = folders["tiny"][0]
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").symlink_to(weights)
    DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    with pytest.raises(SigmaError, match="recipe is phased-4; the checkpoint has prediction_type flow"):
        FewStepRecipe.execute(load_model(folder), "phased-4", 1.0)


def test_every_input_and_output_has_a_tooltip():
    info = FewStepRecipe.GET_NODE_INFO_V1()
    inputs = info["input"]["required"] | info["input"]["optional"]
    assert all(options["tooltip"] for _, options in inputs.values()) and all(info["output_tooltips"])
