"""Adapters' part for T5: prompts are encoded as by a T5 into which the trainer, or hand, has merged them."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5EncoderModel

from pixart_sigma import AdapterFile, Settings, SigmaPipeline, Ways
from pixart_sigma.cli.commands import main
from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.inspection import describe
from pixart_sigma.text.embeddings import PromptEmbeddings
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.identity import identify
from pixart_sigma.text.quantize import quantize_t5
from pixart_sigma.text_adapters import text_changes
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.lora import read_adapter

PROMPT = "a lamp on a table"
LAYER = "encoder.block.1.layer.0.SelfAttention.q"
FLAT = LAYER.replace(".", "_")
WIDTH = 64


def random_like(shape, seed, scale=0.3):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B = random_like((4, WIDTH), 1), random_like((WIDTH, 4), 2)


@pytest.fixture
def t5(pipeline_folder):
    return pipeline_folder / "text_encoder"


@pytest.fixture
def encode(pipeline_folder, t5):
    """`encode(*adapters, of=..., ...)`: the embeddings of the prompt by T5 with adapters (file, strength)."""

    def run(*adapters, of=t5, **ways):
        config = inspect(pipeline_folder).config
        read = [(read_adapter(file, config), strength) for file, strength in adapters]
        changes, notices = text_changes(read, of)
        assert notices == ()
        ways = {"precision": "fp32", "tokenizer": pipeline_folder / "tokenizer"} | ways
        return TextEncoder.load(of, changes=changes, **ways).encode(PROMPT).prompt_embeds

    return run


@pytest.fixture
def merged(t5, tmp_path):
    """`merged(changes)`: a folder of T5 with other weights in place of some."""

    def write(changes):
        model = T5EncoderModel.from_pretrained(t5)
        model.load_state_dict(model.state_dict() | changes)
        model.save_pretrained(tmp_path / "merged")
        return tmp_path / "merged"

    return write


def by_hand(t5, scale):
    weight = T5EncoderModel.from_pretrained(t5).state_dict()[f"{LAYER}.weight"]
    return {f"{LAYER}.weight": weight + scale * (B @ A)}


def distance(one, other):
    assert one.shape == other.shape
    return float(torch.dist(one.float(), other.float()) / other.float().norm())


@pytest.mark.parametrize("said", [{"lora_alpha": 7}, {"lora_alpha": 3, "use_rslora": True, "use_dora": True}])
def test_what_peft_trained_is_what_it_merges(said, t5, tmp_path, encode, merged):
    peft = pytest.importorskip("peft", reason="no PEFT: pip install peft")
    chosen = peft.LoraConfig(r=4, target_modules=["q", "v", "wi_0", "wo"], **said)
    model = peft.get_peft_model(T5EncoderModel.from_pretrained(t5), chosen)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data += random_like(parameter.shape, index)
    model.save_pretrained(tmp_path / "peft")
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    made = encode((tmp_path / "peft", 1.0))
    assert distance(made, encode(of=merged(expected))) < 1e-5
    assert distance(made, encode()) > 0.01


# (the layer's name, the ends of A and B, alpha)
SPELLINGS = {
    "OneTrainer, diffusers' layout": (f"text_encoder.{LAYER}", "lora_A.weight", "lora_B.weight", None),
    "OneTrainer, old": (f"lora_te_{FLAT}", "lora_down.weight", "lora_up.weight", 2.0),
    "kohya": (f"lora_te1_{FLAT}", "lora_down.weight", "lora_up.weight", 2.0),
    "ComfyUI": (f"text_encoders.t5xxl.transformer.{LAYER}", "lora_A.weight", "lora_B.weight", 8.0),
    "PEFT": (f"base_model.model.{LAYER}", "lora_A.weight", "lora_B.weight", None),
    "LyCORIS": (f"lycoris_text_encoder_{FLAT}", "lora_down.weight", "lora_up.weight", 2.0),
}


@pytest.mark.parametrize("writer", SPELLINGS)
def test_each_spelling_beside_the_transformers_part(writer, t5, tmp_path, encode, merged):
    name, down, up, alpha = SPELLINGS[writer]
    q = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.{down}": A, f"{name}.{up}": B}
    tensors |= {
        f"{q}.lora_A.weight": random_like((4, 144), 3),
        f"{q}.lora_B.weight": random_like((144, 4), 4),
    }
    if alpha:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    made = encode((tmp_path / "lora.safetensors", 0.5))
    assert distance(made, encode(of=merged(by_hand(t5, 0.5 * (alpha or 4) / 4)))) < 1e-5
    assert distance(made, encode()) > 0.001


def test_the_metadata_of_diffusers_says_another_alpha_for_it(t5, tmp_path, encode, merged):
    said = {"transformer.lora_alpha": 100, "text_encoder.lora_alpha": 2, "text_encoder.r": 4}
    tensors = {f"text_encoder.{LAYER}.lora_A.weight": A, f"text_encoder.{LAYER}.lora_B.weight": B}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    made = encode((tmp_path / "lora.safetensors", 1.0))
    assert distance(made, encode(of=merged(by_hand(t5, 0.5)))) < 1e-5


@pytest.fixture
def lora(tmp_path):
    """For T5 alone."""
    tensors = {f"lora_te_{FLAT}.lora_down.weight": A, f"lora_te_{FLAT}.lora_up.weight": B}
    save_file(tensors | {f"lora_te_{FLAT}.alpha": torch.tensor(4.0)}, tmp_path / "t5.safetensors")
    return tmp_path / "t5.safetensors"


WAYS = [("bf16", False), ("bf16", True), ("fp32", True), ("int8", False), ("int8", True)]


@pytest.mark.parametrize(("precision", "stream"), WAYS)
def test_however_t5_runs_it_is_the_merged_one(precision, stream, t5, lora, encode, merged):
    """What is merged is rounded, or quantised, once."""
    if precision == "int8":
        pytest.importorskip("bitsandbytes")
    ways = {"precision": precision, "stream": stream}
    made, expected = encode((lora, 1.0), **ways), encode(of=merged(by_hand(t5, 1.0)), **ways)
    assert torch.equal(made, expected)
    assert distance(made, encode(**ways)) > 0.001


def test_the_table_of_words_is_changed_too(t5, tmp_path, encode, merged):
    table = T5EncoderModel.from_pretrained(t5).state_dict()["shared.weight"]
    delta = random_like(table.shape, 5)
    save_file({"text_encoder.shared.diff": delta}, tmp_path / "lora.safetensors")
    both = {"shared.weight": table + delta, "encoder.embed_tokens.weight": table + delta}
    expected = encode(of=merged(both))
    for stream in (False, True):
        assert distance(encode((tmp_path / "lora.safetensors", 1.0), stream=stream), expected) < 1e-5


def test_strengths_and_several(t5, lora, encode, merged):
    assert torch.equal(encode((lora, 0.0)), encode())
    assert distance(encode((lora, 0.5), (lora, -0.2)), encode(of=merged(by_hand(t5, 0.3)))) < 1e-5


def test_what_does_not_fit_is_named(pipeline_folder, t5, tmp_path):
    config = inspect(pipeline_folder).config
    for name, shape, words in (
        ("lora_te_encoder_block_9_layer_0_SelfAttention_q", (WIDTH, 4), "this text encoder does not have"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", (WIDTH, 4), "this text encoder does not have"),
        (f"lora_te_{FLAT}", (4096, 4), "for one of another width"),
    ):
        tensors = {f"{name}.lora_down.weight": random_like((4, shape[0]), 1)}
        tensors[f"{name}.lora_up.weight"] = random_like(shape, 2)
        save_file(tensors, tmp_path / "lora.safetensors")
        adapter = read_adapter(tmp_path / "lora.safetensors", config)
        with pytest.raises(CheckpointError, match=words):
            text_changes([(adapter, 1.0)], t5)


def test_a_t5_that_was_saved_in_8_bit_stays_as_it_is_and_that_is_said(pipeline_folder, lora, t5, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantize_t5(t5, tmp_path / "int8", "int8", tokenizer=pipeline_folder / "tokenizer")
    adapter = read_adapter(lora, inspect(pipeline_folder).config)
    changes, (notice,) = text_changes([(adapter, 1.0)], tmp_path / "int8")
    assert changes is None and "int8 was saved in int8; use a T5 in bf16" in notice
    changes, _ = text_changes([(adapter, 1.0)], t5)
    with pytest.raises(SigmaError, match="can not be changed by adapters"):
        TextEncoder.load(tmp_path / "int8", changes=changes)


def test_a_changed_t5_is_another_one(pipeline_folder, lora, t5):
    """By which embeddings are kept for later runs."""
    adapter = read_adapter(lora, inspect(pipeline_folder).config)
    changes = [text_changes([(adapter, strength)], t5)[0] for strength in (0.0, 1.0, 1.0, 0.5)]
    off, one, again, half = (
        identify(t5, pipeline_folder / "tokenizer", "fp32", change).fingerprint for change in changes
    )
    assert off == identify(t5, pipeline_folder / "tokenizer", "fp32").fingerprint
    assert one == again and len({off, one, half}) == 3


def test_a_pipeline_with_it(pipeline_folder, t5, lora, merged):
    ways, tokenizer = Ways(t5_precision="fp32"), pipeline_folder / "tokenizer"
    plain = SigmaPipeline.from_path(pipeline_folder, ways)
    changed = plain.with_adapters([AdapterFile(lora, 0.5)])
    folder = merged(by_hand(t5, 0.5))
    other = SigmaPipeline.from_path(pipeline_folder, ways, text_encoder=folder, tokenizer=tokenizer)
    before, made, expected = (
        pipeline.encode_prompts(Settings(PROMPT)).positive for pipeline in (plain, changed, other)
    )
    assert distance(made, expected) < 1e-5 and distance(made, before) > 0.001


def test_the_terminal(pipeline_folder, lora, tmp_path, capsys):
    out = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "changed")}
    options = "--model", str(pipeline_folder), "--t5-precision", "fp32"
    encode = ["encode", PROMPT, "--model", str(pipeline_folder), "--t5-precision", "fp32"]
    assert main([*encode, "--out", str(out["plain"])]) == 0
    assert main([*encode, "--lora", str(lora), "--out", str(out["changed"])]) == 0
    plain, changed = (PromptEmbeddings.load(path).positive for path in out.values())
    assert distance(changed, plain) > 0.001
    assert "text encoder    3 tensors, for T5" in describe(lora)
    run = "--steps", "1", "--size", "64x64", "--no-binning", "--out", str(tmp_path / "picture.png")
    capsys.readouterr()
    given = "--model", str(pipeline_folder), "--embeddings", str(out["changed"])
    assert main(["generate", *given, "--lora", str(lora), *run]) == 0
    assert "prompts are encoded as without it" in capsys.readouterr().err
    assert main(["generate", PROMPT, *options, "--lora", str(lora), *run]) == 0
    assert "as without it" not in capsys.readouterr().err
