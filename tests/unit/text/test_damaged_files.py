"""Encoders and tokenizers that are damaged or hostile, made of the demo's: none ends the process, hangs it or
reaches beyond the files."""

import base64
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_sigma import DEMO
from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.files import digests
from pixart_sigma.files.digests import file_digest
from pixart_sigma.text.cleaning import prepare_prompt
from pixart_sigma.text.config import read_config
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.identity import identify
from pixart_sigma.text.quantize import quantize_t5
from pixart_sigma.text.tokenizer import find_tokenizer, load_tokenizer, tokenize
from pixart_sigma.text.weights import read_t5

T5 = DEMO / "text_encoder"
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
Q = "encoder.block.0.layer.0.SelfAttention.q.weight"


def with_config(folder, **said):
    """The demo's encoder, whose config.json says something else."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(T5 / "model.safetensors")
    settings = json.loads((T5 / "config.json").read_text()) | said
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_only_what_is_known_of_a_config_reaches_transformers(tmp_path):
    """Else `_attn_implementation` has it look for a kernel on the hub, and `num_labels` takes all memory."""
    said = {
        "_attn_implementation": "owner/name",
        "attn_implementation": "owner/name",
        "_attn_implementation_internal": "owner/name",
        "num_labels": 10**9,
        "pruned_heads": {"0": [1]},
        "auto_map": {"AutoConfig": "a.b"},
        "dtype": "__class__",
        "dropout_rate": "much",
    }
    plain, found = read_config(T5)[0], read_config(with_config(tmp_path / "t5", **said))[0]
    assert found.to_dict() == plain.to_dict() and found._attn_implementation == plain._attn_implementation
    assert read_t5(tmp_path / "t5", outline=True)[0].num_layers == 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"num_layers": 100_000}, "num_layers 100000, and the weights have 2"),
        ({"d_ff": 1.5}, "d_ff is 1.5, and int is needed"),
        ({"num_heads": True}, "num_heads is True"),
        ({"d_kv": 10**30}, "d_kv 1000.*must be a number above 0"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon inf"),
        ({"feed_forward_proj": ["gated-gelu"]}, "feed_forward_proj is .*str is needed"),
        (
            {"quantization_config": INT8 | {"llm_int8_threshold": "x"}},
            "llm_int8_threshold is 'x'",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_of_the_wrong_type_or_size_is_named(tmp_path, said, words):
    with pytest.raises(CheckpointError, match=words):
        read_t5(with_config(tmp_path / "t5", **said))


@pytest.mark.parametrize("number", ["99999", "9" * 5000])
def test_a_block_far_from_the_others_is_left_over(tmp_path, number):
    weights = load_file(T5 / "model.safetensors")
    weights[f"encoder.block.{number}.layer.0.SelfAttention.q.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=r"holds the weight encoder.block.999"):
        read_t5(tmp_path / "t5.safetensors")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The demo's encoder in nf4 and in int8."""
    folder = tmp_path_factory.mktemp("quantised")
    for precision in ("nf4", "int8"):
        quantize_t5(T5, folder / precision, precision)
    return folder


def state(**said) -> torch.Tensor:
    known = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128]} | said
    return torch.frombuffer(bytearray(json.dumps(known).encode()), dtype=torch.uint8)


NF4_STATE = f"{Q}.quant_state.bitsandbytes__nf4"
SCB = f"{Q.removesuffix('weight')}SCB"


@pytest.mark.parametrize(
    ("precision", "key", "value", "words"),
    [
        ("nf4", f"{Q}.absmax", torch.ones(1), r"its absmax is \(1,\) in torch.float32, and 256 numbers"),
        ("nf4", f"{Q}.absmax", torch.full((256,), float("nan")), "absmax has numbers that are not finite"),
        ("nf4", f"{Q}.absmax", torch.ones(256, dtype=torch.uint8), "absmax is .* in torch.uint8"),
        ("nf4", f"{Q}.quant_map", torch.ones(2), "quant_map is .*16 numbers are needed"),
        ("nf4", NF4_STATE, state(blocksize=1), "in blocks of 1"),
        ("nf4", NF4_STATE, state(blocksize=4096), "absmax is .*, and 4 numbers are needed"),
        ("nf4", NF4_STATE, state(shape=[4096, 4096]), "quant_state says"),
        ("nf4", NF4_STATE, state(dtype="float64"), "quant_state says"),
        ("nf4", NF4_STATE, state(nested_blocksize=256), "names scales that are missing"),
        ("nf4", NF4_STATE, torch.zeros(80, dtype=torch.uint8), "JSONDecodeError|Expecting value"),
        ("nf4", Q, torch.zeros(10, 1, dtype=torch.uint8), "10 bytes for 16384 numbers"),
        ("int8", SCB, torch.ones(1), "SCB is .*128 numbers are needed"),
        ("int8", SCB, torch.ones(128, dtype=torch.float16), "SCB is .* in torch.float16"),
        ("int8", SCB, torch.full((128,), float("inf")), "SCB has numbers that are not finite"),
        ("int8", Q, torch.zeros(4, 128, dtype=torch.int8), r"shape \(4, 128\), not"),
        ("int8", f"{Q}_format", torch.tensor(9, dtype=torch.uint8), "weight_format is none that is known"),
    ],
)
def test_what_a_kernel_indexes_by_is_checked(quantised, tmp_path, precision, key, value, words):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").symlink_to(quantised / precision / "config.json")
    weights = load_file(quantised / precision / "model.safetensors")
    assert key in weights
    save_file(weights | {key: value}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{Q} that can not be used.*({words})"):
        read_t5(folder)


def test_a_file_that_is_cut_off_while_it_is_loaded_is_named(tmp_path):
    """Reading on would end the process."""
    folder = tmp_path / "t5"
    shutil.copytree(T5, folder)
    file = folder / "model.safetensors"

    def cut(done, total):
        if done == 3:
            os.truncate(file, 4096)

    with pytest.raises(CheckpointError, match="model.safetensors (is|was) cut off"):
        TextEncoder.load(folder, DEMO / "tokenizer", "fp32", progress=cut)


def test_a_mapped_encoder_asks_its_file_before_it_encodes(tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(T5, folder)
    encoder = TextEncoder.load(folder, DEMO / "tokenizer", "bf16")
    encoder.encode("a house")
    os.truncate(folder / "model.safetensors", 4096)
    with pytest.raises(CheckpointError, match="was cut off"):
        encoder.encode("a house")


# ---- which encoder it is


def test_a_hole_in_the_weights_makes_it_another_encoder(tmp_path):
    """Whose embeddings are never served for the whole one, or the other way round."""
    folder = tmp_path / "t5"
    shutil.copytree(T5, folder)
    whole = identify(folder, DEMO / "tokenizer")
    file = folder / "model.safetensors"
    with open(file, "r+b") as weights:
        weights.seek(file.stat().st_size - 9000)
        weights.write(bytes(4096))
    damaged = identify(folder, DEMO / "tokenizer")
    assert damaged.fingerprint == whole.fingerprint and damaged.content != whole.content
    shutil.copy(T5 / "model.safetensors", file)
    assert identify(folder, DEMO / "tokenizer") == whole


def test_a_digest_is_made_once(tmp_path, cache_home, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(os.urandom(3 * 2**10))
    monkeypatch.setattr(digests, "CHUNK", 2**10)
    os.utime(file, (1e9, 1e9))
    told = []
    made = file_digest(file, lambda *done: told.append(done))
    assert told == [(1024, 3072), (2048, 3072), (3072, 3072)]
    digests._made.clear()  # as in another process
    assert file_digest(file, lambda *done: told.append(done)) == made and len(told) == 3
    kept = next((cache_home / "pixart_sigma" / "digests").iterdir())
    kept.write_text("poison")
    digests._made.clear()
    assert file_digest(file) == made and kept.read_text() == made
    os.utime(file, (1e9, 1e9 + 1))
    file.write_bytes(bytes(3 * 2**10))
    assert file_digest(file) != made


def test_a_digest_can_be_stopped(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file_digest(tmp_path / "a.bin", stop)


# ---- tokenizers


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """What the demo's tokenizer is as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(find_tokenizer(T5), 128).save_pretrained(folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_panic_in_rust_is_an_error_like_any_other(tmp_path, tokenizer_json):
    """It is no Exception, and would end the thread of ComfyUI that runs prompts."""
    broken, panics = tmp_path / "tokenizer.json", 0
    for size in (4, 1024, 2**20):
        trie = size.to_bytes(4, "little") + b"\xff\x07\x00\x00" * (size // 4)
        charsmap = base64.b64encode(trie[: 4 + min(size, 1024)]).decode()
        normaliser = {"type": "Precompiled", "precompiled_charsmap": charsmap}
        broken.write_text(json.dumps(tokenizer_json | {"normalizer": normaliser}))
        try:
            tokenize(load_tokenizer(broken, 128), "① ﬁne ﬂowers")
        except SigmaError as error:
            panics += "PanicException" in str(error)
    assert panics


def test_a_pattern_that_may_take_for_ever_is_refused(tmp_path, tokenizer_json):
    pattern = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json | {"normalizer": pattern}))
    with pytest.raises(SigmaError, match=r"has the pattern '\(a\+\)\+\$'"):
        load_tokenizer(tmp_path / "tokenizer.json", 128)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_a_sentencepiece_model_that_is_cut_off_is_refused(tmp_path, share):
    """What is left of it is a vocabulary by which words are unknown."""
    content = (DEMO / "tokenizer" / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(content[: int(share * len(content))])
    with pytest.raises(SigmaError, match="spiece.model can not be read as a tokenizer"):
        load_tokenizer(tmp_path / "spiece.model", 128)


@pytest.mark.parametrize(
    "said",
    [{"extra_ids": 10**9}, {"extra_ids": "x"}, {"additional_special_tokens": ["x"] * 1000}, {"eos_token": 1}],
)
def test_a_tokenizers_settings_are_bounded(tmp_path, said):
    shutil.copy(DEMO / "tokenizer" / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(SigmaError, match="tokenizer_config.json (asks for|says)"):
        load_tokenizer(tmp_path / "spiece.model", 128)


def test_half_a_character_in_a_prompt_is_named():
    with pytest.raises(SigmaError, match="halves of characters"):
        prepare_prompt("a \ud800 house")
