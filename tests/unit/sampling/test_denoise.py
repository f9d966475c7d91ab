"""The denoising loop against diffusers' own pipeline, and against arithmetic that needs no pipeline."""

import inspect
import json
import math
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel, StableDiffusionInpaintPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart_sigma.choices import SCHEDULERS
from pixart_sigma.errors import CheckpointError, SettingError, SigmaError
from pixart_sigma.noise_schedule import (
    CLASS_DEFAULTS,
    FLOW_CLASSES,
    UNCHANGED,
    NoiseSchedule,
)
from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling import denoise as loop
from pixart_sigma.sampling.few_step import GAMMA
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.sampling.noise import get_noise
from pixart_sigma.sampling.predictions import predict_clean
from pixart_sigma.sampling.schedulers import get_timesteps, make_scheduler
from pixart_sigma.settings import Settings
from pixart_sigma.transformer import network as engine
from pixart_sigma.transformer.config import TransformerConfig
from pixart_sigma.transformer.network import build_transformer

# diffusers' schedulers hand tensors to numpy in ways that numpy 2 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CAPTION = 12
REFERENCE_TOKENS = 300
# What the pipeline's users write for each name, from the published scheduler_config.json.
PUBLISHED_CONFIG = diffusers.DPMSolverMultistepScheduler(
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    prediction_type="epsilon",
    timestep_spacing="linspace",
    solver_order=2,
).config
REFERENCE = {
    "dpmpp_2m": lambda config=PUBLISHED_CONFIG: diffusers.DPMSolverMultistepScheduler.from_config(config),
    "sa_solver": lambda config=PUBLISHED_CONFIG: diffusers.SASolverScheduler.from_config(
        config,
        algorithm_type="data_prediction",
        tau_func=lambda t: 1 if 200 <= t <= 800 else 0,
        predictor_order=2,
        corrector_order=2,
    ),
    "euler": lambda config=PUBLISHED_CONFIG: diffusers.EulerDiscreteScheduler.from_config(config),
    "euler_ancestral": lambda config=PUBLISHED_CONFIG: diffusers.EulerAncestralDiscreteScheduler.from_config(
        config
    ),
    "ddim": lambda config=PUBLISHED_CONFIG: diffusers.DDIMScheduler.from_config(config, clip_sample=False),
    "unipc": lambda config=PUBLISHED_CONFIG: diffusers.UniPCMultistepScheduler.from_config(config),
    "lcm": lambda config=PUBLISHED_CONFIG: diffusers.LCMScheduler.from_config(config),
    "one_step": lambda config=PUBLISHED_CONFIG: diffusers.DDPMScheduler.from_config(
        config, clip_sample=False
    ),
}


def make_config(heads=2, head_dim=16, layers=2, sample_size=32, caption=CAPTION):
    return TransformerConfig(
        sample_size=sample_size,
        interpolation_scale=sample_size / 64,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        caption_channels=caption,
        cross_attention_dim=heads * head_dim,
        qk_norm=False,
        kv_compression=None,
    )


def make_pair(scale=0.15):
    """Our transformer and diffusers' with the same weights."""
    config = make_config()
    ours = build_transformer(config)
    generator = torch.Generator().manual_seed(7)
    weights = {k: torch.randn(v.shape, generator=generator) * scale for k, v in ours.state_dict().items()}
    ours.load_state_dict(weights, assign=True)
    reference = PixArtTransformer2DModel(**config.to_diffusers())
    reference.load_state_dict(weights)
    return ours.eval().requires_grad_(False), reference.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair():
    return make_pair()


def embeddings(tokens, seed, count=1, channels=CAPTION):
    return torch.randn(count, tokens, channels, generator=torch.Generator().manual_seed(seed))


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
EMBEDS = embeddings(5, 1)
NAN = float("nan")


def padded(embeds):
    """As the reference has them: 300 tokens and an int64 mask; what the padding holds must not matter."""
    count, tokens, channels = embeds.shape
    filler = embeddings(REFERENCE_TOKENS - tokens, 99, count, channels)
    mask = (torch.arange(REFERENCE_TOKENS) < tokens).long().expand(count, -1)
    return torch.cat([embeds, filler], dim=1), mask


def run_reference(reference, scheduler, noise, positive, negative=None, **settings):
    pipe = PixArtSigmaPipeline(None, None, None, reference, scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompt_embeds, prompt_mask = padded(positive)
    negative_embeds, negative_mask = (None, None) if negative is None else padded(negative)
    return pipe(
        negative_prompt=None,
        latents=noise,
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        prompt_embeds=prompt_embeds,
        prompt_attention_mask=prompt_mask,
        negative_prompt_embeds=negative_embeds,
        negative_prompt_attention_mask=negative_mask,
        output_type="latent",
        use_resolution_binning=False,
        **settings,
    ).images


def denoise(transformer, noise, *prompts, scheduler="dpmpp_2m", callback=None, **settings):
    """A run from noise and `Prompts`; those of the settings that are not in `Settings` go elsewhere."""
    named = ("image_latents", "mask", "generator", "noise_schedule")
    beside = {name: settings.pop(name) for name in named if name in settings}
    named = ("prompt_mask", "negative_embeds", "negative_mask")
    embeds = Prompts(*prompts, **{name: settings.pop(name) for name in named if name in settings})
    if not isinstance(scheduler, str):
        beside["scheduler"], scheduler = scheduler, "dpmpp_2m"
    settings = Settings(scheduler=scheduler, **settings)
    return loop.denoise(guide(transformer, embeds, settings), noise, settings, callback=callback, **beside)


def assert_equal(ours, reference):
    assert reference.isfinite().all()
    assert float((ours - reference).norm() / reference.norm()) <= 1e-4


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


# Parity with the reference pipeline


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (22, 10)], ids=str)
@pytest.mark.parametrize("guidance_scale, negative_tokens", [(4.5, 1), (4.5, 14), (1.0, None), (0.0, None)])
def test_published_settings_equal_the_pipeline(pair, size, guidance_scale, negative_tokens):
    ours, reference = pair
    noise = torch.randn(1, 4, *size, generator=seeded())
    positive = embeddings(9, 1)
    negative = None if negative_tokens is None else embeddings(negative_tokens, 2)
    settings = {"guidance_scale": guidance_scale}
    expected = run_reference(
        reference, REFERENCE["dpmpp_2m"](), noise, positive, negative, num_inference_steps=20, **settings
    )
    assert_equal(denoise(ours, noise, positive, negative_embeds=negative, **settings), expected)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_every_scheduler_equals_the_pipeline(pair, name, guidance_scale):
    ours, reference = pair
    noise = torch.randn(2, 4, 8, 12, generator=seeded())
    positive, negative = embeddings(7, 1, 2), embeddings(3, 2, 2)
    schedule = {"timesteps": [400]} if name == "one_step" else {"num_inference_steps": 20}
    eta = 0.5 if name == "ddim" else 0.0
    expected = run_reference(
        reference,
        REFERENCE[name](),
        noise,
        positive,
        negative,
        guidance_scale=guidance_scale,
        generator=seeded(),
        eta=eta,
        **schedule,
    )
    actual = denoise(
        ours,
        noise,
        positive,
        negative_embeds=negative,
        scheduler=name,
        guidance_scale=guidance_scale,
        generator=seeded(),
        eta=eta,
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize(
    "name", sorted({scheduler.name for scheduler in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"})
)
def test_a_scheduler_object_equals_the_pipeline(pair, name):
    ours, reference = pair
    kind = getattr(diffusers, name)
    settings = {"clip_sample": False} if "DDIM" in name or "DDPM" in name else {}
    if name == "DPMSolverSDEScheduler":
        # It draws its own noise, not the generator's.
        settings = {"noise_sampler_seed": 0}
    try:
        scheduler, other = (kind.from_config(PUBLISHED_CONFIG, **settings) for _ in range(2))
    except ImportError as error:
        pytest.skip(f"{name} needs a package that is not installed: {error}")
    noise, positive, negative = (
        torch.randn(1, 4, 8, 8, generator=seeded()),
        embeddings(5, 1),
        embeddings(2, 2),
    )
    expected = run_reference(
        reference, other, noise, positive, negative, num_inference_steps=4, generator=seeded()
    )
    actual = denoise(
        ours,
        noise,
        positive,
        negative_embeds=negative,
        scheduler=scheduler,
        steps=4,
        guidance_scale=4.5,
        generator=seeded(),
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize(
    "name, schedule",
    [
        ("dpmpp_2m", {"timesteps": [999, 800, 500, 420, 100, 3]}),
        ("euler", {"timesteps": [999, 640, 320, 0]}),
        ("euler", {"sigmas": [100.0, 20.0, 5.0, 1.0, 0.2, 0.0]}),
        ("lcm", {"timesteps": [999, 759, 499, 259]}),
        ("one_step", {"timesteps": [600, 300]}),
    ],
)
def test_own_timesteps_and_sigmas_equal_the_pipeline(pair, name, schedule):
    ours, reference = pair
    noise, positive, negative = (
        torch.randn(1, 4, 8, 8, generator=seeded()),
        embeddings(5, 1),
        embeddings(2, 2),
    )
    expected = run_reference(
        reference, REFERENCE[name](), noise, positive, negative, generator=seeded(), **schedule
    )
    actual = denoise(
        ours,
        noise,
        positive,
        negative_embeds=negative,
        scheduler=name,
        guidance_scale=4.5,
        generator=seeded(),
        **schedule,
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize(
    "recipe, kind, schedule",
    [
        ("one-step", partial(diffusers.DDPMScheduler, clip_sample=False), {"timesteps": [400]}),
        ("x0:599", partial(diffusers.DDPMScheduler, clip_sample=False), {"timesteps": [599]}),
        (
            "ddim:999,749,499,249",
            partial(diffusers.DDIMScheduler, clip_sample=False),
            {"num_inference_steps": 4},
        ),
        ("lcm-4", diffusers.LCMScheduler, {"num_inference_steps": 4}),
        ("lcm:899,500", diffusers.LCMScheduler, {"timesteps": [899, 500]}),
        ("tcd-4", diffusers.TCDScheduler, {"num_inference_steps": 4}),
        ("tcd-1", diffusers.TCDScheduler, {"num_inference_steps": 1}),
    ],
    ids=str,
)
def test_a_recipe_equals_the_pipeline_with_its_scheduler(pair, recipe, kind, schedule):
    ours, reference = pair
    noise, positive = torch.randn(2, 4, 8, 12, generator=seeded()), embeddings(7, 1, 2)
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = kind(**betas, timestep_spacing="trailing")
    eta = {"eta": GAMMA} if recipe.startswith("tcd") else {}
    beside = {"guidance_scale": 1, "generator": seeded()}
    expected = run_reference(reference, scheduler, noise, positive, **beside, **schedule, **eta)
    actual = denoise(ours, noise, positive, recipe=recipe, generator=seeded())
    assert_equal(actual, expected)


def test_a_batch_of_prompts_of_several_lengths(pair):
    ours, reference = pair
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    rows, lengths = embeddings(9, 1, 2), (4, 9)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    negative = embeddings(1, 2)
    together = denoise(ours, noise, rows, mask, negative, steps=5)
    for index, length in enumerate(lengths):
        alone = noise[index : index + 1], rows[index : index + 1, :length], negative
        expected = run_reference(reference, REFERENCE["dpmpp_2m"](), *alone, num_inference_steps=5)
        assert_equal(together[index : index + 1], expected)


def test_embeddings_padded_as_the_reference_pads_them_are_trimmed(pair):
    ours, _ = pair
    noise, positive, negative = (
        torch.randn(1, 4, 8, 8, generator=seeded()),
        embeddings(6, 1),
        embeddings(2, 2),
    )
    seen = []

    def spy(latents, timestep, embeds, mask):
        seen.append((tuple(embeds.shape), mask is None))
        return ours(latents, timestep, embeds, mask)

    trimmed = denoise(spy, noise, positive, None, negative, steps=3)
    full, mask = padded(positive)
    assert_equal(denoise(spy, noise, full, mask, *padded(negative), steps=3), trimmed)
    assert set(seen) == {((2, 6, CAPTION), False)}
    seen.clear()
    denoise(spy, noise, full, mask, steps=1, guidance_scale=1)
    assert seen == [((1, 6, CAPTION), True)]


# The noise schedules of other checkpoints: what their folder's scheduler_config.json says

OTHER_SCHEDULES = {
    "v-prediction": partial(diffusers.DPMSolverMultistepScheduler, prediction_type="v_prediction"),
    "sample": partial(diffusers.DPMSolverMultistepScheduler, prediction_type="sample"),
    "scaled-linear": partial(
        diffusers.DPMSolverMultistepScheduler,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    ),
    "cosine": partial(diffusers.DPMSolverMultistepScheduler, beta_schedule="squaredcos_cap_v2"),
    "betas": partial(
        diffusers.DPMSolverMultistepScheduler, trained_betas=np.linspace(1e-3, 0.01, 1000).tolist()
    ),
    "zero-SNR": partial(diffusers.DPMSolverMultistepScheduler, rescale_betas_zero_snr=True),
    "karras": partial(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "exponential": partial(diffusers.DPMSolverMultistepScheduler, use_exponential_sigmas=True),
    "beta": partial(diffusers.DPMSolverMultistepScheduler, use_beta_sigmas=True),
    "lu": partial(diffusers.DPMSolverMultistepScheduler, use_lu_lambdas=True),
    "trailing": partial(
        diffusers.EulerDiscreteScheduler, timestep_spacing="trailing", final_sigmas_type="sigma_min"
    ),
    "leading": partial(diffusers.DDIMScheduler, steps_offset=1, clip_sample=False),
    # As a 900M finetune is published.
    "finetune": partial(
        diffusers.EulerDiscreteScheduler,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "flow": partial(
        diffusers.DPMSolverMultistepScheduler,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    ),
}
# Which of our schedulers a schedule has to be refused to.
ALL = set(SCHEDULERS)
SIGMA_SPACED = ALL - {"euler_ancestral", "ddim"}
CAN_RUN = {
    "cosine": ALL - {"euler_ancestral"},
    "sample": ALL - {"euler_ancestral"},
    "zero-SNR": ALL - {"sa_solver", "ddim", "lcm", "one_step"},
    "finetune": ALL - {"sa_solver"},
    "karras": SIGMA_SPACED,
    "exponential": SIGMA_SPACED,
    "beta": SIGMA_SPACED,
    "lu": {"dpmpp_2m", "lcm", "one_step"},
    "flow": {"dpmpp_2m", "sa_solver", "unipc"},
}


def written(scheduler, tmp_path) -> dict:
    """The scheduler_config.json that diffusers writes."""
    scheduler.save_pretrained(tmp_path)
    return json.loads((tmp_path / "scheduler_config.json").read_text())


@pytest.mark.parametrize("kind", OTHER_SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_noise_schedule_equals_the_pipeline_or_is_refused(pair, tmp_path, kind, name):
    ours, reference = pair
    if kind == "beta":
        pytest.importorskip("scipy", reason="diffusers needs scipy for beta sigmas")
    config = written(OTHER_SCHEDULES[kind](), tmp_path)
    noise_schedule = NoiseSchedule.from_config(config, "its config")
    if name not in CAN_RUN.get(kind, ALL):
        with pytest.raises(
            SettingError, match=f"scheduler is {name}; the checkpoint asks for .*; use dpmpp_2m"
        ):
            make_scheduler(name, noise_schedule)
        return
    noise, positive = torch.randn(1, 4, 8, 8, generator=seeded()), embeddings(5, 1)
    expected = run_reference(
        reference,
        REFERENCE[name](config),
        noise,
        positive,
        embeddings(2, 2),
        generator=seeded(),
        **({"timesteps": [400]} if name == "one_step" else {"num_inference_steps": 4}),
    )
    actual = denoise(
        ours,
        noise,
        positive,
        negative_embeds=embeddings(2, 2),
        scheduler=name,
        noise_schedule=noise_schedule,
        steps=4,
        guidance_scale=4.5,
        generator=seeded(),
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_scheduler_object_may_predict_something_else(pair, prediction):
    ours, reference = pair
    noise, positive = torch.randn(1, 4, 8, 8, generator=seeded()), embeddings(5, 1)
    schedulers = [diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False) for _ in range(2)]
    expected = run_reference(
        reference, schedulers[0], noise, positive, guidance_scale=1, num_inference_steps=4
    )
    assert_equal(denoise(ours, noise, positive, scheduler=schedulers[1], steps=4, guidance_scale=1), expected)


def test_own_timesteps_take_the_place_of_the_checkpoints_spacing(pair):
    ours, _ = pair
    noise, own = torch.randn(1, 4, 8, 8, generator=seeded()), {"timesteps": [999, 500, 100]}
    plain = denoise(ours, noise, EMBEDS, guidance_scale=1, **own)
    spaced = NoiseSchedule(sigma_spacing="karras")
    assert torch.equal(denoise(ours, noise, EMBEDS, guidance_scale=1, noise_schedule=spaced, **own), plain)
    with pytest.raises(SettingError, match="timesteps is .*the checkpoint's flow schedule takes none"):
        flow = NoiseSchedule("flow_prediction")
        denoise(ours, noise, EMBEDS, guidance_scale=1, noise_schedule=flow, **own)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_predicted_latents_of_other_predictions_are_the_schedulers_own(name, zero, prediction):
    scheduler = getattr(diffusers, name)(
        prediction_type=prediction, rescale_betas_zero_snr=zero, timestep_spacing="trailing"
    )
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(4)
    latents, predicted = (torch.randn(1, 4, 4, 4, generator=seeded(index)) for index in (1, 2))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        step = scheduler.step(predicted, timestep, latents)
        torch.testing.assert_close(
            predict_clean(scheduler, scaled, predicted, timestep),
            step.pred_original_sample,
            rtol=1e-3,
            atol=1e-3,
        )
        latents = step.prev_sample


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_what_a_config_leaves_out_is_as_its_class_has_it(name):
    parameters = inspect.signature(getattr(diffusers, name)).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    schedule = NoiseSchedule.from_config({"_class_name": name}, "its config")
    if name in FLOW_CLASSES:
        assert schedule == NoiseSchedule("flow_prediction")
        return
    found = schedule.as_config()
    assert {key: found[key] for key in found.keys() & defaults} == {
        key: defaults[key] for key in found.keys() & defaults
    }
    assert all(defaults.get(key, only) == only for key, only in UNCHANGED.items())


def test_a_flow_match_config_is_a_flow(tmp_path):
    config = written(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), tmp_path)
    found = NoiseSchedule.from_config(config, "its config")
    assert found == NoiseSchedule("flow_prediction", flow_shift=3.0)
    assert found.source == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"prediction_type": "score"}, "prediction_type is 'score'; choose one of epsilon, v_prediction"),
        ({"prediction_type": ["epsilon"]}, "prediction_type is"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"beta_end": 2}, "beta_end is 2"),
        ({"beta_start": "0.1"}, "beta_start is 0.1"),
        ({"trained_betas": [0.1] * 999}, "trained_betas is"),
        ({"trained_betas": [NAN] * 1000}, "trained_betas is"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500; PixArt-Sigma runs with 1000 only"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "at most one of them"),
        ({"use_karras_sigmas": "yes"}, "at most one of them"),
        ({"thresholding": True}, "thresholding True; PixArt-Sigma runs with False only"),
        ({"sigma_max": 80}, "sigma_max 80"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction.*use_flow_sigmas False, which contradict"),
        ({"use_flow_sigmas": True}, "'epsilon' with use_flow_sigmas True, which contradict"),
        (
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True},
            "karras contradicts it",
        ),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 0}, "flow_shift is 0"),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name 'EDMEulerScheduler'.*not known here"),
        ({"_class_name": ["a"]}, "not known here"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting True",
        ),
    ],
    ids=str,
)
def test_what_can_not_be_obeyed_is_named(config, message):
    with pytest.raises(CheckpointError, match=f"^its config.*{message}"):
        NoiseSchedule.from_config(config, "its config")


# img2img


@pytest.mark.parametrize(
    "name", ["dpmpp_2m", "sa_solver", "euler", "euler_ancestral", "ddim", "unipc", "lcm"]
)
@pytest.mark.parametrize("strength", [0.15, 0.6, 1.0])
def test_image_to_image_equals_a_loop_written_by_hand(pair, name, strength):
    ours, reference = pair
    generator = seeded()
    image, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    positive, steps = embeddings(5, 1, 2), 10
    scheduler = REFERENCE[name]()
    scheduler.set_timesteps(steps)
    start = steps - min(int(steps * strength), steps)
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    latents = scheduler.add_noise(image, noise, timesteps[:1].repeat(2))
    stochastic = {} if name in ("dpmpp_2m", "unipc") else {"generator": seeded(5)}
    for timestep in timesteps:
        predicted = reference(
            scheduler.scale_model_input(latents, timestep),
            encoder_hidden_states=positive,
            timestep=timestep.expand(2),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]
        latents = scheduler.step(predicted, timestep, latents, **stochastic).prev_sample
    actual = denoise(
        ours,
        noise,
        positive,
        scheduler=name,
        steps=steps,
        guidance_scale=1,
        strength=strength,
        image_latents=image,
        generator=seeded(5),
    )
    assert_equal(actual, latents)


class SineModel(ModelMixin, ConfigMixin):
    """A model of 4 channels, as StableDiffusionInpaintPipeline takes them."""

    @register_to_config
    def __init__(self, in_channels=4, time_cond_proj_dim=None, sample_size=8):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1,), 0.5))

    def forward(self, latents, timestep, *_, **__):
        return (torch.sin(3 * latents) * self.scale + timestep / 2000,)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("name", ["dpmpp_2m", "euler", "euler_ancestral", "ddim", "unipc", "lcm"])
def test_a_mask_equals_diffusers_inpainting(name):
    model = SineModel().requires_grad_(False)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=4,
    )
    beside = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionInpaintPipeline(
        vae=vae, unet=model, scheduler=REFERENCE[name](), requires_safety_checker=False, **beside
    )
    pipe.set_progress_bar_config(disable=True)
    image = torch.randn(1, 4, 8, 8, generator=seeded(1))
    cells = (torch.rand(1, 1, 8, 8, generator=seeded(2)) > 0.5).float()
    expected = pipe(
        prompt_embeds=torch.zeros(1, 2, 8),
        image=image,
        mask_image=cells.repeat_interleave(8, 2).repeat_interleave(8, 3),
        masked_image_latents=image,
        height=64,
        width=64,
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=1,
        generator=seeded(5),
        output_type="latent",
    ).images
    generator = seeded(5)
    noise = get_noise(1, 64, 64, generator)
    actual = loop.denoise(
        lambda latents, timestep: model(latents, timestep)[0],
        noise,
        Settings(scheduler=name, steps=10, strength=0.6),
        image_latents=image,
        mask=cells,
        generator=generator,
    )
    assert_equal(actual, expected)
    kept = cells.expand_as(image) == 0
    assert torch.equal(actual[kept], image[kept]) and not torch.allclose(actual[~kept], image[~kept])


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_mask_equals_a_loop_written_by_hand(pair, strength):
    """Also a mask of greys, which mixes, and one for each picture."""
    ours, _ = pair
    image, noise = (torch.randn(2, 4, 8, 8, generator=seeded(seed)) for seed in (1, 2))
    mask, positive = torch.rand(2, 1, 8, 8, generator=seeded(3)), embeddings(5, 1, 2)
    scheduler = REFERENCE["ddim"]()
    scheduler.set_timesteps(6)
    timesteps = scheduler.timesteps[6 - int(6 * strength) :]
    latents = scheduler.add_noise(image, noise, timesteps[:1].repeat(2))
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        latents = scheduler.step(ours(latents, timestep, positive, None), timestep, latents).prev_sample
        share = 1.0 if following is None else scheduler.alphas_cumprod[int(following)]
        kept = share**0.5 * image + (1 - share) ** 0.5 * noise
        latents = mask * latents + (1 - mask) * kept
    beside = {"image_latents": image, "mask": mask, "strength": strength, "guidance_scale": 1}
    assert_equal(denoise(ours, noise, positive, scheduler="ddim", steps=6, **beside), latents)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_white_mask_is_none_and_a_black_one_keeps_everything(pair, name):
    image, noise = (torch.randn(1, 4, 8, 8, generator=seeded(seed)) for seed in (1, 2))

    def run(mask):
        beside = {"image_latents": image, "generator": seeded(4), "guidance_scale": 1}
        return denoise(pair[0], noise, EMBEDS, scheduler=name, steps=3, mask=mask, **beside)

    assert torch.equal(run(torch.ones(1, 1, 8, 8)), run(None))
    assert torch.equal(run(torch.zeros(1, 1, 8, 8)), image)


# Arithmetic that needs no other pipeline: for normally distributed latents the best prediction is known.


def gaussian_model(deviation=0.8):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    sigmas = [math.sqrt((1 - a) / a) for a in torch.cumprod(1 - betas, 0).tolist()]

    def predict(latents, timestep, embeds, mask=None, kv_compression=None):
        low = int(timestep)
        sigma = sigmas[low] + (float(timestep) - low) * (sigmas[min(low + 1, 999)] - sigmas[low])
        alpha = 1 / (1 + sigma**2)
        return latents * math.sqrt(1 - alpha) / (alpha * deviation**2 + 1 - alpha)

    return predict, sigmas


@pytest.mark.parametrize(
    "name, tolerance", [("dpmpp_2m", 0.01), ("unipc", 0.01), ("euler", 0.06), ("ddim", 0.06)]
)
def test_deterministic_schedulers_solve_the_probability_flow(name, tolerance):
    deviation = 0.8
    model, sigmas = gaussian_model(deviation)
    noise = torch.randn(1, 4, 16, 16, generator=seeded())
    alpha = 1 / (1 + sigmas[999] ** 2)
    exact = noise * deviation / math.sqrt(alpha * deviation**2 + 1 - alpha)
    actual = denoise(model, noise, torch.zeros(1, 1, 4), scheduler=name, steps=50, guidance_scale=1)
    assert float((actual - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize(
    "name, steps",
    [(name, steps) for name in SCHEDULERS for steps in (1, 2, 3)] + [("dpmpp_2m", 999), ("lcm", 999)],
)
def test_every_step_count_works(name, steps):
    model, _ = gaussian_model()
    settings = {"scheduler": name, "steps": steps, "guidance_scale": 1, "generator": seeded()}
    arguments = (model, torch.randn(1, 4, 2, 2, generator=seeded()), torch.zeros(1, 1, 4))
    if name == "lcm" and steps > 50:
        with pytest.raises(SigmaError, match="999"):
            denoise(*arguments, **settings)
    else:
        assert denoise(*arguments, **settings).isfinite().all()


def test_one_step_is_the_clean_prediction_at_400_without_guidance():
    model, sigmas = gaussian_model()
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    alpha = 1 / (1 + sigmas[400] ** 2)
    predicted = model(noise, 400, None)
    expected = (noise - math.sqrt(1 - alpha) * predicted) / math.sqrt(alpha)
    steps = []
    actual = denoise(model, noise, torch.zeros(1, 1, 4), scheduler="one_step", callback=steps.append)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert [(step.index, step.count, step.timestep) for step in steps] == [(0, 1, 400)]


# Callback, dtype, interrupts


@pytest.mark.parametrize("name", ["euler", "ddim", "lcm", "one_step"])
def test_predicted_latents_are_the_schedulers_own(name):
    model, _ = gaussian_model()
    scheduler = make_scheduler(name)
    expected = []
    original = scheduler.step

    def step(noise, timestep, sample, eta=0.0, generator=None, return_dict=False):
        result = original(noise, timestep, sample, generator=generator, return_dict=True)
        if name == "lcm":
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
            expected.append((result.denoised - c_skip * sample) / c_out)
        else:
            expected.append(result.pred_original_sample)
        return (result.prev_sample,)

    scheduler.step = (
        step if name != "euler" else lambda n, t, s, generator=None, return_dict=False: step(n, t, s)
    )
    seen = []
    schedule = {"timesteps": [400]} if name == "one_step" else {"steps": 7}
    denoise(
        model,
        torch.randn(1, 4, 4, 4, generator=seeded()),
        torch.zeros(1, 1, 4),
        scheduler=scheduler,
        guidance_scale=1,
        callback=lambda step: seen.append(step.predicted),
        **schedule,
    )
    assert len(seen) == len(expected)
    for actual, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


def test_callback_sees_each_step_and_false_stops(pair):
    ours, _ = pair
    noise, positive = torch.randn(1, 4, 8, 8, generator=seeded()), embeddings(5, 1)
    steps = []
    whole = denoise(ours, noise, positive, steps=4, guidance_scale=1, callback=steps.append)
    assert [(step.index, step.count) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [step.timestep for step in steps] == make_steps("dpmpp_2m", 4)
    assert torch.equal(steps[-1].latents, whole)
    assert torch.equal(whole, denoise(ours, noise, positive, steps=4, guidance_scale=1))

    def stop(step):
        return False if step.index == 1 else 0

    stopped = denoise(ours, noise, positive, steps=4, guidance_scale=1, callback=stop)
    assert torch.equal(stopped, steps[1].latents)


def make_steps(name, steps):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(steps)
    return [float(timestep) for timestep in scheduler.timesteps]


def test_an_interrupt_passes_through(pair):
    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(
            pair[0],
            torch.randn(1, 4, 8, 8, generator=seeded()),
            embeddings(5, 1),
            guidance_scale=1,
            callback=interrupt,
        )


def test_half_precision_keeps_its_dtype_and_full_precision_between_steps():
    model, _ = gaussian_model()
    seen = []

    def half(latents, *arguments, **settings):
        seen.append(latents.dtype)
        return model(latents, *arguments, **settings)

    steps = []
    noise = torch.randn(1, 4, 4, 4, generator=seeded()).bfloat16()
    embeds = torch.zeros(1, 1, 4, dtype=torch.bfloat16)
    result = denoise(half, noise, embeds, steps=3, guidance_scale=1, callback=steps.append)
    assert result.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16}
    assert steps[-1].latents.dtype == torch.float32


# Noise and timesteps


@pytest.mark.parametrize("count, height, width", [(1, 256, 256), (3, 208, 304), (2, 16, 16)])
def test_noise_equals_what_diffusers_draws(count, height, width):
    expected = randn_tensor((count, 4, height // 8, width // 8), generator=seeded(11), dtype=torch.float32)
    assert torch.equal(get_noise(count, height, width, 11), expected)
    assert torch.equal(get_noise(count, height, width, seeded(11)), expected)


@pytest.mark.parametrize("height, width", [(64, 64), (264, 200), (8, 8)])
def test_the_first_picture_does_not_depend_on_the_count(height, width):
    assert torch.equal(get_noise(4, height, width, 5)[:1], get_noise(1, height, width, 5))


def test_published_timesteps():
    timesteps = get_timesteps(make_scheduler("dpmpp_2m"), Settings()).tolist()
    assert timesteps[:4] == [999, 949, 899, 849] and timesteps[-2:] == [100, 50] and len(timesteps) == 20
    assert get_timesteps(make_scheduler("dpmpp_2m"), Settings(strength=0.3)).tolist() == timesteps[14:]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_settings_are_those_of_the_published_noise_schedule(name):
    ours, reference = make_scheduler(name), REFERENCE[name]()
    assert torch.equal(ours.alphas_cumprod, reference.alphas_cumprod)
    internal = {"_use_default_values", "tau_func"}
    assert {k: v for k, v in ours.config.items() if k not in internal} == {
        k: v for k, v in reference.config.items() if k in ours.config and k not in internal
    }


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 1000}, "steps is 1000"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"guidance_scale": NAN}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": "4"}, "guidance_scale is 4"),
        ({"guidance_scale": 4.5}, "negative_embeds"),
        ({"guidance_scale": None}, "negative_embeds"),
        ({"strength": 0.0, "image_latents": NOISE}, "strength is 0.0"),
        ({"strength": 1.2, "image_latents": NOISE}, "strength is 1.2"),
        ({"strength": NAN, "image_latents": NOISE}, "strength is nan"),
        ({"strength": 0.01, "image_latents": NOISE}, "strength is 0.01; of 20 steps"),
        ({"strength": 0.5}, "no image_latents"),
        ({"image_latents": NOISE[..., :4]}, r"\(2, 4, 8, 4\)"),
        ({"image_latents": NOISE * NAN}, "image_latents hold NaN"),
        ({"image_latents": [NOISE]}, "image_latents must be a tensor of floats .* not a list"),
        ({"mask": NOISE[:, :1]}, "image_latents are kept, and there are none"),
        ({"image_latents": NOISE, "mask": NOISE}, r"\(1 or 2, 1, 8, 8\), not torch.float32 \(2, 4, 8, 8\)"),
        ({"image_latents": NOISE, "mask": "mask.png"}, "not a str"),
        ({"image_latents": NOISE, "mask": torch.ones(1, 1, 8, 8) * 255}, "from 0, where .* to 1"),
        ({"image_latents": NOISE, "mask": torch.ones(1, 1, 8, 8) * NAN}, "from 0, where .* to 1"),
        ({"generator": 7}, r"generator is 7; give a torch.Generator"),
        ({"generator": [seeded(), 7]}, "generator is 7"),
        ({"scheduler": "dpm"}, "scheduler is 'dpm'"),
        ({"scheduler": diffusers.LCMScheduler(), "recipe": "lcm-4"}, "lcm-4; a scheduler is given too"),
        ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "FlowMatchEulerDiscreteScheduler"),
        ({"scheduler": diffusers.EDMEulerScheduler()}, "EDMEulerScheduler"),
        ({"scheduler": "ddim", "timesteps": [999, 500]}, "the scheduler ddim takes none"),
        ({"scheduler": "sa_solver", "timesteps": [999, 500]}, "the scheduler sa_solver takes none"),
        ({"sigmas": [10.0, 0.0]}, "the scheduler dpmpp_2m takes none; use euler"),
        ({"scheduler": "unipc", "sigmas": [10.0, 0.0]}, "the scheduler unipc takes none"),
        ({"scheduler": "euler", "sigmas": [1.0], "timesteps": [1]}, "timesteps are given too"),
        ({"timesteps": []}, r"timesteps is \[\]"),
        ({"timesteps": [500, 999]}, r"timesteps is \[500, 999\]"),
        ({"timesteps": [500, 500]}, r"timesteps is \[500, 500\]"),
        ({"timesteps": [1000, 500]}, r"timesteps is \[1000, 500\]"),
        ({"timesteps": [500, -1]}, r"timesteps is \[500, -1\]"),
        ({"timesteps": [500.5]}, r"timesteps is \[500.5\]"),
        ({"scheduler": "euler", "sigmas": []}, r"sigmas is \[\]"),
        ({"scheduler": "euler", "sigmas": [NAN, 0]}, r"sigmas is \[nan, 0\]"),
        ({"scheduler": "euler", "sigmas": [1.0, 2.0]}, r"sigmas is \[1.0, 2.0\]"),
        ({"eta": 0.5}, "eta is 0.5"),
        ({"scheduler": "ddim", "eta": 2.0}, "eta is 2.0"),
        ({"generator": [seeded()]}, "1 generators for 2 pictures"),
        ({"negative_embeds": embeddings(5, 1, channels=8), "guidance_scale": 2}, "12 channels.*8"),
        ({"prompt_mask": torch.zeros(1, 5)}, "leaves no token"),
        ({"prompt_mask": torch.ones(1, 4)}, r"\(1, 5\), not \(1, 4\)"),
    ],
    ids=lambda given: given if isinstance(given, str) else ", ".join(given),
)
def test_bad_settings_are_named(pair, settings, message):
    settings = {"guidance_scale": 1} | settings
    with pytest.raises(SigmaError, match=message):
        denoise(pair[0], NOISE, EMBEDS, **settings)


@pytest.mark.parametrize(
    "latents, embeds, message",
    [
        (NOISE * NAN, EMBEDS, "latents hold NaN"),
        (NOISE[0], EMBEDS, r"\(4, 8, 8\)"),
        (NOISE.long(), EMBEDS, "int64"),
        (None, EMBEDS, "latents must be a tensor of floats .* not a NoneType"),
        (NOISE, EMBEDS[..., :7], "7"),
        (NOISE, embeddings(5, 1, 3), r"\(3, 5, 12\)"),
        (NOISE, EMBEDS[:, :0], r"\(1, 0, 12\)"),
        (NOISE, EMBEDS * NAN, "prompt_embeds hold NaN"),
        (NOISE[:, :3], EMBEDS, r"\(2, 3, 8, 8\)"),
    ],
    ids=str,
)
def test_bad_tensors_are_named(pair, latents, embeds, message):
    with pytest.raises(SigmaError, match=message):
        denoise(pair[0], latents, embeds, guidance_scale=1)


def test_latents_that_blow_up_name_the_step(pair):
    calls = []

    def breaks(latents, timestep, *arguments, **settings):
        calls.append(timestep)
        noise = pair[0](latents, timestep, *arguments, **settings)
        return noise * NAN if len(calls) == 3 else noise

    with pytest.raises(SigmaError, match="after step 3 of 20, timestep 899.*bf16"):
        denoise(breaks, NOISE, EMBEDS, guidance_scale=1)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 64, 64, 0), "count is 0"),
        ((1.5, 64, 64, 0), "count is 1.5"),
        ((1, 0, 64, 0), "height is 0"),
        ((1, None, 64, 0), "height is None"),
        ((1, 64, -8, 0), "width is -8"),
        ((1, 64, 64, 2**64), f"seed is {2**64}; give a whole number from 0"),
        ((1, 64, 64, -1), "seed is -1"),
        ((1, 64, 64, None), "seed is None"),
        ((1, 64, 64, 1.5), "seed is 1.5"),
        ((1, 64, 64, "x"), "seed is x"),
        ((1, 64, 64, 0, torch.int64), "dtype is torch.int64"),
        ((1, 64, 64, 0, "float32"), "dtype is 'float32'"),
    ],
)
def test_impossible_noise_is_named(arguments, message):
    with pytest.raises(SigmaError, match=message):
        get_noise(*arguments)


@pytest.mark.parametrize("settings", ["a boat", {"steps": 4}, loop])
def test_what_is_not_settings_is_named(settings):
    with pytest.raises(SigmaError, match="settings is a .*; give Settings"):
        loop.denoise(lambda latents, timestep: latents, NOISE, settings)


@pytest.mark.parametrize("predicted", [None, NOISE[:, :2], (NOISE,)], ids=str)
def test_what_is_not_the_noise_is_named(predicted):
    with pytest.raises(SigmaError, match="predict gave .*; it returns what the model predicts"):
        loop.denoise(lambda latents, timestep: predicted, NOISE)


def test_what_is_not_prompts_nor_a_scheduler_is_named(pair):
    with pytest.raises(SigmaError, match="prompts is a Tensor; give Prompts"):
        guide(pair[0], EMBEDS, Settings())
    with pytest.raises(SigmaError, match="settings is a str"):
        guide(pair[0], Prompts(EMBEDS), "a boat")
    with pytest.raises(SigmaError, match="prompt_embeds must be a tensor .* not a list"):
        guide(pair[0], Prompts([EMBEDS]), Settings())(NOISE, torch.tensor(5))
    with pytest.raises(SigmaError, match=r"belongs into Settings\(scheduler='euler'\)"):
        loop.denoise(lambda latents, timestep: latents, NOISE, scheduler="euler")
    with pytest.raises(SigmaError, match="The device 'toaster' cannot be used"):
        get_noise(1, 64, 64, 0, device="toaster")


# Cost, in counts


def test_positions_are_computed_once_in_a_run(pair, monkeypatch):
    computed = []
    original = engine.get_positions
    monkeypatch.setattr(engine, "get_positions", lambda *grid: computed.append(grid) or original(*grid))
    noise = torch.randn(1, 4, 14, 18, generator=seeded())
    denoise(pair[0], noise, EMBEDS, negative_embeds=EMBEDS[:, :1], steps=3)
    assert len(computed) == 1


@pytest.mark.parametrize("in_turn", [False, True])
def test_prompts_are_projected_once_in_a_run(pair, in_turn):
    projected = []
    transformer = pair[0]
    counting = transformer.caption_projection.register_forward_hook(lambda *call: projected.append(call[2]))
    settings = Settings(steps=3, guidance_scale=4.5)
    prompts = Prompts(EMBEDS, None, EMBEDS[:, :1])
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    made = loop.denoise(guide(transformer, prompts, settings, in_turn), noise, settings)
    counting.remove()
    assert [tokens.shape for tokens in projected] == [(4, EMBEDS.shape[1], 32)]
    in_each_step = loop.denoise(
        guide(lambda *call: transformer(*call), prompts, settings, in_turn), noise, settings
    )
    assert (made - in_each_step).norm() < 1e-5 * in_each_step.norm()


def test_multiply_adds_of_a_step():
    """At the real width, 4 layers, 512 px: on the meta device, where nothing is computed, only counted.

    Torch counts the multiply-adds of attention only where it is made of matrix products: the `math` kernel.
    """
    with torch.device("meta"):
        config = make_config(heads=16, head_dim=72, layers=4, sample_size=128, caption=4096)
        reference = PixArtTransformer2DModel(**config.to_diffusers())
        latents, timestep = torch.empty(2, 4, 64, 64), torch.empty(2)
        few, many = torch.empty(2, 20, 4096), torch.empty(2, REFERENCE_TOKENS, 4096)
        few_mask, many_mask = torch.ones(2, 20, dtype=torch.bool), torch.ones(2, REFERENCE_TOKENS)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counted:
            build_transformer(config)(latents, timestep, few, few_mask)
        with FlopCounterMode(display=False) as counted_reference:
            reference(
                latents,
                encoder_hidden_states=many,
                timestep=timestep,
                encoder_attention_mask=many_mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )
    # Each of 2 rows and 4 layers: scores and sums over 1024 x 1024 pairs of tokens, in 1152 channels.
    attention = 2 * 4 * 2 * 1024 * 1024 * 1152 * 2
    assert counted.get_total_flops() > attention + 2 * 4 * 1024 * 14 * 1152**2 * 2
    assert counted.get_total_flops() <= 0.93 * counted_reference.get_total_flops()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_scheduler_takes_is_what_diffusers_says(name):
    kind, facts = type(make_scheduler(name)), SCHEDULERS[name]
    schedule, step = (inspect.signature(method).parameters for method in (kind.set_timesteps, kind.step))
    assert facts.timesteps == ("timesteps" in schedule)
    # UniPC's are for flow models.
    assert facts.sigmas == ("sigmas" in schedule and name != "unipc")
    assert facts.eta == ("eta" in step)


def test_default_guidance():
    assert Settings(scheduler="one_step").guidance == 1 and Settings().guidance == 4.5
    assert not Settings(scheduler="one_step").guided and Settings(guidance_scale=1.5).guided
