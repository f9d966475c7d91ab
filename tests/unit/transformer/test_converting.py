"""Converted transformers: what is written is what gguf and comfy-kitchen make of the same weights, whole or
not at all."""

import json
import os

import gguf
import pytest
import torch
from quantised_files import random_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixart_sigma import DEMO, DEMO_KV
from pixart_sigma.choices import TRANSFORMER_FORMS
from pixart_sigma.errors import CheckpointError
from pixart_sigma.files.gguf import block_type
from pixart_sigma.files.quantised_weights import QuantisedWeight, dequantised
from pixart_sigma.files.quantising import QUANTISE, layer_facts, rotation_group
from pixart_sigma.memory.measure import peak_bytes
from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
from pixart_sigma.transformer.converting import convert

QUANTISED = [to for to in TRANSFORMER_FORMS if to != "bf16"]
LAYER = "transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def source(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("source") / "small_512.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture
def written(tmp_path, source):
    """`written(to, source=...) -> Path`"""

    def write(to, source=source, name="converted"):
        path = tmp_path / (name + TRANSFORMER_FORMS[to])
        convert(inspect(source), to, path)
        return path

    return write


def by_others(weight, to):
    """A weight in float32 as the form's own library quantises and dequantises it."""
    if to in ("q8_0", "q5_0", "q4_0"):
        kind = gguf.GGMLQuantizationType[to.upper()]
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    kitchen = pytest.importorskip(
        "comfy_kitchen.backends.eager.quantization", reason="pip install comfy-kitchen"
    )
    if to == "int8":
        group = 64 if weight.shape[1] % 64 == 0 else 16
        return kitchen.dequantize_int8_convrot_weight(
            *kitchen.quantize_int8_convrot_weight(weight, group), group
        )
    scale = weight.abs().max() / 448
    stored = kitchen.quantize_per_tensor_fp8(weight, scale, torch.float8_e4m3fn)
    return kitchen.dequantize_per_tensor_fp8(stored, scale, torch.float32)


def in_blocks(name, weight):
    return name.startswith("transformer_blocks.") and name.endswith(".weight") and weight.ndim == 2


@pytest.mark.parametrize("to", QUANTISED)
def test_what_is_read_back_is_what_its_own_library_makes(written, weights, to_original, to):
    """Under the authors' fused names, which matters for the one scale of fp8."""
    expected, read = to_original(weights), load_transformer_state_dict(inspect(written(to)))
    found = to_original({name: dequantised(weight) for name, weight in read.items()})
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        stored = found[name]
        if weight.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            assert torch.equal(stored.float(), by_others(weight, to)), name
        elif weight.ndim == 2 and name.endswith(".weight"):
            assert stored.dtype == torch.bfloat16 and torch.equal(stored, weight.bfloat16()), name
        else:
            assert torch.equal(stored, weight), name


def test_bf16_is_a_plain_file_in_the_authors_names(written, weights, to_original):
    found = load_file(written("bf16"))
    facts = found.pop("pixart_sigma.facts")
    assert json.loads(bytes(facts.tolist()))["config"]["sample_size"] == 64
    expected = to_original(weights)
    assert found.keys() == expected.keys() and "blocks.1.attn.qkv.weight" in found
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("to", "facts", "shape"),
    [
        ("int8", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}, [288, 1]),
        ("fp8", {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, []),
    ],
)
def test_layers_are_marked_as_comfyui_reads_them(written, to, facts, shape):
    with safe_open(written(to), framework="pt") as file:
        layer = "blocks.0.attn.qkv"
        assert json.loads(bytes(file.get_tensor(f"{layer}.comfy_quant").tolist())) == facts
        scale = file.get_tensor(f"{layer}.weight_scale")
        assert (list(scale.shape), scale.dtype) == (shape, torch.float32)
        assert file.get_tensor(f"{layer}.weight").dtype == (
            torch.int8 if to == "int8" else torch.float8_e4m3fn
        )
        assert file.get_tensor(f"{layer}.bias").dtype == torch.float32
        marked = {name for name in file.keys() if name.endswith(".comfy_quant")}
    assert len(marked) == 2 * 7 and all(name.startswith("blocks.") for name in marked)


def test_a_row_of_the_published_width_is_rotated_by_64():
    assert [rotation_group(columns) for columns in (1152, 4608, 4096, 144, 36, 10)] == [64, 64, 64, 16, 4, 0]
    weight = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    quantised = QUANTISE["int8"](weight)
    assert json.loads(bytes(layer_facts(quantised).tolist())) == {"format": "int8_tensorwise"}
    assert (quantised.dequantise() - weight).norm() / weight.norm() < 0.01


def test_gguf_is_whole_for_its_own_reader(written, weights, to_original):
    weights = to_original(weights)
    reader = gguf.GGUFReader(written("q5_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds.keys() == weights.keys()
    assert kinds["blocks.1.attn.qkv.weight"] == "Q5_0" and kinds["t_block.1.weight"] == "BF16"
    assert {kinds[name] for name in kinds if name.endswith(("bias", "table"))} == {"F32"}
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q5_0
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    assert all(shapes[name] == tuple(weight.shape) for name, weight in weights.items())


def test_rows_that_blocks_do_not_fill_stay_in_bf16(written, transformer_folder):
    """144 is no multiple of 32."""
    state = load_transformer_state_dict(inspect(written("q4_0", transformer_folder)))
    assert state[LAYER].dtype == torch.bfloat16
    assert state["transformer_blocks.0.ff.net.2.weight"].form == "Q4_0"  # 576 is one


@pytest.mark.parametrize("to", TRANSFORMER_FORMS)
@pytest.mark.parametrize("source", [DEMO / "transformer", DEMO_KV], ids=["demo", "demo-kv"])
def test_what_the_weights_do_not_tell_is_kept(written, source, to):
    """Heads, size and latents: 192 channels are 6 heads of 32, and would be 3 of 64."""
    before, after = inspect(source), inspect(written(to, source))
    assert after.config == before.config
    assert (after.variant, after.variant_source) == (before.variant, "config")
    assert after.latent_format == "demo"
    assert after.noise_schedule == before.noise_schedule


@pytest.mark.parametrize("to", ["int8", "q8_0"])
def test_a_guess_stays_one(written, diffusers_file, to):
    guessed, converted = inspect(diffusers_file), inspect(written(to, diffusers_file, "mine"))
    assert guessed.variant_source == converted.variant_source == "default"
    assert not converted.noise_schedule.source
    assert converted.config == guessed.config


def test_a_quantised_file_is_dequantised_first(written, weights, to_original):
    again = load_file(written("int8", written("q4_0")))
    halfway = {name: by_others(weight, "q4_0") for name, weight in weights.items() if in_blocks(name, weight)}
    stored = QUANTISE["int8"](to_original(weights | halfway)["blocks.1.attn.qkv.weight"])
    assert torch.equal(again["blocks.1.attn.qkv.weight"], stored.parts["weight"])


@pytest.mark.parametrize("to", QUANTISED)
def test_errors_are_those_of_the_weights_and_of_outputs(tmp_path, source, weights, to_original, to):
    inputs = torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    errors = convert(inspect(source), to, tmp_path / ("out" + TRANSFORMER_FORMS[to]), {LAYER: inputs})
    name = "blocks.0.attn.qkv.weight"
    weight = to_original(weights)[name]
    off = by_others(weight, to) - weight
    found = {error.name: error for error in errors}
    assert len(found) == 6 + 2 * 7
    assert found[name].weight == pytest.approx(float(off.norm() / weight.norm()), rel=1e-4)
    expected = (inputs @ off.T).norm() / (inputs @ weight.T).norm()
    assert found[name].output == pytest.approx(float(expected), rel=1e-4)
    assert sum(error.output is None for error in errors) == len(errors) - 1


def test_weights_of_nothing_but_zeros(tmp_path, weights):
    for number, to in enumerate(QUANTISED):
        save_file(weights | {LAYER: torch.zeros(96, 96)}, tmp_path / "zeros_512.safetensors")
        path = tmp_path / f"{number}{TRANSFORMER_FORMS[to]}"
        errors = convert(inspect(tmp_path / "zeros_512.safetensors"), to, path)
        stored = dequantised(load_transformer_state_dict(inspect(path))[LAYER])
        assert torch.equal(stored, torch.zeros(96, 96))
        assert all(error.weight < 0.2 for error in errors)


# ---- memory, and what goes wrong


@pytest.mark.parametrize("to", ["int8", "q8_0"])
def test_one_tensor_at_a_time_is_in_memory(tmp_path, to):
    """The demo's largest weight is 1152 x 192 of 3.4 million numbers, and the file is mapped."""
    checkpoint, path = inspect(DEMO), tmp_path / ("out" + TRANSFORMER_FORMS[to])
    peak = peak_bytes(torch.device("cpu"), lambda: convert(checkpoint, to, path))
    assert peak < checkpoint.files[0].stat().st_size + 4 * 4 * 1152 * 192
    assert 4 * 4 * 1152 * 192 < path.stat().st_size + 4 * 1152 * 192  # so that a copy would show


@pytest.mark.parametrize("to", ["int8", "q8_0"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_stops_in_the_middle_leaves_nothing(tmp_path, source, to, error):
    def stop(done, total):
        if done == 20:
            assert len(list(tmp_path.iterdir())) == 1  # beside its place
            raise error

    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        convert(inspect(source), to, tmp_path / ("out" + TRANSFORMER_FORMS[to]), on_progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", TRANSFORMER_FORMS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path, weights, to, number):
    broken = weights[LAYER].clone()
    broken[3, 5] = number
    save_file(weights | {LAYER: broken}, tmp_path / "broken_512.safetensors")
    with pytest.raises(CheckpointError, match=r"numbers in \S+ that are not finite"):
        convert(inspect(tmp_path / "broken_512.safetensors"), to, tmp_path / "out")
    assert os.listdir(tmp_path) == ["broken_512.safetensors"]


@pytest.mark.parametrize("to", ["int8", "q8_0"])
def test_a_cut_file_is_named(written, to):
    path = written(to)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="cut off"):
        inspect(path)


def test_facts_that_can_not_be_read_are_named(tmp_path, weights):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "pixart")
    writer.add_string("pixart_sigma.facts", "{")
    for name, weight in weights.items():
        writer.add_tensor(name, weight.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match="says of itself what can not be read"):
        inspect(tmp_path / "odd.gguf")


def test_a_block_type_that_gguf_has_not_is_named():
    assert block_type("Q8_0").type_size == 34
    with pytest.raises(CheckpointError, match="does not know Q9_0"):
        block_type("Q9_0")
    assert isinstance(QUANTISE["q8_0"](torch.zeros(2, 32)), QuantisedWeight)
