"""ControlNets in whole runs, in Python and in the terminal."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pixart_sigma import ControlPicture, SigmaPipeline
from pixart_sigma.cli.checks import parse_control_image
from pixart_sigma.cli.commands import main
from pixart_sigma.errors import SettingError, SigmaError
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.sampling.noise import get_noise
from pixart_sigma.schedule_part import SchedulePart
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.transformer.config import XL_2
from pixart_sigma.transformer.controlnet import Control, ControlHooks
from pixart_sigma.transformer.controlnet_file import build_controlnet, load_controlnet

SETTINGS = Settings("a boat", width=64, height=96, binning=False, steps=4, count=2, scheduler="euler")
IMAGE = torch.rand(3, 96, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def edges(tmp_path_factory):
    """A ControlNet of one layer for the tiny transformer."""
    config = replace(XL_2, num_layers=1, num_attention_heads=2, cross_attention_dim=144)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: 0.2 * torch.randn(weight.shape, generator=generator)
        for name, weight in build_controlnet(config).state_dict().items()
    }
    path = tmp_path_factory.mktemp("controlnet") / "edges.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    return SigmaPipeline.from_path(pipeline_folder, Ways(device="cpu", dtype="fp32", t5_precision="fp32"))


def by_hand(pipeline, edges, acting):
    """Latents of the run of SETTINGS, controlled at those steps of which acting(index) says the strength."""
    latents = pipeline.vae.encode(IMAGE[None])
    network, controlnet = pipeline.transformer.load("auto"), load_controlnet(edges)
    calls = []

    def controlled(*arguments, **settings):
        strength = acting(len(calls))
        calls.append(strength)
        controls = (Control(controlnet, latents, strength),) if strength else ()
        return network(*arguments, hooks=ControlHooks(controls), **settings)

    embeddings = pipeline.encode_prompts(SETTINGS)
    noise = get_noise(2, 96, 64, torch.Generator().manual_seed(0), torch.float32, torch.device("cpu"), 4)
    return denoise(guide(controlled, embeddings.prompts(), SETTINGS), noise, SETTINGS)


def test_a_run_is_controlled_in_its_part_by_its_strength(pipeline, edges):
    whole = pipeline.generate(SETTINGS, controls=[ControlPicture(edges, IMAGE)])
    assert torch.allclose(whole.latents, by_hand(pipeline, edges, lambda step: 1.0), atol=1e-5)
    plain = pipeline.generate(SETTINGS)
    assert not torch.allclose(whole.latents, plain.latents, atol=1e-2)
    part = ControlPicture(edges, IMAGE, 0.5, SchedulePart(0.2, 0.7))
    expected = by_hand(pipeline, edges, lambda step: 0.5 if step in (1, 2) else 0)
    assert torch.allclose(pipeline.generate(SETTINGS, controls=[part]).latents, expected, atol=1e-5)
    off = pipeline.generate(SETTINGS, controls=[ControlPicture(edges, IMAGE, 0.0)])
    assert torch.equal(off.latents, plain.latents)


def test_bad_input_is_named_before_anything_is_loaded(pipeline, pipeline_folder, edges, tmp_path):
    def refused(words, controls, ways=None):
        told = []
        with pytest.raises(SigmaError, match=words):
            pipeline.generate(SETTINGS, ways, controls=controls, on_stage=told.append)
        assert not told

    refused("controls has a PosixPath; give ControlPictures", [edges])
    refused("There is no file", [ControlPicture(tmp_path / "none.safetensors", IMAGE)])
    weights = load_file(edges)
    name = "controlnet_blocks.0.transformer_block.attn1.to_q.weight"
    save_file(weights | {name: weights[name] * float("nan")}, tmp_path / "nan.safetensors")
    refused(f"{name} is not finite", [ControlPicture(tmp_path / "nan.safetensors", IMAGE)])
    (tmp_path / "cut.safetensors").write_bytes(edges.read_bytes()[:-1000])
    refused("is cut off", [ControlPicture(tmp_path / "cut.safetensors", IMAGE)])
    refused("not a ControlNet of PixArt", [ControlPicture(pipeline_folder / "transformer", IMAGE)])
    wide = replace(XL_2, num_layers=1, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128)
    save_file(
        {name: torch.zeros(weight.shape) for name, weight in build_controlnet(wide).state_dict().items()},
        tmp_path / "wide.safetensors",
    )
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text('{"num_attention_heads": 2}')
    (tmp_path / "wide.safetensors").rename(tmp_path / "wide" / "wide.safetensors")
    refused("width 128 in 2 heads, and this one has width 144", [ControlPicture(tmp_path / "wide", IMAGE)])
    for wrong in (-1, float("nan"), "1"):
        with pytest.raises(SettingError, match="finite number from 0"):
            ControlPicture(edges, IMAGE, wrong)
    with pytest.raises(SigmaError, match="colours first"):
        ControlPicture(edges, IMAGE.permute(1, 2, 0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png", ("a.png", 1.0, SchedulePart())),
        ("a.png:0.5", ("a.png", 0.5, SchedulePart())),
        ("a.png:0.5:10-50%", ("a.png", 0.5, SchedulePart(0.1, 0.5))),
        ("a.png:10-50%", ("a.png", 1.0, SchedulePart(0.1, 0.5))),
        (r"C:\pictures\a.png:2", (r"C:\pictures\a.png", 2.0, SchedulePart())),
        ("C:/a.png", ("C:/a.png", 1.0, SchedulePart())),
    ],
)
def test_how_a_control_image_is_spelled(text, expected):
    assert parse_control_image(text) == expected


def test_in_the_terminal(pipeline_folder, edges, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")

    def generate(*options, out="picture.png"):
        """(status, the picture's bytes, stderr)"""
        path = tmp_path / out
        path.unlink(missing_ok=True)
        models = ["--model", pipeline_folder, "--t5-precision", "fp32"]
        status = main(["generate", *map(str, [*models, *options, "--out", path])])
        return status, path.read_bytes() if path.exists() else None, capsys.readouterr().err

    quick = ("--size", "64x64", "--no-binning", "--steps", 2)
    control = ("--control", edges, "--control-image", f"{tmp_path}/red.png:0.5:0-60%")
    status, made, err = generate("a boat", *quick, *control, out="made.png")
    assert status == 0, err
    assert made != generate("a boat", *quick)[1]
    (kept,) = Metadata.read(tmp_path / "made.png").controls
    assert (kept.name, kept.strength, kept.part) == ("edges.safetensors", 0.5, "0-60%")

    status, again, err = generate("--like", tmp_path / "made.png", *control)
    assert status == 0 and again == made and "others than" not in err
    status, _, err = generate("--like", tmp_path / "made.png")
    assert status == 2 and "give --control and --control-image, with :0.5:0-60% behind" in err
    other = ("--control", edges, "--control-image", f"{tmp_path}/blue.png:0.5:0-60%")
    status, again, err = generate("--like", tmp_path / "made.png", *other)
    assert status == 0 and again != made and "are others than" in err
    status, within, err = generate("a boat", *quick, *control, "--budget", "6GB")
    assert status == 0 and within == made and "everything fits in the fastest way" in err
    status, _, err = generate("a boat", *quick, "--control", edges)
    assert status == 2 and "There are 1 --control and 0 --control-image" in err

    plan = ["plan", "--model", str(pipeline_folder), "--size", "64x64", "--budget", "1GB", "--json"]
    peaks = []
    for options in ([], ["--control", str(edges)]):
        assert main([*plan, *options]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        assert ("VAE encode" in stages) is bool(options)
        peaks.append(stages["transformer"]["weights"])
    assert peaks[1] - peaks[0] == pytest.approx(edges.stat().st_size, rel=0.05)
    assert main([*plan[:1], *plan[3:], "--control", str(edges)]) == 2
    assert "width 144 in 2 heads, and this one has width 1152" in capsys.readouterr().err

    assert main(["inspect", str(edges)]) == 0
    assert "a ControlNet of PixArt" in capsys.readouterr().out
