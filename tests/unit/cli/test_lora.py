"""Adapters from the terminal: they change the picture, which says so, and nothing of them stays."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pixart_sigma import DEMO, AdapterFile, Settings, SigmaPipeline, Ways
from pixart_sigma.adapter_files import parse_adapter
from pixart_sigma.cli.commands import main
from pixart_sigma.errors import SettingError
from pixart_sigma.files.metadata import Metadata, UsedAdapter
from pixart_sigma.inspection import describe
from pixart_sigma.transformer.checkpoint import inspect

FAST = ("a red circle", "--steps", "2", "--size", "64x64", "--no-binning", "--no-embedding-cache")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """`lora(name, layer=...)`: an adapter of the demo's transformer that changes much."""
    config = inspect(DEMO).config
    folder, width = tmp_path_factory.mktemp("lora"), config.cross_attention_dim

    def write(name="mine.safetensors", layer="proj_out", size=1.0, width=width):
        rows = 4 * config.out_channels if layer == "proj_out" else width
        generator = torch.Generator().manual_seed(3)
        a, b = torch.randn(4, width, generator=generator), size * torch.randn(rows, 4, generator=generator)
        save_file(
            {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}, folder / name
        )
        return folder / name

    return write


@pytest.fixture
def run(tmp_path, capsys):
    def run(*options, out="picture.png"):
        status = main([*map(str, options), "--out", str(tmp_path / out)])
        path = tmp_path / out
        return status, path.read_bytes() if path.exists() else None, capsys.readouterr().err

    return run


def test_generate_with_an_adapter(run, lora, tmp_path):
    _, plain, _ = run("generate", *FAST, out="plain.png")
    status, changed, err = run("generate", *FAST, "--lora", lora(), out="lora.png")
    assert status == 0, err
    _, half, _ = run("generate", *FAST, "--lora", f"{lora()}:0.5", out="half.png")
    _, off, _ = run("generate", *FAST, "--lora", f"{lora()}:0", out="off.png")
    _, again, _ = run("generate", *FAST, out="again.png")
    pixels = {name: Metadata.read(tmp_path / f"{name}.png") for name in ("lora", "half", "off")}
    assert [pixels[name].adapters[0].strength for name in pixels] == [1, 0.5, 0]
    assert again == plain  # nothing of it stays
    assert len({plain, changed, half, off}) == 4
    assert _pixels(tmp_path / "off.png") == _pixels(tmp_path / "plain.png")
    assert _pixels(tmp_path / "half.png") != _pixels(tmp_path / "lora.png")


def _pixels(path):
    from PIL import Image

    return Image.open(path).tobytes()


def test_several_in_order_and_what_the_picture_says(run, lora, tmp_path):
    two = lora("two.safetensors", "transformer_blocks.0.attn1.to_q", 0.1)
    status, first, err = run("generate", *FAST, "--lora", f"{lora()}:0.8", "--lora", two)
    assert status == 0, err
    used = Metadata.read(tmp_path / "picture.png").adapters
    assert [(adapter.name, adapter.strength) for adapter in used] == [
        ("mine.safetensors", 0.8),
        ("two.safetensors", 1.0),
    ]
    assert all(len(adapter.fingerprint) == 64 for adapter in used)
    (tmp_path / "picture.png").rename(tmp_path / "kept.png")
    like = ("generate", "--like", tmp_path / "kept.png", "--no-embedding-cache")
    status, again, err = run(*like, "--lora", f"{lora()}:0.8", "--lora", two)
    assert status == 0 and again == first, err
    status, again, err = run(*like, out="none.png")
    assert (status, again) == (2, None)
    assert "give them with --lora mine.safetensors:0.8 --lora two.safetensors:1, or others" in err
    status, again, err = run(*like, "--lora", two)
    assert status == 0 and again != first
    assert "The adapters (--lora) are not those" in err


def test_an_adapter_that_does_not_fit_is_one_sentence(run, lora):
    status, made, err = run("generate", *FAST, "--lora", lora("wide.safetensors", "proj_out", width=1152))
    assert (status, made) == (2, None)
    assert "of another width" in err and len(err.splitlines()) == 1
    status, made, err = run("generate", *FAST, "--lora", "nowhere.safetensors:0.5")
    assert (status, made) == (2, None) and "There is no file nowhere.safetensors" in err


def test_a_calibration_with_an_adapter_needs_a_name(lora, capsys):
    assert main(["calibrate", "--lora", str(lora())]) == 2
    assert "name its file with --out" in capsys.readouterr().err


def test_streamed_blocks_are_changed_too(lora):
    layer = lora("block.safetensors", "transformer_blocks.1.attn2.to_out.0", 0.3)
    settings = Settings("a red circle", steps=2, width=64, height=64, binning=False)
    pipelines = [
        SigmaPipeline.from_path("demo", Ways(device="cpu")).with_adapters(adapters)
        for adapters in ((), (layer,), (AdapterFile(layer, 1.0),))
    ]
    plain, changed = (pipeline.generate(settings).latents for pipeline in pipelines[:2])
    streamed = pipelines[2].generate(settings, Ways(device="cpu", transformer_device="stream")).latents
    assert torch.equal(changed, streamed) and not torch.equal(plain, changed)


def test_a_pipeline_that_keeps_its_transformer_stays_as_it_is(lora):
    settings = Settings("a red circle", steps=2, width=64, height=64, binning=False)
    plain = SigmaPipeline.from_path("demo", Ways(device="cpu", release="keep"))
    before = plain.generate(settings).latents
    changed = plain.with_adapters([lora()])
    assert not torch.equal(changed.generate(settings).latents, before)
    assert torch.equal(plain.generate(settings).latents, before)
    assert torch.equal(changed.with_adapters([]).generate(settings).latents, before)


def test_the_calibration_of_the_checkpoint_is_followed_with_an_adapter(lora):
    from pixart_sigma.transformer.calibration import Calibration, fingerprint_of
    from pixart_sigma.transformer.checkpoint import load_transformer_state_dict

    own = fingerprint_of(load_transformer_state_dict(inspect(DEMO)))
    calibration = Calibration((), 0, 0, 0, 1, 1, 1, (), {}, own)
    file = lora("k.safetensors", "transformer_blocks.0.attn1.to_k", 1.0)
    stage = SigmaPipeline.from_path("demo", Ways(device="cpu")).with_adapters([file]).transformer
    assert calibration.fits(stage._fingerprint())


@pytest.mark.parametrize(
    "text, path, strength",
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("folder/:-1", "folder/", -1.0),
        (r"C:\models\a.safetensors", r"C:\models\a.safetensors", 1.0),
        (r"C:\models\a.safetensors:1e-1", r"C:\models\a.safetensors", 0.1),
        ("a:b", "a:b", 1.0),
    ],
)
def test_the_spelling_of_an_adapter(text, path, strength):
    assert parse_adapter(text) == AdapterFile(path, strength)


def test_a_strength_is_a_finite_number(tmp_path, monkeypatch, capsys):
    for strength in (float("nan"), True, "1"):
        with pytest.raises(SettingError, match="adapter strength"):
            AdapterFile("a", strength)
    assert main(["generate", "a", "--lora", "a.safetensors:inf"]) == 2
    assert "--lora" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").touch()
    assert parse_adapter("a:2") == AdapterFile("a:2")


def test_metadata_keeps_adapters():
    made = Metadata(Settings("a"), Ways(), {}, adapters=(UsedAdapter("x", 0.5, "f"),))
    assert Metadata._of(json.loads(made.as_json())).adapters == made.adapters


def test_inspect_describes_it(lora):
    assert "an adapter (LoRA) of a PixArt transformer" in describe(lora())
