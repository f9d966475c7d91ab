"""The T5 encoder on a tiny model: every file kind and precision, and equality with the reference pipeline."""

import gc
import json
import logging
import math
import random
import sys
import weakref

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.prompt_embeds import pad_embeds
from pixart_sigma.text.cleaning import prepare_prompt
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.loading import describe_encoder
from pixart_sigma.text.model import compute_dtype
from pixart_sigma.text.quantize import quantize_t5
from pixart_sigma.text.weights import config_from_shapes, expected_shapes

WORDS = "a small red fox with happy face in the snow, lake and mountain at night".split()
VOCABULARY = 256
Q = "encoder.block.0.layer.0.SelfAttention.q"
STRANGE_PROMPTS = [
    "",
    "  A RED Fox \n",
    "🦊🌲 a fox 雪の中の狐 в снегу",
    "see https://example.com/cats?x=1 and www.example.org NOW",
    "<b>bold</b> &amp; <person> at 12.34.56.78, #cat #123 @somebody",
    "***SALE*** this_is_my_cute_cat-photo-jc6640.jpg 1920x1080, free shipping",
    "“quoted” — dash … «guillemets» page 12",
    "emoji%20and+plus &quot;twice&quot; 123456789 j2d1a2a",
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A SentencePiece model with T5's special tokens, and no settings beside it."""
    folder = tmp_path_factory.mktemp("spiece")
    chance = random.Random(0)
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(" ".join(chance.choices(WORDS, k=8)) for _ in range(300)),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    return folder


def tiny_config(**changes):
    from transformers import T5Config

    shape = dict(d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, vocab_size=VOCABULARY)
    return T5Config(**(shape | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False) | changes))


@pytest.fixture(scope="module")
def model():
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(tiny_config()).eval()
    for name, weight in model.named_parameters():  # T5's own initialisation is too small to tell errors apart
        if "layer_norm" not in name:
            scale = 16 if name.endswith(".q.weight") else 1  # T5 keeps 1/sqrt(d_kv) in q
            torch.nn.init.normal_(weight, std=(weight.shape[1] * scale) ** -0.5)
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer_folder, tmp_path_factory):
    """A Hugging Face encoder folder in two or more shards with a tokenizer folder beside it."""
    root = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(root / "text_encoder", max_shard_size="200KB")
    assert len(list((root / "text_encoder").glob("*.safetensors"))) >= 2
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "spiece.model").write_bytes((tokenizer_folder / "spiece.model").read_bytes())
    return root / "text_encoder"


def merged(model, path, dtype=torch.float32, edit=None):
    """Save one file in Hugging Face keys; edit(weights) may change the dict in place."""
    weights = {
        key: value.to(dtype).clone() for key, value in model.state_dict().items() if "embed_tokens" not in key
    }
    if edit:
        edit(weights)
    save_file(weights, path)
    return path


def scale_to_float8(weights):
    """Turn linear weights into scaled fp8, with their scales and the marker beside them."""
    for key in [key for key in weights if key.endswith(("q.weight", "k.weight", "wi_0.weight", "wo.weight"))]:
        scale = weights[key].abs().max().float() / 448
        weights[key] = (weights[key].float() / scale).to(torch.float8_e4m3fn)
        weights[key.removesuffix("weight") + "scale_weight"] = scale
        weights[key.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
    weights["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)


def relative_error(result, expected):
    return ((result.float() - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def exact(folder):
    return TextEncoder.load(folder, precision="fp32")


PROMPT = "a small red fox with happy face in the snow"


# ---- equality with the reference


@pytest.mark.parametrize(("clean_caption", "length"), [(False, 300), (True, 300), (False, 7), (False, 400)])
def test_embeddings_equal_the_reference_pipeline(exact, model, clean_caption, length):
    from diffusers import PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline(exact.tokenizer, model, None, None, None)
    for prompt in [*STRANGE_PROMPTS, PROMPT, "red fox " * 400]:
        expected, mask, _, _ = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device="cpu",
            clean_caption=clean_caption,
            max_sequence_length=length,
        )
        count = int(mask.sum())
        result = exact.encode(prompt, clean_caption, length).prompt_embeds
        assert result.shape == (1, count, 64)
        torch.testing.assert_close(result, expected[:, :count], atol=1e-5, rtol=1e-5)


def test_cleaning_equals_the_reference_and_known_results():
    from diffusers import PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline(None, None, None, None, None)
    for prompt in STRANGE_PROMPTS:
        assert prepare_prompt(prompt, True) == pipeline._text_preprocessing(prompt, clean_caption=True)[0]
        assert prepare_prompt(prompt) == prompt.lower().strip()
    assert prepare_prompt("<b>A fox</b> 雪 #12 see www.example.org", True) == "a fox see"
    assert prepare_prompt("red%2520fox", True) == "red fox"  # each of the two passes decodes once


@pytest.mark.parametrize("module", ["ftfy", "bs4"])
def test_cleaning_without_its_library_is_an_error(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert prepare_prompt("A") == "a"
    with pytest.raises(SigmaError, match="ftfy" if module == "ftfy" else "beautifulsoup4"):
        prepare_prompt("a", clean_caption=True)


def test_empty_prompt_is_one_token(exact):
    assert exact.encode("").prompt_embeds.shape == (1, 1, 64)
    assert exact.encode(" \n").truncated == ""


def test_words_beyond_300_tokens_are_reported(exact):
    kept = "fox " * 299  # one token each, and the end token
    assert len(exact.tokenizer(kept)["input_ids"]) == 300
    assert exact.encode(kept).truncated == ""
    encoded = exact.encode(kept + "SNOW in the lake")
    assert encoded.truncated == "snow in the lake"
    assert encoded.prompt_embeds.shape == (1, 300, 64)
    torch.testing.assert_close(encoded.prompt_embeds, exact.encode(kept).prompt_embeds)
    assert exact.encode("fox " * 10_000).truncated == ("fox " * 9_701).strip()
    assert exact.encode("🦊 雪 " * 400).truncated.endswith("🦊 雪")


@pytest.mark.parametrize("prompt", [None, 3, ["a fox"], b"a fox"])
def test_a_prompt_that_is_no_text_is_refused(exact, prompt):
    with pytest.raises(SigmaError, match="must be a text"):
        exact.encode(prompt)


# ---- precisions


@pytest.mark.parametrize(
    ("precision", "bound"),
    [("int8", 0.04), ("nf4", 0.35), ("fp4", 0.45), ("bf16", 0.03), ("fp16", 0.005), ("fp32", 1e-6)],
)
def test_every_precision_runs_on_the_cpu(folder, exact, precision, bound):
    expected = exact.encode(PROMPT).prompt_embeds
    encoder = TextEncoder.load(folder, precision=precision)
    nbytes = encoder.nbytes
    error = relative_error(encoder.encode(PROMPT).prompt_embeds, expected)
    assert error < bound
    if precision in ("int8", "nf4", "fp4"):
        import bitsandbytes

        kind = bitsandbytes.nn.Linear8bitLt if precision == "int8" else bitsandbytes.nn.Linear4bit
        block = encoder.model.encoder.block[1].layer
        assert isinstance(block[0].SelfAttention.o, kind) and isinstance(block[1].DenseReluDense.wi_1, kind)
        assert type(block[1].DenseReluDense.wo) is torch.nn.Linear
        assert block[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
        assert error > 1e-3
        assert nbytes < TextEncoder.load(folder, precision="bf16").nbytes


def test_int8_nbytes_are_counted_from_shapes(folder):
    encoder = TextEncoder.load(folder, precision="int8")
    attention, feed_forward = 4 * 64 * 64, 2 * 64 * 128
    scales = 4 * (4 * 64 + 2 * 128)  # fp32 per row
    kept = (
        VOCABULARY * 64 + 32 * 4 + 64 + 2 * (128 * 64 + 2 * 64)
    )  # table, bias, last norm, wo and norms in bf16
    expected = 2 * (attention + feed_forward + scales) + 2 * kept
    assert encoder.nbytes == expected
    encoder.encode(PROMPT)
    assert encoder.nbytes == expected


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp16", "fp32", "saved int8", "saved nf4"])
def test_size_and_progress_are_known_before_the_weights_are(folder, tmp_path, precision):
    path = folder
    if precision.startswith("saved "):
        path, precision = tmp_path / "saved", precision.removeprefix("saved ")
        quantize_t5(folder, path, precision)
    tokenizer, nbytes = describe_encoder(path, precision=precision)
    told = []
    encoder = TextEncoder.load(path, precision=precision, progress=lambda *call: told.append(call))
    assert nbytes == pytest.approx(encoder.nbytes, rel=0.02)
    assert tokenizer(PROMPT)["input_ids"] == encoder.tokenizer(PROMPT)["input_ids"]
    done, total = zip(*told, strict=True)
    assert sorted(done) == list(range(1, total[0] + 1))
    direct = TextEncoder.load(path, precision=precision)
    assert torch.equal(encoder.encode(PROMPT).prompt_embeds, direct.encode(PROMPT).prompt_embeds)


@pytest.mark.parametrize("precision", ["int8", "fp32"])  # read in this thread, and in others
def test_progress_can_stop_the_loading(folder, precision):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextEncoder.load(folder, precision=precision, progress=stop)


def test_an_earlier_layer(exact):
    ids = exact.tokenizer(PROMPT)["input_ids"]
    assert torch.equal(exact.encode_ids(ids), exact.encode(PROMPT).prompt_embeds)
    hidden = exact.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
    assert torch.equal(exact.encode_ids(ids, -2), exact.model.encoder.final_layer_norm(hidden))
    with pytest.raises(SigmaError, match="no layer -3: use a number from -2"):
        exact.encode_ids(ids, -3)


def test_int8_does_not_log_a_cast_per_layer(folder, caplog):
    encoder = TextEncoder.load(folder)
    assert encoder.precision == "int8"
    with caplog.at_level(logging.DEBUG):
        encoder.encode(PROMPT)
    assert "inputs will be cast" not in caplog.text


def test_precision_and_device_are_checked(folder):
    with pytest.raises(SigmaError, match="int7.*use one of int8"):
        TextEncoder.load(folder, precision="int7")
    with pytest.raises(SigmaError, match="device 'gpu' cannot be used here"):
        TextEncoder.load(folder, device="gpu")
    assert compute_dtype("int8", torch.device("cpu")) == torch.bfloat16
    assert compute_dtype("fp16", torch.device("cpu")) == torch.float16


def test_4bit_refuses_widths_its_kernels_do_not_take(tokenizer_folder, tmp_path):
    from transformers import T5EncoderModel

    T5EncoderModel(tiny_config(d_ff=160)).save_pretrained(tmp_path)
    with pytest.raises(SigmaError, match="multiples of 64.*d_ff = 160"):
        TextEncoder.load(tmp_path, tokenizer_folder, precision="nf4")


def test_an_overflow_is_an_error(model, tokenizer_folder, tmp_path):
    path = merged(
        model, tmp_path / "t5.safetensors", edit=lambda weights: weights["shared.weight"].fill_(torch.inf)
    )
    with pytest.raises(SigmaError, match="not finite"):
        TextEncoder.load(path, tokenizer_folder, precision="fp32").encode("a")


# ---- files


def test_a_merged_file_equals_the_folder(model, tokenizer_folder, tmp_path, exact):
    path = merged(model, tmp_path / "t5.safetensors")
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    for name in (
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_heads",
        "vocab_size",
        "relative_attention_num_buckets",
    ):
        assert getattr(encoder.model.config, name) == getattr(tiny_config(), name)
    assert torch.equal(encoder.encode(PROMPT).prompt_embeds, exact.encode(PROMPT).prompt_embeds)


def test_t5_xxl_is_recognised_from_its_shapes():
    xxl = dict(d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24, vocab_size=32128)
    shapes = expected_shapes(tiny_config(**xxl))
    assert sum(math.prod(shape) for shape in shapes.values()) == 4_762_310_656
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    found = config_from_shapes(weights, "t5xxl_fp16.safetensors")
    assert {name: getattr(found, name) for name in xxl} == xxl
    assert found.is_gated_act and found.dense_act_fn == "gelu_new"
    assert expected_shapes(found) == shapes


def test_a_second_name_of_the_embedding_table_is_accepted(model, tokenizer_folder, tmp_path, exact):
    def rename(weights):
        weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")

    path = merged(model, tmp_path / "t5.safetensors", edit=rename)
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    assert torch.equal(encoder.encode(PROMPT).prompt_embeds, exact.encode(PROMPT).prompt_embeds)


def test_fp8_file_is_read_as_the_numbers_it_holds(model, tokenizer_folder, tmp_path):
    path = merged(model, tmp_path / "t5.safetensors", torch.float8_e4m3fn)
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    expected = model.state_dict()[Q + ".weight"].to(torch.float8_e4m3fn).float()
    assert torch.equal(encoder.model.state_dict()[Q + ".weight"], expected)
    expected = encoder.encode(PROMPT).prompt_embeds
    for precision, bound in (("int8", 0.04), ("nf4", 0.35), ("bf16", 0.03)):
        encoder = TextEncoder.load(path, tokenizer_folder, precision=precision)
        assert relative_error(encoder.encode(PROMPT).prompt_embeds, expected) < bound


def test_scaled_fp8_is_multiplied_by_its_scales(model, tokenizer_folder, tmp_path, exact):
    path = merged(model, tmp_path / "t5.safetensors", torch.float16, scale_to_float8)
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    stored = load_file(path)
    expected = stored[Q + ".weight"].float() * stored[Q + ".scale_weight"]
    assert torch.equal(encoder.model.state_dict()[Q + ".weight"], expected)
    expected = exact.encode(PROMPT).prompt_embeds
    assert relative_error(encoder.encode(PROMPT).prompt_embeds, expected) < 0.1
    int8 = TextEncoder.load(path, tokenizer_folder, precision="int8")
    assert relative_error(int8.encode(PROMPT).prompt_embeds, expected) < 0.12


def test_scaled_fp8_without_a_scale_or_a_weight_is_refused(model, tokenizer_folder, tmp_path):
    def drop_scale(weights):
        scale_to_float8(weights)
        del weights[Q + ".scale_weight"]

    def misfit(weights):
        scale_to_float8(weights)
        weights[Q + ".scale_weight"] = torch.ones(3)

    def stray(weights):
        weights["encoder.stray.scale_weight"] = torch.tensor(1.0)

    for edit, message in (
        (drop_scale, f"no scale for {Q}"),
        (misfit, f"scale of {Q}"),
        (stray, "encoder.stray"),
    ):
        path = merged(model, tmp_path / "t5.safetensors", torch.float16, edit)
        with pytest.raises(CheckpointError, match=message):
            TextEncoder.load(path, tokenizer_folder)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("key", [Q + ".weight", "encoder.block.1.layer.1.layer_norm.weight", "shared.weight"])
def test_a_missing_weight_is_named(model, tokenizer_folder, tmp_path, key, precision):
    path = merged(model, tmp_path / "t5.safetensors", edit=lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=key):
        TextEncoder.load(path, tokenizer_folder, precision=precision)


def test_left_over_and_misshapen_weights_are_named(model, tokenizer_folder, tmp_path):
    def add(weights):
        weights["decoder.final_layer_norm.weight"] = torch.ones(64)

    def misshape(weights):
        weights["encoder.block.1.layer.0.SelfAttention.k.weight"] = torch.ones(64, 32)

    def integers(weights):
        weights[Q + ".weight"] = torch.ones(64, 64, dtype=torch.int8)

    for edit, message in (
        (add, "decoder.final_layer_norm.weight"),
        (misshape, r"block.1.layer.0.SelfAttention.k.weight has shape \(64, 32\), not the \(64, 64\)"),
        (integers, "torch.int8 numbers"),
    ):
        path = merged(model, tmp_path / "t5.safetensors", edit=edit)
        with pytest.raises(CheckpointError, match=message):
            TextEncoder.load(path, tokenizer_folder)


def test_a_folder_without_one_of_its_weights_is_refused(folder, tokenizer_folder, model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[Q + ".weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=Q):
        TextEncoder.load(tmp_path, tokenizer_folder)


def test_gguf_is_refused_with_the_node_that_reads_it(tokenizer_folder, tmp_path):
    (tmp_path / "t5-Q8_0.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "disguised.safetensors").write_bytes(b"GGUF" + bytes(60))
    for path in (tmp_path / "t5-Q8_0.gguf", tmp_path / "disguised.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"CLIPLoader \(GGUF\)"):
            TextEncoder.load(path, tokenizer_folder)


def test_folders_that_are_no_t5_are_refused(tokenizer_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        TextEncoder.load(tmp_path, tokenizer_folder)
    for text, message in (("{", "JSON"), ("[]", "model_type"), ('{"model_type": "clip"}', "'clip'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            TextEncoder.load(tmp_path, tokenizer_folder)
    quantised = {"model_type": "t5", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(CheckpointError, match="gptq"):
        TextEncoder.load(tmp_path, tokenizer_folder)
    with pytest.raises(CheckpointError):
        TextEncoder.load(tmp_path / "absent.safetensors", tokenizer_folder)


# ---- tokenizers


def test_a_file_without_a_tokenizer_says_what_to_pass(model, tmp_path):
    path = merged(model, tmp_path / "t5.safetensors")
    with pytest.raises(SigmaError, match="spiece.model or tokenizer.json"):
        TextEncoder.load(path)
    with pytest.raises(SigmaError, match="does not exist"):
        TextEncoder.load(path, tmp_path / "absent")


def test_spiece_model_and_tokenizer_json_agree(model, exact, tokenizer_folder, tmp_path):
    path = merged(model, tmp_path / "t5.safetensors")
    exact.tokenizer.save_pretrained(tmp_path / "saved")
    beside = tmp_path / "tokenizer"
    beside.mkdir()
    (beside / "tokenizer.json").write_bytes((tmp_path / "saved" / "tokenizer.json").read_bytes())
    for given in (
        None,
        beside,
        beside / "tokenizer.json",
        tokenizer_folder / "spiece.model",
        tmp_path / "saved",
    ):
        tokenizer = TextEncoder.load(path, given, precision="bf16").tokenizer
        assert len(tokenizer) == len(exact.tokenizer)
        for prompt in [*STRANGE_PROMPTS, "<extra_id_3>"]:
            assert tokenizer(prompt)["input_ids"] == exact.tokenizer(prompt)["input_ids"]


def test_sentinels_are_as_the_saved_tokenizer_has_them(tokenizer_folder, tmp_path):
    from transformers import T5EncoderModel, T5Tokenizer

    pieces = len(T5Tokenizer.from_pretrained(tokenizer_folder, extra_ids=0))
    T5EncoderModel(tiny_config(vocab_size=pieces)).save_pretrained(tmp_path)
    assert len(TextEncoder.load(tmp_path, tokenizer_folder).tokenizer) == pieces  # no room for 100 more
    T5Tokenizer.from_pretrained(tokenizer_folder, extra_ids=0).save_pretrained(tmp_path / "tokenizer")
    assert len(TextEncoder.load(tmp_path).tokenizer) == pieces
    T5Tokenizer.from_pretrained(tokenizer_folder, extra_ids=100).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SigmaError, match=f"{pieces + 100} tokens.*knows {pieces}"):
        TextEncoder.load(tmp_path)


def test_other_tokenizers_are_refused(folder, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SigmaError, match="not a T5 tokenizer"):
        TextEncoder.load(folder, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SigmaError, match="can not be read as a tokenizer"):
        TextEncoder.load(folder, tmp_path)


# ---- quantised folders


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_a_quantised_folder_loads_as_it_was_saved(folder, tmp_path, precision):
    out = tmp_path / "quantised"
    quantize_t5(folder, out, precision)
    assert [path.name for path in tmp_path.iterdir()] == ["quantised"]
    reloaded = TextEncoder.load(out)
    assert reloaded.precision == precision
    direct = TextEncoder.load(folder, precision=precision)
    assert torch.equal(reloaded.encode(PROMPT).prompt_embeds, direct.encode(PROMPT).prompt_embeds)
    assert torch.equal(
        TextEncoder.load(out, precision=precision).encode(PROMPT).prompt_embeds,
        direct.encode(PROMPT).prompt_embeds,
    )
    other = "nf4" if precision == "int8" else "int8"
    with pytest.raises(SigmaError, match=f"saved in {precision}.*can not be loaded in {other}"):
        TextEncoder.load(out, precision=other)


@pytest.mark.parametrize(("precision", "companion"), [("int8", "SCB"), ("nf4", "weight.absmax")])
def test_a_quantised_folder_without_a_scale_is_refused(folder, tmp_path, precision, companion):
    quantize_t5(folder, tmp_path / "out", precision)
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    del weights[f"{Q}.{companion}"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{Q}.weight is {precision}"):
        TextEncoder.load(tmp_path / "out")


def test_quantising_refuses_what_it_would_overwrite(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SigmaError, match="already exists"):
        quantize_t5(folder, tmp_path)
    with pytest.raises(SigmaError, match="use one of int8, nf4, fp4"):
        quantize_t5(folder, tmp_path / "out", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_save_leaves_nothing(folder, tmp_path, monkeypatch):
    from transformers import T5EncoderModel

    def fail(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(T5EncoderModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize_t5(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- memory and batches


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp32"])
def test_dropping_the_encoder_frees_its_weights(folder, precision):
    encoder = TextEncoder.load(folder, precision=precision)
    encoder.encode(PROMPT)
    weights = [weakref.ref(weight) for weight in encoder.model.parameters()]
    assert all(weight() is not None for weight in weights)
    del encoder
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_pad_embeds():
    short, long = torch.randn(1, 2, 8), torch.randn(1, 5, 8)
    embeds, mask = pad_embeds([short, long])
    assert embeds.shape == (2, 5, 8) and mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert (
        torch.equal(embeds[0, :2], short[0]) and not embeds[0, 2:].any() and torch.equal(embeds[1], long[0])
    )
    embeds, mask = pad_embeds([short, short])
    assert embeds.shape == (2, 2, 8) and mask is None
    with pytest.raises(SigmaError, match="at least one"):
        pad_embeds([])
    with pytest.raises(SigmaError, match=r"\(1, 2, 4\)"):
        pad_embeds([short, torch.randn(1, 2, 4)])
