"""Steps that are forecast, in every sampler of the real host, on our MODEL and on the host's own."""

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import DualCFGGuider, RandomNoise, SamplerCustom, SamplerCustomAdvanced
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNegGuider
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from pack.nodes.host.sampling import reference_sigmas
from pack.nodes.host.speed import is_set, set_speed
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.host.transformer import load_model
from pack.nodes.sampling import Sampler
from pack.nodes.speed import PRESETS, Speed
from pack.nodes.text import encode
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.prompt_embeds import Prompts
from pack.pixart_sigma.sampling.denoise import denoise
from pack.pixart_sigma.sampling.guidance import guide
from pack.pixart_sigma.settings import Settings
from pack.pixart_sigma.speed import parse
from pack.pixart_sigma.transformer import calibrated_speed
from pack.pixart_sigma.transformer.calibration import Calibration, Choice, Point, calibration_path
from pack.pixart_sigma.transformer.loading import load_transformer
from random_models import conditioning, difference, normal, transformer
from safetensors.torch import save_file

import nodes as host_nodes

EVERY_OTHER = PRESETS["every other step"]
STEPS = 12
# A random network's clean latents go any way from step to step, the demo's as a trained one's do.
SIZE = (12, 16)


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO, dtype="fp32")


@pytest.fixture(scope="module")
def words():
    """What a picture shows, and what it is to avoid."""
    clip = load_clip(DEMO, "fp32", "auto")
    return tuple(encode(clip, text, False) for text in ("a red circle on a white background", ""))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny_1024.safetensors"
    save_file(transformer(2, 2, 64).state_dict(), path)
    return load_model(path)


def sample(model, words, speed="off", **changes):
    """Latents by Σ Sampler."""
    settings = {
        "latent_image": {"samples": torch.zeros(1, 4, *SIZE)},
        "seed": 0,
        "steps": STEPS,
        "cfg": 4.5,
        "sampler_name": "dpmpp_2m",
        "schedule": "reference",
        "denoise": 1.0,
        "kv_compression": "off",
        "after_use": "keep",
    }
    positive, negative = words
    made = Sampler.execute(model, positive, negative, speed=speed, **(settings | changes))
    return made.args[0]["samples"]


def custom(model, words, sigmas, sampler_name="euler", samples=None, cfg=4.5):
    """Latents by the host's SamplerCustom."""
    latent = {"samples": torch.zeros(1, 4, *SIZE) if samples is None else samples}
    sampler = comfy.samplers.sampler_object(sampler_name)
    return SamplerCustom.execute(model, True, 0, cfg, *words, sampler, sigmas, latent).args[0]["samples"]


def count_calls(model):
    """A clone of the model, and how many pictures each call of its network is for."""
    calls = []
    model = model.clone()

    def count(executor, x, *arguments, **named):
        calls.append(len(x))
        return executor(x, *arguments, **named)

    model.add_wrapper(WrappersMP.APPLY_MODEL, count)
    return model, calls


def far(one, other):
    """The relative L2 distance from `other`."""
    assert one.isfinite().all() and other.isfinite().all()
    return float((one - other).norm() / other.norm())


def test_runs_are_those_of_the_engine(demo, words):
    network = load_transformer(DEMO)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, *SIZE), 0)
    prompts = Prompts(words[0][0][0], negative_embeds=words[1][0][0])
    plain, sigmas = sample(demo, words), reference_sigmas(demo, STEPS)
    for spelling in (
        EVERY_OTHER,
        "forecast:2:2:20-90%",
        "guidance:1:2",
        "guidance:0:1+forecast:1:1",
        "unguided:50-100%",
    ):
        for cfg in (4.5, 1.0):
            settings = Settings(
                width=8 * SIZE[1], height=8 * SIZE[0], steps=STEPS, guidance_scale=cfg, speed=spelling
            )
            expected = denoise(guide(network, prompts, settings), noise, settings) / 0.13025
            counted, calls = count_calls(demo)
            made = sample(counted, words, spelling, cfg=cfg)
            assert far(made, expected) < 1e-4, (spelling, cfg)
            assert sum(calls) < 2 * STEPS if cfg > 1 else len(calls) <= STEPS
            if cfg > 1:
                assert far(made, plain) > 1e-3, spelling
            theirs = custom(set_speed(demo, spelling), words, sigmas, "dpmpp_2m", cfg=cfg)
            assert difference(theirs, made) == 0


def test_it_is_exactly_off(demo, words):
    plain = sample(demo, words)
    on = Speed.execute(demo, "every third step").args[0]
    off = Speed.execute(on, "off").args[0]
    assert is_set(on) and not is_set(off) and not is_set(demo)
    assert off.model_options == demo.model_options
    wrapped = [{kind for kind, kept in model.wrappers.items() if kept} for model in (off, demo)]
    assert wrapped[0] == wrapped[1]
    for model in (demo, off):
        assert difference(sample(model, words), plain) == 0
    assert far(sample(on, words), plain) > 1e-3


def test_our_sampler_leaves_what_the_node_has_set(demo, words):
    third = Speed.execute(demo, "every third step").args[0]
    expected = sample(third, words)
    other = sample(demo, words, "every other step")
    assert far(other, expected) > 1e-3
    assert difference(sample(third, words, "auto"), expected) == 0
    assert difference(sample(third, words, "every other step"), other) == 0
    assert difference(sample(Speed.execute(third, "custom", f" {EVERY_OTHER} ").args[0], words), other) == 0
    assert difference(sample(Speed.execute(third, EVERY_OTHER).args[0], words), other) == 0, "a link"
    with pytest.raises(SigmaError, match="custom_speed is empty"):
        Speed.execute(demo, "custom", " ")


# How far from the run without forecasts these may end, which bear them less well than all others.
FARTHER = dict.fromkeys(
    (
        "dpmpp_sde",
        "dpmpp_sde_gpu",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "lcm",
    ),
    0.6,
)


@pytest.mark.parametrize("name", comfy.samplers.KSampler.SAMPLERS)
def test_every_sampler_forecasts(demo, words, name):
    counted, calls = count_calls(demo)
    plain = sample(counted, words, sampler_name=name)
    computed = len(calls)
    made = sample(counted, words, EVERY_OTHER, sampler_name=name)
    assert len(calls) - computed <= 0.7 * computed
    assert 0 < far(made, plain) < FARTHER.get(name, 0.25)


def test_parts_of_a_schedule_and_of_a_picture(demo, words):
    given = sample(demo, words)
    counted, calls = count_calls(demo)
    changed = {"latent_image": {"samples": given}, "denoise": 0.6, "seed": 5}
    plain = sample(counted, words, **changed)
    computed = len(calls)
    assert 0 < far(sample(counted, words, EVERY_OTHER, **changed), plain) < 0.05
    assert len(calls) - computed < 0.7 * computed

    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[..., : 4 * SIZE[1]] = 1
    painted = sample(demo, words, EVERY_OTHER, latent_image={"samples": given, "noise_mask": mask}, seed=7)
    kept = slice(SIZE[1] // 2 + 2, None)
    assert difference(painted[..., kept], given[..., kept]) < 1e-4 < far(painted, given)


def test_a_batch_is_its_pictures_one_by_one(demo, words):
    latents = torch.zeros(2, 4, *SIZE)
    both = sample(demo, words, EVERY_OTHER, latent_image={"samples": latents})
    noise = comfy.sample.prepare_noise(latents, 0)
    sigmas, sampler = reference_sigmas(demo, STEPS), comfy.samplers.sampler_object("dpmpp_2m")
    fast = set_speed(demo, EVERY_OTHER)
    for index in range(2):
        one = slice(index, index + 1)
        alone = comfy.sample.sample_custom(
            fast, noise[one], 4.5, sampler, sigmas, *words, latents[one], seed=0
        )
        assert difference(both[one], alone) < 1e-4


def test_windows_of_a_batch_have_pasts_of_their_own(demo, words):
    """Windows without overlap, in which each picture is drawn as in the whole batch."""
    latents = normal(4, 4, *SIZE, seed=3)
    fast, sigmas = set_speed(demo, EVERY_OTHER), reference_sigmas(demo, STEPS)
    expected = custom(fast, words, sigmas, samples=latents)
    windows = ContextWindowsManualNode.execute(
        fast, 2, 0, "standard_static", 1, False, "flat", 0, False, causal_window_fix=False
    ).args[0]
    counted, calls = count_calls(windows)
    assert difference(custom(counted, words, sigmas, samples=latents), expected) < 1e-3
    assert len(calls) == 2 * 7 and set(calls) == {4}


def test_no_run_knows_of_another(demo, words):
    fast, third = set_speed(demo, EVERY_OTHER), set_speed(demo, PRESETS["every third step"])
    first = sample(fast, words)
    sample(third, words, seed=3)
    assert difference(sample(fast, words), first) == 0
    assert difference(sample(fast.clone(), words), first) == 0

    def stop(executor, x, *arguments, **named):
        stopping.append(1)
        if len(stopping) == 4:
            management.interrupt_current_processing()
        return executor(x, *arguments, **named)

    stopping = []
    stopped = fast.clone()
    stopped.add_wrapper(WrappersMP.APPLY_MODEL, stop)
    with pytest.raises(management.InterruptProcessingException):
        sample(stopped, words)
    assert len(stopping) == 4
    assert difference(sample(fast, words), first) == 0
    assert difference(sample(stopped, words), first) == 0


def test_prompts_that_run_in_turn_make_the_same(demo, words, monkeypatch):
    counted, calls = count_calls(demo)
    together = sample(counted, words, EVERY_OTHER)
    assert set(calls) == {2}
    calls.clear()
    monkeypatch.setattr(demo.model, "memory_required", lambda *arguments, **named: 1e30)
    assert difference(sample(counted, words, EVERY_OTHER), together) < 1e-4
    assert set(calls) == {1}


def test_the_hosts_own_model_forecasts_alike(tmp_path):
    """Its positions are those of 1024-class sizes: 1440 x 96 pixels are one."""
    path = tmp_path / "wide_1024.safetensors"
    save_file(transformer(16, 1, 4096).state_dict(), path)
    prompts = conditioning(20, 4096, seed=1), conditioning(20, 4096, seed=2)
    made = []
    for model in (load_model(path), comfy.sd.load_diffusion_model(str(path))):
        counted, calls = count_calls(model)
        latent = {"samples": torch.zeros(1, 4, 180, 12)}
        made.append(sample(counted, prompts, "forecast:1:1", latent_image=latent, steps=5))
        assert len(calls) == 3
        node = Speed.execute(counted, "forecast:1:1").args[0]
        assert difference(sample(node, prompts, latent_image=latent, steps=5), made[-1]) == 0
    assert difference(*made) < 1e-4


def test_two_step_caches_are_refused(demo, words):
    for cache, name in ((EasyCacheNode, "EasyCache"), (LazyCacheNode, "LazyCache")):
        cached = cache.execute(demo, 0.2, 0.15, 0.95, False).args[0]
        with pytest.raises(SigmaError, match=f"{name} are both on this MODEL.*Take one of them out"):
            Speed.execute(cached, "auto")
        with pytest.raises(SigmaError, match="are both on this MODEL"):
            sample(cached, words, "auto")
        assert not is_set(Speed.execute(cached, "off").args[0])
        both = cache.execute(set_speed(demo, "auto"), 0.2, 0.15, 0.95, False).args[0]
        with pytest.raises(SigmaError, match="are both on this MODEL"):
            custom(both, words, reference_sigmas(demo, STEPS))


def test_what_can_not_work_is_known_at_the_node(demo, words):
    with pytest.raises(SigmaError, match="Speed 'forecast:1' is not understood"):
        Speed.execute(demo, "forecast:1")
    with pytest.raises(SigmaError, match="is not understood"):
        sample(demo, words, "quick")

    class Other:
        model = type("Flux", (), {"diffusion_model": object()})()

    with pytest.raises(SigmaError, match="Σ Speed is for PixArt-Sigma, and this MODEL is a Flux"):
        Speed.execute(Other(), "auto")


def test_a_few_steps_are_all_computed(demo, words):
    """Of part of a picture, or by auto; of a whole one it is said that there is nothing to forecast from."""
    sigmas = reference_sigmas(demo, STEPS)
    fast = set_speed(demo, "forecast:0:1")
    with pytest.raises(SigmaError, match="in a run of 4 steps there is nothing to forecast from"):
        custom(fast, words, reference_sigmas(demo, 4))
    given = normal(1, 4, *SIZE, seed=3)
    auto = set_speed(demo, "auto")
    for model, levels, samples in (
        (auto, reference_sigmas(demo, 4), None),
        (fast, sigmas[:5], None),
        (fast, sigmas[-5:], given),
    ):
        counted, calls = count_calls(model)
        made = custom(counted, words, levels, samples=samples)
        assert len(calls) == 4
        assert difference(made, custom(demo, words, levels, samples=samples)) == 0
    counted, calls = count_calls(fast)
    custom(counted, words, sigmas[-6:], samples=given)
    assert len(calls) == 3


def between(positive, start, end):
    return host_nodes.ConditioningSetTimestepRange().set_range(positive, start, end)[0]


def test_nothing_is_forecast_across_a_change_of_the_prompt(tiny):
    """The steps of the second prompt are those of a run in which it has been so all along, begun there."""
    first, second = conditioning(5, 64, seed=1), conditioning(5, 64, seed=2)
    negative = conditioning(4, 64, seed=3)
    sigmas = reference_sigmas(tiny, STEPS)
    # from the eighth step on, which would be forecast
    scheduled, steps = between(first, 0.0, 0.54) + between(second, 0.54, 1.0), 7
    fast = set_speed(tiny, "forecast:0:1")
    counted, calls = count_calls(fast)
    made = custom(counted, (scheduled, negative), sigmas)
    half = custom(fast, (first, negative), sigmas[: steps + 1])
    sampler = comfy.samplers.sampler_object("euler")
    rest = SamplerCustom.execute(
        fast, False, 0, 4.5, second, negative, sampler, sigmas[steps:], {"samples": half}
    ).args[0]["samples"]
    assert difference(made, rest) < 1e-4
    plain = custom(tiny, (scheduled, negative), sigmas)
    assert len(calls) == 4 + 3 and far(made, plain) > 1e-3


def test_guidance_that_asks_again_in_a_step_has_a_past_of_its_own(demo, words):
    """A weak one, which ends in the middle of the run, changes nothing of what comes after it in a step."""
    sigmas, setting = reference_sigmas(demo, STEPS), "forecast:1:1"
    perturbed = PerturbedAttentionGuidance.execute(demo, 3.0).args[0]
    weak = SkipLayerGuidanceDiT.execute(demo, 1e-6, 0.0, 0.5, "2", "").args[0]
    both = PerturbedAttentionGuidance.execute(weak, 3.0).args[0]
    expected = custom(set_speed(perturbed, setting), words, sigmas)
    counted, calls = count_calls(set_speed(both, setting))
    assert difference(custom(counted, words, sigmas), expected) < 1e-3
    assert sum(calls) < 0.7 * (3 * STEPS + STEPS // 2)
    # this one asks for the prompts in turn, up to the middle of the run
    simple = SkipLayerGuidanceDiTSimple.execute(demo, 0.0, 0.5, "2", "").args[0]
    made = custom(set_speed(simple, setting), words, sigmas)
    assert 0 < far(made, custom(simple, words, sigmas)) < 0.3


def test_guiders_of_three_prompts_forecast_each(demo, words):
    positive, negative = words
    empty = conditioning(3, positive[0][0].shape[-1], seed=4)
    sigmas, noise = reference_sigmas(demo, STEPS), RandomNoise.execute(0).args[0]
    sampler, latent = comfy.samplers.sampler_object("euler"), {"samples": torch.zeros(1, 4, *SIZE)}
    for make in (
        lambda model: PerpNegGuider.execute(model, positive, negative, empty, 4.5, 1.0),
        lambda model: DualCFGGuider.execute(model, positive, empty, negative, 3.0, 2.0, "regular"),
    ):

        def run(model, make=make):
            guider = make(model).args[0]
            return SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]

        counted, calls = count_calls(demo)
        plain = run(counted)
        assert sum(calls) == 3 * STEPS
        calls.clear()
        assert 0 < far(run(set_speed(counted, EVERY_OTHER)), plain) < 0.2
        assert sum(calls) < 2.4 * STEPS
        # these have no prompt that can go without the others
        assert difference(run(set_speed(demo, "unguided+guidance:0:3")), plain) == 0


def test_what_is_not_finite_is_not_forecast(demo, words):
    calls = []

    def break_once(executor, x, *arguments, **named):
        calls.append(len(x))
        return executor(x, *arguments, **named) * (float("nan") if len(calls) == 5 else 1.0)

    broken = set_speed(demo, "forecast:1:1")
    broken.add_wrapper(WrappersMP.APPLY_MODEL, break_once)
    with pytest.raises(SigmaError, match="are not finite"):
        sample(broken, words)
    assert len(calls) == 5 + 4, "from the broken step on each one is computed"


def test_auto_does_what_was_measured(tmp_path, words, caplog):
    path = tmp_path / "demo_256.safetensors"
    save_file(load_model(DEMO, dtype="fp32").state_dict_for_saving(), path)
    model = load_model(path)
    fast = Speed.execute(model, "auto").args[0]
    calibrated_speed._say_not_measured.cache_clear()  # it says so once
    cautious = sample(fast, words)
    assert "was not measured" in caplog.text
    assert difference(cautious, sample(model, words, EVERY_OTHER)) == 0

    measured = Point("speed", Choice(savings=parse("forecast:1:2:10-95%")), 0.01, 0.5, 0.5)
    calibration = Calibration(
        rules=(),
        error=0.0,
        budget=0.05,
        saved=0.0,
        width=256,
        height=256,
        steps=STEPS,
        prompts=("a red circle",),
        errors={},
        fingerprint=model.model.fingerprint,
        speed_in_place=measured,
        points=(measured,),
    )
    calibration.save(calibration_path(model.model.checkpoint_path))
    made = sample(fast, words)
    assert difference(made, sample(model, words, "every third step")) == 0 < far(made, cautious)
