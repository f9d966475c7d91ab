"""A second transformer takes over at a share of the steps."""

import shutil

import pytest
import torch

from pixart_sigma import DEMO, DEMO_KV
from pixart_sigma.cli.commands import main
from pixart_sigma.errors import SettingError, SigmaError
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.memory.stages import Stages
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.sampling.denoise import Unfinished, denoise
from pixart_sigma.sampling.schedulers import make_scheduler
from pixart_sigma.settings import Settings, Ways

PROMPT = "a red circle on a blue background"
CPU = Ways(device="cpu")


@pytest.fixture(scope="module")
def demo():
    return SigmaPipeline.from_path("demo", CPU)


def drawn(pipeline, **settings) -> torch.Tensor:
    return pipeline.generate(Settings(PROMPT, **{"steps": 10} | settings)).latents


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "euler"},
        {"scheduler": "ddim"},
        {"scheduler": "ddim", "eta": 0.7},
        {"scheduler": "euler_ancestral", "seed": 3},
        {"scheduler": "euler", "guidance_scale": 1.0, "count": 2},
    ],
    ids=str,
)
def test_of_the_same_weights_it_is_the_run_of_one(demo, settings):
    """Bit for bit, with a scheduler that remembers no step, fresh noise included."""
    both = drawn(demo.with_refiner("demo"), refiner_start=0.8, **settings)
    assert torch.equal(both, drawn(demo, **settings))


def test_a_scheduler_that_remembers_begins_anew(demo):
    """As diffusers' second pipeline and ComfyUI's SplitSigmas have it: with dpmpp_2m the step after the
    switch is of the first order."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(latents, timestep):
        return latents.sin() + 0.3 * timestep.float() / 999

    settings = Settings(steps=10)
    left = []

    def leave(step):
        left.append(step)
        return step.index < 7

    first = denoise(predict, noise, settings, callback=leave)
    found = denoise(predict, Unfinished(first, noise, 8), settings)

    expected = left[-1].latents
    scheduler = make_scheduler("dpmpp_2m")
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(8)
    for timestep in scheduler.timesteps[8:]:
        expected = scheduler.step(predict(expected, timestep), timestep, expected, return_dict=False)[0]
    assert len(left) == 8 and torch.equal(found, expected)
    assert not torch.equal(found, denoise(predict, noise, settings))
    assert torch.equal(drawn(demo.with_refiner("demo"), refiner_start=0.8), drawn_apart(demo))


def drawn_apart(demo) -> torch.Tensor:
    """The demo's ten steps in two runs by hand."""
    from pixart_sigma.sampling.guidance import guide
    from pixart_sigma.sampling.noise import get_noise

    settings = Settings(PROMPT, steps=10).complete(256)
    prompts = demo.encode_prompts(settings).prompts()
    noise = get_noise(1, 256, 256, torch.Generator().manual_seed(0), torch.float32, "cpu", 4)
    predict = guide(demo.transformer.load("auto"), prompts, settings)
    with torch.inference_mode():
        first = denoise(predict, noise, settings, callback=lambda step: step.index < 7)
        return denoise(predict, Unfinished(first, noise, 8), settings)


def test_each_does_its_steps_and_never_both_are_there(demo, monkeypatch):
    """Of two transformers with other weights; what each step was done by, and what is held then."""
    loaded, held = [], []
    original = Stages.run

    def run(self, name, load, use, **settings):
        def watched(model):
            loaded.append(name)
            held.append(set(self._held))
            return use(model)

        return original(self, name, load, watched, **settings)

    monkeypatch.setattr(Stages, "run", run)
    steps = []
    pipeline = demo.with_refiner("demo-kv")
    settings = Settings(PROMPT, steps=10, refiner_start=0.6, kv_compression="off", scheduler="euler")
    both = pipeline.generate(settings, callback=lambda step: steps.append((step.index, step.count)))
    assert loaded == ["text encoder", "transformer", "refiner", "VAE decode"]
    assert held == [{name} for name in loaded]
    assert steps == [(index, 10) for index in range(10)]
    alone = [
        drawn(SigmaPipeline.from_path("demo", CPU, transformer=name), kv_compression="off", scheduler="euler")
        for name in (DEMO, DEMO_KV)
    ]
    assert not torch.equal(both.latents, alone[0]) and not torch.equal(both.latents, alone[1])


def test_a_callback_ends_the_whole_run(demo):
    for last in (2, 8):
        steps = []

        def stop(step, steps=steps, last=last):
            steps.append(step.index)
            return step.index < last

        pipeline = demo.with_refiner("demo")
        pipeline.generate(Settings(PROMPT, steps=10, refiner_start=0.6), callback=stop)
        assert steps == list(range(last + 1))


def test_a_picture_to_start_from_keeps_the_place_of_the_switch(demo):
    """The share is of the whole schedule, as strength's is."""
    picture = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    settings = Settings(PROMPT, steps=10, strength=0.5, scheduler="euler")
    expected = demo.generate(settings, image=picture).latents
    both = Settings(PROMPT, steps=10, strength=0.5, scheduler="euler", refiner_start=0.8)
    assert torch.equal(demo.with_refiner("demo").generate(both, image=picture).latents, expected)
    with pytest.raises(SettingError, match="all steps would be the refiner's"):
        late = Settings(PROMPT, steps=10, strength=0.2, scheduler="euler", refiner_start=0.8)
        demo.with_refiner("demo").generate(late, image=picture)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"refiner_start": 1.0}, "give a share of the steps above 0 and below 1"),
        ({"refiner_start": "0.8"}, "give a share of the steps"),
        ({"refiner_start": 0.1, "steps": 4}, "it leaves none to one of the two"),
        ({"refiner_start": 0.8, "recipe": "lcm-4"}, "recipe is lcm-4; it is for one transformer"),
        ({"refiner_start": 0.8, "speed": "auto"}, "speed is auto; steps are forecast from one's own"),
        ({"refiner_start": 0.8, "speed": "forecast:1:1"}, "forecast from one's own"),
        (
            {"refiner_start": 0.8, "kv_compression": "auto"},
            "kv_compression is auto; it was measured with one",
        ),
        ({"refiner_start": 0.8, "kv_compression": "a.json"}, "it was measured with one"),
    ],
)
def test_what_is_for_one_transformer_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Settings(**settings)


def test_a_transformer_that_does_not_fit_is_named(demo, pipeline_folder, tmp_path):
    with pytest.raises(SigmaError, match="has caption_channels|has sample_size"):
        demo.with_refiner(pipeline_folder / "transformer")
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(SigmaError, match="has the noise schedule"):
        demo.with_refiner(other)
    with pytest.raises(SettingError, match="no second transformer to take over"):
        drawn(demo, refiner_start=0.8)
    with pytest.raises(SigmaError, match="does not say when"):
        drawn(demo.with_refiner("demo"))


def test_the_command_makes_it_and_makes_it_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    common = ["--device", "cpu", "--quiet"]
    made = [PROMPT, "--steps", "5", "--refiner", "demo-kv:0.6", "--out", str(first)]
    assert main(["generate", *made, *common]) == 0
    said = Metadata.read(first)
    assert said.settings.refiner_start == 0.6 and said.models["refiner"].fingerprint
    assert said.models["refiner"] != said.models["transformer"]
    like = ["generate", "--like", str(first), *common]
    assert main([*like, "--refiner", "demo-kv", "--out", str(again)]) == 0
    assert Metadata.read(again).settings == said.settings
    assert again.read_bytes() == first.read_bytes()
    capsys.readouterr()
    assert main([*like, "--out", str(other)]) != 0
    assert "was made with another refiner" in capsys.readouterr().err
    assert main(["generate", PROMPT, "--steps", "5", "--refiner", "demo-kv:2", *common]) != 0
    assert "--refiner is 2.0; give a share of the steps" in capsys.readouterr().err
