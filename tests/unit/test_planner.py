"""What a plan says a stage needs, against what it then uses; and which way it chooses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixart_sigma import DEMO, ControlPicture
from pixart_sigma.cli.commands import main
from pixart_sigma.errors import SigmaError
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.planner import Models, Plan
from pixart_sigma.planner import plan as make_plan
from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.config import XL_2
from pixart_sigma.transformer.controlnet_file import build_controlnet
from pixart_sigma.vae.loading import SDXL_VAE, build_vae

GB = 10**9


def plan(budget, width, height, models, guidance_scale=4.5, **settings) -> Plan:
    """Of exactly this size."""
    asked = Settings(width=width, height=height, binning=False, guidance_scale=guidance_scale)
    return make_plan(asked, Ways(budget=budget), models, **settings)


def measured(**ways) -> Ways:
    return Ways(device="cpu", measure=True, **ways)


@pytest.fixture(scope="module")
def published():
    return Models.published()


@pytest.mark.parametrize("size, count", [((256, 256), 1), ((512, 320), 2)])
def test_a_run_uses_what_its_plan_says(size, count):
    pipeline = SigmaPipeline.from_path("demo", measured())
    settings = Settings(width=size[0], height=size[1], count=count, steps=1)
    made = pipeline.plan(settings, measured(budget=GB))
    pipeline.generate(replace(settings, prompt="red " * 400, negative="blue " * 400), made.ways)
    for name in ("transformer", "VAE decode"):
        cost = pipeline.stages.costs[name]
        assert cost.peak - cost.before == pytest.approx(made.stages[name].peak, rel=0.1), name
        assert cost.weights == pytest.approx(made.stages[name].weights, rel=0.02)


@pytest.fixture
def edges(tmp_path_factory):
    """Folders of ControlNets for the demo, of three and of two layers."""
    demo, folders = inspect(DEMO).config, []
    for layers in (3, 2):
        made = build_controlnet(replace(demo, num_layers=layers, kv_compression=None)).state_dict()
        folders.append(tmp_path_factory.mktemp("controlnet"))
        weights = {name: torch.zeros(weight.shape) for name, weight in made.items()}
        save_file(weights, folders[-1] / "diffusion_pytorch_model.safetensors")
        (folders[-1] / "config.json").write_text('{"num_attention_heads": 6}')
    return folders


def test_controlnets_use_what_their_plan_says(edges):
    pipeline = SigmaPipeline.from_path("demo", measured())
    settings = Settings("a red circle", width=256, height=256, steps=1)
    picture = torch.rand(3, 256, 256)
    made = pipeline.plan(settings, measured(budget=GB), controlnets=edges)
    pipeline.generate(settings, made.ways, controls=[ControlPicture(folder, picture) for folder in edges])
    for name in ("VAE encode", "transformer"):
        cost = pipeline.stages.costs[name]
        assert cost.peak - cost.before == pytest.approx(made.stages[name].peak, rel=0.1), name
    files = [folder / "diffusion_pytorch_model.safetensors" for folder in edges]
    weights = sum(file.stat().st_size for file in files) + pipeline.stages.costs["transformer"].weights
    assert made.stages["transformer"].weights == pytest.approx(weights, rel=0.02)


def test_pictures_that_are_given_are_planned(edges, tmp_path, capsys):
    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu", budget=80e6))
    settings, picture = Settings("a red circle"), torch.rand(3, 256, 256)
    assert "VAE encode" not in pipeline.plan(settings).stages
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    for given in ({"controls": [ControlPicture(edges[0], picture)]}, {"image": picture}):
        with pytest.raises(SigmaError, match="too small for the VAE encode of 256x256"):
            pipeline.generate(settings, **given)
    for given in (["--control", edges[0], "--control-image"], ["--image"]):
        options = [*given, tmp_path / "black.png", "--budget", "80MB", "--out", tmp_path / "picture.png"]
        assert main(["generate", "a red circle", *map(str, options)]) == 2
        assert "too small for the VAE encode of 256x256" in capsys.readouterr().err


def test_t5_uses_what_its_plan_says():
    pipeline = SigmaPipeline.from_path("demo", measured())
    pipeline.encode_prompts(Settings("red " * 400))
    cost = pipeline.stages.costs["text encoder"]
    planned = pipeline.plan(Settings(), measured(budget=GB)).stages["text encoder"]
    assert cost.peak - cost.before == pytest.approx(planned.peak, rel=0.1)
    assert cost.weights == pytest.approx(planned.weights, rel=0.02)


def test_strips_use_what_their_plan_says():
    pipeline = SigmaPipeline.from_path("demo", measured())
    made = pipeline.plan(Settings(), measured(budget=100e6))
    planned = made.stages["VAE decode"].peak
    assert made.ways.decode == "strips" and planned <= 100e6
    result = pipeline.generate(Settings("a red circle", width=256, height=256, steps=1), made.ways)
    cost = pipeline.stages.costs["VAE decode"]
    assert cost.peak - cost.before == pytest.approx(planned, rel=0.1)
    whole = SigmaPipeline.from_path("demo", Ways(device="cpu")).generate(
        Settings("a red circle", width=256, height=256, steps=1)
    )
    difference = np.asarray(result.images[0]).astype(int) - np.asarray(whole.images[0])
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    "budget, size, precision, place, decode",
    [
        (24, 1024, "bf16", "auto", "whole"),
        (8, 1024, "int8", "auto", "whole"),
        (8, 4096, "int8", "auto", "strips"),
        (1.6, 1024, "bf16", "stream", "strips"),
        (2, 2048, "bf16", "stream", "strips"),
        (4, 4096, "bf16", "stream", "strips"),
    ],
)
def test_the_published_model_fits(published, budget, size, precision, place, decode):
    made = plan(budget * GB, size, size, models=published)
    assert (made.ways.t5_precision, made.ways.t5_device, made.ways.decode) == (precision, place, decode)
    assert made.peak <= budget * GB
    assert made.ways.transformer_device == "auto"
    assert made.stages["transformer"].weights == pytest.approx(1.22 * GB, rel=0.01)
    for name, stage in made.stages.items():
        assert stage.weights <= stage.peak
        assert name in made.table() and stage.how in made.table()


def test_in_float16_the_vae_is_planned_as_it_decodes(published):
    def decode(dtype):
        return plan(24 * GB, 1024, 1024, models=published, dtype=dtype).stages["VAE decode"]

    assert decode(torch.float16) == decode(torch.float32)
    assert decode(torch.bfloat16).peak == pytest.approx(decode(torch.float32).peak / 2, rel=0.01)


def test_prompt_and_negative_take_turns_where_both_do_not_fit(published):
    made = plan(2.5 * GB, 4096, 4096, models=published)
    assert made.ways.guidance_in_turn and "in turn" in made.why
    assert not plan(2.5 * GB, 4096, 4096, models=published, guidance_scale=1).ways.guidance_in_turn


def test_a_controlnet_of_real_width_is_planned_beside_the_transformer(published):
    controlled = replace(published, controlnets=(replace(XL_2, num_layers=13),))
    plain, beside = (plan(6 * GB, 1024, 1024, models=models).stages for models in (published, controlled))
    added = beside["transformer"].weights - plain["transformer"].weights
    assert added == pytest.approx(0.59 * GB, rel=0.01)
    streamed = make_plan(
        Settings(width=1024, height=1024, binning=False),
        Ways(budget=2 * GB, transformer_device="stream"),
        controlled,
    ).stages["transformer"]
    assert streamed.how.endswith("streamed") and streamed.weights > added
    with pytest.raises(SigmaError, match="too small for the VAE encode of 2048x2048 pixels"):
        plan(2 * GB, 2048, 2048, models=controlled)


def test_a_budget_that_nothing_keeps_is_named_with_what_would(published):
    with pytest.raises(SigmaError, match="too small for the transformer of 1024x1024 pixels, .* at least"):
        plan(0.2 * GB, 1024, 1024, models=published)
    with pytest.raises(SigmaError, match="too small for the VAE decode of 512x512 pixels"):
        plan(60e6, 512, 512, models=demo_with_a_large_vae())
    for budget in (0, -1, float("nan")):
        with pytest.raises(SigmaError, match="give more than 0"):
            plan(budget, 1024, 1024, models=published)


def demo_with_a_large_vae() -> Models:
    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu"))
    found = pipeline.components
    models = Models.read(found.checkpoint, found.text_encoder, found.vae)
    return replace(models, vae=build_vae(SDXL_VAE))


def test_guidance_in_turn_gives_the_same_latents_in_half_batches():
    sizes = []

    def model(latents, timestep, embeds, mask, kv_compression=None):
        sizes.append(len(latents))
        return latents * 0.1 + embeds.mean(dim=(1, 2))[:, None, None, None]

    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    positive, negative = torch.randn(2, 5, 8), torch.randn(1, 3, 8)
    settings, prompts = Settings(steps=3), Prompts(positive, negative_embeds=negative)
    together = denoise(guide(model, prompts, settings), noise, settings)
    assert sizes == [4] * 3
    sizes.clear()
    in_turn = guide(model, prompts, settings, in_turn=True)
    torch.testing.assert_close(denoise(in_turn, noise, settings), together)
    assert sizes == [2] * 6


def test_a_stage_that_runs_out_of_memory_runs_again_in_a_smaller_way(monkeypatch, caplog):
    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu"))
    expected = pipeline.generate(
        Settings("a red circle", width=64, height=64, steps=2, scheduler="euler_ancestral")
    )
    load = pipeline.transformer.load
    together = []

    def load_small(place):
        transformer = load(place)
        forward = transformer.forward

        def refuse_pairs(latents, *arguments, **settings):
            if len(latents) > 1:
                together.append(len(latents))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(latents, *arguments, **settings)

        transformer.forward = refuse_pairs
        return transformer

    monkeypatch.setattr(pipeline.transformer, "load", load_small)
    actual = pipeline.generate(
        Settings("a red circle", width=64, height=64, steps=2, scheduler="euler_ancestral")
    )
    assert together == [2] and "runs again: prompt and negative prompt in turn" in caplog.text
    torch.testing.assert_close(actual.latents, expected.latents, rtol=1e-2, atol=5e-3)

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(pipeline.transformer, "load", fails)
    with pytest.raises(SigmaError, match="Memory ran out in the transformer. Close other programs"):
        pipeline.generate(Settings("a red circle", width=64, height=64, steps=1))
    assert not pipeline.stages._held


def test_t5_is_streamed_or_goes_to_the_cpu_where_the_device_is_full(monkeypatch, caplog):
    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu"))
    expected = pipeline.encode_prompts(Settings("a red circle"))
    load = pipeline.text.load
    pipeline.text.device = torch.device("cuda")  # as far as choosing goes
    places = []

    def full(precision, place):
        places.append(place)
        if place != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load(precision, place)

    monkeypatch.setattr(pipeline.text, "load", full)
    actual = pipeline.encode_prompts(Settings("a red circle"))
    assert places == ["auto", "stream", "cpu"] and "runs again: T5 in fp32, streamed" in caplog.text
    assert torch.equal(actual.positive, expected.positive)
    places.clear()
    pipeline.encode_prompts(Settings("a red circle"), Ways(device="cpu", t5_device="stream"))
    assert places == ["stream", "cpu"]
    with pytest.raises(SigmaError, match="choose one of auto, cpu, stream"):
        SigmaPipeline.from_path("demo", Ways(device="cpu", t5_device="gpu"))


def test_the_command(capsys):
    assert main(["plan", "--budget", "2GB", "--size", "2048x2048", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert "kv_compression" not in made  # which a plan does not choose
    assert made["peak"] <= 2 * GB and set(made["stages"]) == {"text encoder", "transformer", "VAE decode"}
    assert main(["plan", "--budget", "500MB", "--size", "256x256", "--model", "demo"]) == 0
    assert "T5 in" in capsys.readouterr().out
    for arguments, words in (
        (["--budget", "0"], "no size"),
        (["--budget", "2 parsecs"], "no size"),
        (["--budget", "100MB"], "too small"),
        (["--budget", "2GB", "--size", "9000x9000"], "9000"),
        (
            ["--budget", "2GB", "--count", "0"],
            "--count is 0; give a whole number of pictures, from 1",
        ),
    ):
        assert main(["plan", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_generate_keeps_a_budget(tmp_path, capsys):
    picture, report = tmp_path / "picture.png", tmp_path / "report.json"
    arguments = ["a red circle", "--steps", "2", "--out", str(picture), "--budget", "100MB"]
    assert main(["generate", *arguments, "--memory-report", str(report)]) == 0
    assert picture.is_file() and "in strips" in capsys.readouterr().err
    figures = json.loads(report.read_text())
    stages = figures["stages"]
    assert figures["budget"] == 100e6
    assert all(cost["peak"] - cost["before"] < 100e6 * 1.1 for cost in stages.values())
    assert main(["generate", *arguments, "--decode", "whole"]) == 2
    assert "it plans the decode too" in capsys.readouterr().err


def test_a_plan_is_for_the_size_that_is_made():
    pipeline = SigmaPipeline.from_path("demo", measured())
    large = Settings(width=1024, height=1024)
    binned = pipeline.plan(large, measured(budget=GB))
    assert (binned.width, binned.height) == (256, 256)
    exact = pipeline.plan(replace(large, binning=False), measured(budget=GB))
    assert (exact.width, exact.height) == (1024, 1024)
    assert exact.stages["VAE decode"].peak > 2 * binned.stages["VAE decode"].peak


def test_a_budget_is_kept_without_binning(tmp_path, capsys):
    """Where the whole decode of the trained size would keep it, and that of the exact size would not."""
    report = tmp_path / "report.json"
    arguments = ["a red circle", "--size", "512x512", "--no-binning", "--steps", "1", "--budget", "300MB"]
    arguments += ["--out", str(tmp_path / "picture.png"), "--memory-report", str(report)]
    assert main(["generate", *arguments]) == 0
    stages = json.loads(report.read_text())["stages"]
    assert all(cost["peak"] - cost["before"] < 300e6 * 1.1 for cost in stages.values()), stages


def test_what_cannot_be_planned_is_named(published):
    with pytest.raises(SigmaError, match="T5 in nf4 cannot be streamed"):
        make_plan(Settings(), Ways(budget=GB, t5_precision="nf4", t5_device="stream"), published)
    with pytest.raises(SigmaError, match="give more than 0 bytes"):
        make_plan(Settings(), Ways(), published)
