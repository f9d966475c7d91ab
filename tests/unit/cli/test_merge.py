"""`pixart-sigma merge`: the file is what a run with the same adapters computes with, and loads as any."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_sigma.cli.commands import main
from pixart_sigma.files.weight_files import read_metadata
from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.lora import adapter_changes, read_adapter

QKV = "transformer_blocks.0.attn1.to_"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def merge(tmp_path, capsys):
    """`merge(*options, out=...)`: status, the file, what was printed and what was said beside it."""

    def run(*options, out="merged.safetensors"):
        status = main(["merge", *map(str, options), "--out", str(tmp_path / out)])
        said = capsys.readouterr()
        assert not list(tmp_path.glob(f".{out}*")), "something was left beside it"
        return status, tmp_path / out, said.out, said.err

    return run


def random_like(shape, seed, scale=0.1):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lora(tmp_path):
    """A LoRA of q, DoRA by columns of q, k and v as one, and something for T5."""
    tensors = {"blocks.0.attn.qkv.dora_scale": 1 + random_like((1, 144), 5)}
    t5 = "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
    for name, rows, columns in (
        (f"transformer.{QKV}q", 144, 144),
        ("blocks.0.attn.qkv", 432, 144),
        (t5, 64, 64),
    ):
        tensors[f"{name}.lora_A.weight"] = random_like((4, columns), rows)
        tensors[f"{name}.lora_B.weight"] = random_like((rows, 4), rows + 1)
    save_file(tensors, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def loaded(path):
    return load_transformer(path).state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.dist(found[name].float(), weight) <= 1e-5 * weight.norm(), name


def copy_of(folder, to, change=lambda weight: weight, metadata=None, **config):
    """A transformer's folder with other weights, or another config."""
    shutil.copytree(folder, to)
    weights = {name: change(weight).contiguous() for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, to / WEIGHTS, metadata)
    said = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(said))
    return to


@pytest.mark.parametrize("keys", ["diffusers", "original"])
def test_the_file_is_what_a_run_with_the_adapters_computes_with(keys, merge, lora, transformer_folder):
    status, file, out, err = merge(
        "--transformer", transformer_folder, "--lora", f"{lora}:0.7", "--lora", lora, "--keys", keys
    )
    assert status == 0, err
    before, merged = inspect(transformer_folder), inspect(file)
    adapter, plain = read_adapter(lora, before.config), load_transformer_state_dict(before)
    changes = adapter_changes([(adapter, 0.7), (adapter, 1.0)], plain.__getitem__)
    assert_same(loaded(file), load_transformer(transformer_folder, changes=changes).state_dict())
    assert (merged.config, merged.variant, merged.key_style) == (before.config, before.variant, keys)
    assert f"{lora}: 3 weights changed, strength 0.7" in out and f"{keys} keys" in out and str(file) in out
    assert "also changes the text encoder" in err
    said = json.loads(read_metadata(file)["pixart_sigma.merged"])
    assert [adapter["strength"] for adapter in said["adapters"]] == [0.7, 1.0]


def test_a_weighted_sum_and_then_an_adapter(merge, lora, transformer_folder, tmp_path):
    other = copy_of(transformer_folder, tmp_path / "other", lambda weight: weight.flip(0))
    base = "--transformer", transformer_folder, "--with", f"{other}:0.25"
    status, file, out, err = merge(*base)
    assert status == 0, err
    weights = load_transformer_state_dict(inspect(transformer_folder))
    expected = {name: 0.75 * weight + 0.25 * weight.flip(0) for name, weight in weights.items()}
    assert_same(loaded(file), expected)
    assert ": 0.75 of it" in out and f"{other} (float32" in out
    _, both, _, _ = merge(*base, "--lora", lora, out="both.safetensors")
    adapter = read_adapter(lora, inspect(transformer_folder).config)
    changes = adapter_changes([(adapter, 1.0)], expected.__getitem__)
    assert_same(loaded(both), expected | {name: change(expected[name]) for name, change in changes.items()})


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_it_is_rounded_once(word, dtype, merge, lora, transformer_folder):
    options = "--transformer", transformer_folder, "--lora", lora
    whole = load_file(merge(*options)[1])
    rounded = load_file(merge(*options, "--dtype", word, out=f"{word}.safetensors")[1])
    compared = [name for name in whole if name.startswith("transformer_blocks")]
    assert len(compared) > 20 and all(torch.equal(rounded[name], whole[name].to(dtype)) for name in compared)


def test_of_float8_it_makes_bf16_and_it_keeps_the_metadata(merge, lora, transformer_folder, tmp_path):
    facts = {"modelspec.title": "mine", "_quantization_metadata": "{}"}
    base = copy_of(transformer_folder, tmp_path / "fp8", lambda weight: weight.to(torch.float8_e4m3fn), facts)
    status, file, _, err = merge("--transformer", base, "--lora", lora)
    assert status == 0, err
    kept = read_metadata(file)
    assert kept["modelspec.title"] == "mine" and "_quantization_metadata" not in kept
    stored = load_file(base / WEIGHTS)[f"{QKV}k.weight"].float()
    name = "transformer_blocks.1.attn1.to_k.weight"
    assert torch.equal(load_file(file)[name], load_file(base / WEIGHTS)[name].to(torch.bfloat16))
    assert not torch.equal(load_file(file)[f"{QKV}k.weight"].float(), stored)


def test_quantised_weights_are_dequantised_and_that_is_said(merge, lora, transformer_folder, tmp_path):
    def scaled(weight):
        return weight.to(torch.float8_e4m3fn) if weight.ndim == 2 and len(weight) > 6 else weight

    base = copy_of(transformer_folder, tmp_path / "scaled", scaled)
    weights = load_file(base / WEIGHTS)
    for name in [name for name, weight in weights.items() if weight.dtype == torch.float8_e4m3fn]:
        weights[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor(2.0)
    save_file(weights | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, base / WEIGHTS)
    status, file, _, err = merge("--transformer", base, "--lora", lora, "--dtype", "fp32")
    assert status == 0 and "is quantised" in err and "it is dequantised first" in err, err
    name = "transformer_blocks.1.attn1.to_k.weight"
    assert torch.equal(load_file(file)[name], 2 * weights[name].float())


def test_what_can_not_be_merged_is_said_and_nothing_is_written(merge, lora, transformer_folder, tmp_path):
    small = copy_of(transformer_folder, tmp_path / "elsewhere", interpolation_scale=0.5, sample_size=32)
    broken = copy_of(transformer_folder, tmp_path / "broken", lambda weight: weight * torch.inf)
    huge = copy_of(transformer_folder, tmp_path / "huge", lambda weight: 1e6 * (1 + weight.abs()))
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    base = "--transformer", transformer_folder
    for options, out, words in (
        ((), "a.safetensors", "There is nothing to merge"),
        (("--lora", f"{lora}:0"), "a.safetensors", "There is nothing to merge"),
        (("--lora", lora), "there.safetensors", "already exists"),
        (("--lora", lora), "a.gguf", "ends in .safetensors"),
        (("--lora", lora), "nowhere/a.safetensors", "is not a folder"),
        (("--with", transformer_folder), "a.safetensors", "give FILE:SHARE"),
        (("--with", f"{transformer_folder}:0"), "a.safetensors", "give FILE:SHARE"),
        (("--with", f"{small}:0.5"), "a.safetensors", "The variant of"),
        (("--with", "demo:0.5"), "a.safetensors", "can not be summed"),
        (("--with", f"{broken}:0.5"), "a.safetensors", "not finite in float32: a file is damaged"),
        (("--with", f"{huge}:0.5", "--dtype", "fp16"), "a.safetensors", "beyond float16: write bf16"),
        (("--lora", transformer_folder / WEIGHTS), "a.safetensors", "holds whole weights"),
    ):
        status, file, _, err = merge(*base, *options, out=out)
        assert status == 2 and words in err, (options, err)
        assert not file.exists() or file.read_bytes() == b"mine"
