"""`pixart-sigma convert`: what it says, what it refuses, and that no half of a file is left."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pixart_sigma import PromptEmbeddings, load_transformer
from pixart_sigma.cli import commands as cli
from pixart_sigma.studies import conversion
from pixart_sigma.transformer import converting
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.config import XL_2, KVWeights, is_published_shape

QUICK = ("--size", "64x64", "--steps", 2, "--device", "cpu", "--t5-precision", "fp32")

FOR_OURS = (
    "ComfyUI's own loader knows the published widths alone, without KV compression and qk-norm; this file is "
    "for Load Σ Transformer.\n"
)


@pytest.fixture
def convert(tmp_path, capsys, monkeypatch):
    """Runs `pixart-sigma convert` in `tmp_path` -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        status = cli.main(["convert", *map(str, options)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def assert_mistake(result, *words):
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(r"pixart-sigma: [^\n]*\n", err), err
    for word in words:
        assert word in err


def test_a_pipelines_transformer_is_written_and_measured(convert, tmp_path, pipeline_folder):
    status, out, err = convert("--model", pipeline_folder, "--to", "int8", "--out", "a.safetensors", *QUICK)
    assert status == 0 and err == FOR_OURS
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "form", "weight", "output"] and lines[-1] == "a.safetensors"
    assert re.fullmatch(r"int8: [\d.]+ MB -> [\d.]+ MB \(\d+%\)", lines[-3])
    assert re.fullmatch(r"a run of 2 steps at 64x64 from seed 0: latents [\d.]+% off", lines[-2])
    assert load_transformer("a.safetensors").sigma_config == inspect(pipeline_folder).config
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_demo_is_what_is_converted_where_nothing_is_named(convert):
    status, out, _ = convert("--to", "q5_0", "--out", "a.gguf", "--steps", 1, "--json")
    made = json.loads(out)
    assert status == 0 and made["to"] == "q5_0" and len(made["layers"]) == 41
    assert made["run"]["prompt"] == "a large yellow star on a blue background"
    assert (made["run"]["width"], made["run"]["steps"]) == (256, 1)
    assert 0.01 < made["run"]["error"] < 0.5 and made["bytes_after"] < made["bytes_before"] / 2


def test_a_transformer_alone_is_run_with_embeddings(convert, tmp_path, transformer_folder):
    save = PromptEmbeddings(torch.randn(1, 4, 64), torch.randn(1, 2, 64), positive_text="a boat").save
    save(tmp_path / "prompt.safetensors")
    asked = ("--transformer", transformer_folder, "--to", "fp8")
    status, out, err = convert(*asked, "--out", "a.safetensors", *QUICK)
    assert status == 0 and "latents" not in out
    assert "no text encoder for a run, so only the weights are compared" in err and "--embeddings" in err
    status, out, err = convert(
        *asked, "--out", "b.safetensors", "--embeddings", "prompt.safetensors", *QUICK, "--json"
    )
    made = json.loads(out)
    assert status == 0 and err == FOR_OURS
    assert made["run"]["prompt"] == "a boat" and made["run"]["error"] > 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_without_a_run_no_model_is_loaded(convert, pipeline_folder, monkeypatch):
    monkeypatch.setattr("pixart_sigma.text.stage.TextStage.load", lambda *_: 1 / 0)
    monkeypatch.setattr("pixart_sigma.transformer.stage.TransformerStage.load", lambda *_: 1 / 0)
    status, out, err = convert("--model", pipeline_folder, "--to", "q8_0", "--out", "a.gguf", "--no-run")
    assert status == 0 and not err and "latents" not in out


def test_a_quantised_one_is_said_to_be(convert, pipeline_folder):
    asked = ("--no-run", "--quiet", "--to")
    assert convert("--transformer", pipeline_folder, *asked, "q4_0", "--out", "a.gguf")[2] == ""
    status, _, err = convert("--transformer", "a.gguf", *asked[:1], "--to", "int8", "--out", "b.safetensors")
    assert status == 0 and "a.gguf is quantised (" in err and "it is dequantised first" in err


def test_a_transformer_of_the_published_shape_is_for_any_loader():
    assert is_published_shape(replace(XL_2, sample_size=64, interpolation_scale=1.0, num_layers=42))
    for change in ({"qk_norm": True}, {"kv_compression": KVWeights(2, (1,))}, {"cross_attention_dim": 144}):
        assert not is_published_shape(replace(XL_2, **change))


def test_a_guessed_size_is_told(convert, diffusers_file):
    status, _, err = convert(
        "--transformer", diffusers_file, "--no-run", "--to", "int8", "--out", "a.safetensors"
    )
    assert status == 0 and "1024 is assumed" in err
    status, _, err = convert(
        *("--transformer", diffusers_file, "--variant", "2K"),
        *("--no-run", "--to", "q8_0", "--out", "b.gguf"),
    )
    assert status == 0 and not err and inspect("b.gguf").variant == "2K"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "int7", "--out", "a.safetensors"), ["--to", "int7", "q5_0"]),
        (("--out", "a.safetensors"), ["--to"]),
        (("--to", "int8"), ["--out"]),
        (("--to", "int8", "--out", "a.gguf"), ["a.gguf is to hold int8", ".safetensors"]),
        (("--to", "q8_0", "--out", "a.safetensors"), ["is to hold q8_0", ".gguf"]),
        (("--to", "int8", "--out", "nowhere/a.safetensors"), ["nowhere is not a folder"]),
        (("--to", "int8", "--out", "."), ["is a folder"]),
        (("--to", "int8", "--out", "there.safetensors"), ["there.safetensors already exists"]),
        (("--to", "q8_0", "--out", "a.gguf", "--steps", "0"), ["--steps is 0"]),
        (("--to", "q8_0", "--out", "a.gguf", "--no-run", "--embeddings", "x"), ["--embeddings", "--no-run"]),
        (("--to", "q8_0", "--out", "a.gguf", "--prompt", "a", "--embeddings", "x"), ["leave --prompt out"]),
        (("--to", "q8_0", "--out", "a.gguf", "--embeddings", "x"), ["There is no file x"]),
        (("--to", "q8_0", "--out", "a.gguf", "--model", "there.safetensors"), ["is not a safetensors file"]),
        (("--to", "q8_0", "--out", "a.gguf", "--transformer", "nowhere"), ["nowhere"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(convert, tmp_path, options, words):
    (tmp_path / "there.safetensors").write_bytes(b"what somebody has")
    assert_mistake(convert(*options), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"what somebody has"


def test_the_model_itself_is_never_written_over(convert, tmp_path, diffusers_file):
    shutil.copy(diffusers_file, tmp_path / "mine.safetensors")
    content = (tmp_path / "mine.safetensors").read_bytes()
    asked = ("--transformer", "mine.safetensors", "--to", "int8", "--no-run")
    assert_mistake(convert(*asked, "--out", "mine.safetensors"), "already exists")
    assert (tmp_path / "mine.safetensors").read_bytes() == content


def test_a_cut_file_is_named_and_nothing_written(convert, tmp_path, diffusers_file):
    content = diffusers_file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert_mistake(
        convert("--transformer", "cut.safetensors", "--to", "q8_0", "--out", "a.gguf"), "is cut off"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_numbers_that_are_not_finite_are_named(convert, tmp_path, diffusers_state_dict):
    weights = diffusers_state_dict | {"proj_out.bias": torch.full((32,), torch.nan)}
    save_file(weights, tmp_path / "nan_512.safetensors")
    asked = ("--transformer", "nan_512.safetensors", "--to", "q8_0", "--out", "a.gguf", "--no-run")
    assert_mistake(convert(*asked), "numbers in final_layer.linear.bias that are not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["nan_512.safetensors"]


def test_an_interrupt_while_it_is_written_leaves_nothing(convert, tmp_path, pipeline_folder, monkeypatch):
    measured = []

    def interrupt(*_):
        measured.append(True)
        if len(measured) == 9:
            raise KeyboardInterrupt
        return converting.LayerError("", "", 0.0, None)

    monkeypatch.setattr(converting._Conversion, "_measure", interrupt)
    for to, name in (("int8", "a.safetensors"), ("q8_0", "a.gguf")):
        measured.clear()
        status, _, err = convert("--model", pipeline_folder, "--to", to, "--out", name, "--no-run")
        assert status == 130 and "nothing was written" in err
        assert not list(tmp_path.iterdir())


def test_an_interrupt_of_the_second_run_says_that_the_file_is_there(convert, pipeline_folder, monkeypatch):
    runs = []

    def run(self, *arguments, run=conversion.Trial.run):
        runs.append(True)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(conversion.Trial, "run", run)
    status, out, err = convert("--model", pipeline_folder, "--to", "int8", "--out", "a.safetensors", *QUICK)
    assert status == 130 and not out and "a.safetensors is written" in err
    assert inspect("a.safetensors").quantised
