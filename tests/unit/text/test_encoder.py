"""The T5 encoder on a tiny model: every file kind and precision, and equality with the reference pipeline."""

import gc
import json
import logging
import math
import random
import shutil
import sys
import weakref

import pytest
import sentencepiece
import torch
from quantised_files import quantise_layers, write_gguf
from safetensors.torch import load_file, save_file

from pixart_sigma import DEMO
from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.files.weight_files import read_state_dict
from pixart_sigma.prompt_embeds import pad_embeds
from pixart_sigma.text.cleaning import prepare_around_embeddings, prepare_prompt
from pixart_sigma.text.config import config_from_shapes
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.identity import identify
from pixart_sigma.text.loading import describe_encoder
from pixart_sigma.text.model import compute_dtype
from pixart_sigma.text.quantize import quantize_t5
from pixart_sigma.text.weights import expected_shapes, is_linear

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


def test_names_of_embeddings_keep_their_case_and_are_not_cleaned():
    """Other programs' embeddings are files, with names of any case."""
    for prompt, expected in (
        (" A Fox embedding:My_Style, Snow ", "a fox embedding:My_Style, snow"),
        (
            "embedding:A (Embedding:B) (embedding:C.pt:1.2) D",
            "embedding:A (embedding:b) (embedding:C.pt:1.2) d",
        ),
        ("an Embedding:X and Anembedding:Y", "an embedding:x and anembedding:y"),
    ):
        assert prepare_around_embeddings(prompt) == expected
    cleaned = prepare_around_embeddings("A <b>Fox</b> embedding:My_Style #12 Snow", clean_caption=True)
    assert cleaned.split() == ["a", "fox", "embedding:My_Style", "snow"]
    for prompt in STRANGE_PROMPTS:
        assert prepare_around_embeddings(prompt) == prepare_prompt(prompt)


def test_vectors_take_the_place_of_tokens(exact, folder):
    """Rows of the encoder's own table, given as vectors, are its tokens; streamed as well."""
    ids = exact.tokenizer(PROMPT)["input_ids"]
    table = exact.model.shared.weight
    mixed = [table[token] if index % 2 else token for index, token in enumerate(ids)]
    for encoder in (exact, TextEncoder.load(folder, precision="fp32", stream=True)):
        assert torch.equal(encoder.encode_ids(mixed), encoder.encode_ids(ids))
        assert not torch.equal(encoder.encode_ids([table[5], *ids[1:]]), encoder.encode_ids(ids))
    with pytest.raises(SigmaError, match="'embedding:Fox'.*only in ComfyUI"):
        exact.encode("a embedding:Fox")
    assert exact.encode("word embedding: a chart").truncated == ""


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
    [("int8", 0.04), ("nf4", 0.4), ("fp4", 0.45), ("bf16", 0.03), ("fp16", 0.005), ("fp32", 1e-6)],
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
    tokenizer, nbytes, width = describe_encoder(path, precision=precision)
    told = []
    encoder = TextEncoder.load(path, precision=precision, progress=lambda *call: told.append(call))
    assert nbytes == pytest.approx(encoder.nbytes, rel=0.02)
    assert width == encoder.encode(PROMPT).prompt_embeds.shape[-1]
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
    found = config_from_shapes(shapes, "t5xxl_fp16.safetensors")
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
    for precision, bound in (("int8", 0.04), ("nf4", 0.4), ("bf16", 0.03)):
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


def as_written_today(weights, metadata):
    """Turn the first form of scaled fp8 into ComfyUI's present ones: the format in tensors or in metadata."""
    del weights["scaled_fp8"]
    layers = {}
    for key in [key for key in weights if key.endswith(".scale_weight")]:
        layer = key.removesuffix(".scale_weight")
        layers[layer] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        weights[layer + ".weight_scale"] = weights.pop(key)
        weights[layer + ".input_scale"] = weights.pop(layer + ".scale_input")
    if metadata:
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    for layer, facts in layers.items():
        weights[layer + ".comfy_quant"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return None


@pytest.mark.parametrize("form", ["tensors", "tensors, fp8 as bytes", "metadata", "metadata behind a prefix"])
def test_todays_scaled_fp8_is_multiplied_by_its_scales(model, tokenizer_folder, tmp_path, form):
    path = merged(model, tmp_path / "t5.safetensors", torch.float16, scale_to_float8)
    weights = load_file(path)
    expected = weights[Q + ".weight"].float() * weights[Q + ".scale_weight"]
    metadata = as_written_today(weights, metadata=form.startswith("metadata"))
    if "bytes" in form:
        weights[Q + ".weight"] = weights[Q + ".weight"].view(torch.uint8)
    if "prefix" in form:
        prefix = "text_encoders.t5xxl.transformer."
        weights = {prefix + key: weight for key, weight in weights.items()}
        metadata = {name: text.replace('"encoder.', f'"{prefix}encoder.') for name, text in metadata.items()}
    save_file(weights, path, metadata=metadata)
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    assert torch.equal(encoder.model.state_dict()[Q + ".weight"], expected)


def test_another_quantisation_of_comfyui_is_named(model, tokenizer_folder, tmp_path):
    path = merged(model, tmp_path / "t5.safetensors", torch.float16, scale_to_float8)
    weights = load_file(path)
    metadata = as_written_today(weights, metadata=True)
    without_scale = {key: weight for key, weight in weights.items() if key != Q + ".weight_scale"}
    for kept, text, message in (
        (
            weights,
            metadata["_quantization_metadata"].replace("float8_e4m3fn", "convrot_w4a4"),
            "as convrot_w4a4.*only",
        ),
        (weights, '{"layers": []}', "can not be read how it is quantised"),
        (without_scale, metadata["_quantization_metadata"], f"no scale for {Q}.weight"),
    ):
        save_file(kept, path, metadata={"_quantization_metadata": text})
        with pytest.raises(CheckpointError, match=message):
            TextEncoder.load(path, tokenizer_folder)


@pytest.mark.parametrize(
    "prefix", ["text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "transformer.", "text_encoder.", ""]
)
def test_an_encoder_is_found_behind_a_prefix_and_beside_other_things(
    model, tokenizer_folder, tmp_path, exact, prefix
):
    def move(weights):
        for key in list(weights):
            weights[prefix + key] = weights.pop(key)
        weights[prefix.removesuffix("transformer.") + "logit_scale"] = torch.tensor(4.6055)
        if prefix.startswith("text_enc"):
            weights["vae.decoder.conv_in.weight"] = torch.zeros(1)

    path = merged(model, tmp_path / "t5.safetensors", edit=move)
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    assert torch.equal(encoder.encode(PROMPT).prompt_embeds, exact.encode(PROMPT).prompt_embeds)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_of_a_whole_t5_the_encoder_is_taken(tokenizer_folder, tmp_path, form):
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    whole = T5ForConditionalGeneration(tiny_config()).eval()
    whole.save_pretrained(tmp_path / "t5")
    path = tmp_path / "t5"
    if form == "file":
        path = (tmp_path / "t5" / "model.safetensors").rename(tmp_path / "t5_v1_1.safetensors")
    assert any(key.startswith("decoder.") for key in read_state_dict(path))
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    ids = encoder.tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        expected = whole.encoder(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(encoder.encode_ids(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("key", [Q + ".weight", "encoder.block.1.layer.1.layer_norm.weight", "shared.weight"])
def test_a_missing_weight_is_named(model, tokenizer_folder, tmp_path, key, precision):
    path = merged(model, tmp_path / "t5.safetensors", edit=lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=key):
        TextEncoder.load(path, tokenizer_folder, precision=precision)


def test_left_over_and_misshapen_weights_are_named(model, tokenizer_folder, tmp_path):
    def add(weights):
        weights["encoder.stray.weight"] = torch.ones(64)

    def misshape(weights):
        weights["encoder.block.1.layer.0.SelfAttention.k.weight"] = torch.ones(64, 32)

    def integers(weights):
        weights[Q + ".weight"] = torch.ones(64, 64, dtype=torch.int8)

    for edit, message in (
        (add, "encoder.stray.weight"),
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


def llama_names(model):
    """By transformers' names what gguf itself calls the weights of a T5 encoder."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    found = {
        key: names.get_name(key, (".weight",)) for key in model.state_dict() if "embed_tokens" not in key
    }
    assert found[Q + ".weight"] == "enc.blk.0.attn_q.weight" and all(found.values())
    return found


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "F16"])
@pytest.mark.parametrize("names", ["llama.cpp's", "transformers'"])
def test_gguf_is_dequantised(model, tokenizer_folder, tmp_path, names, kind):
    weights = {key: weight for key, weight in model.state_dict().items() if "embed_tokens" not in key}
    called = llama_names(model) if names == "llama.cpp's" else {key: key for key in weights}
    path = tmp_path / "t5.gguf"
    extra = {"dec.blk.0.attn_q.weight": torch.ones(64, 64)} if names == "llama.cpp's" else {}
    stored = {called[key]: weight for key, weight in weights.items()} | extra
    read = write_gguf(path, stored, kind if kind != "F16" else "F32", "F16" if kind == "F16" else "F32")
    expected = {key: read[name] for key, name in called.items()}
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    for key, weight in expected.items():
        assert torch.equal(encoder.model.state_dict()[key], weight), key
    streamed = TextEncoder.load(path, tokenizer_folder, precision="fp32", stream=True)
    made = encoder.encode(PROMPT).prompt_embeds
    assert torch.equal(streamed.encode(PROMPT).prompt_embeds, made)
    for precision in ("bf16", "int8"):
        resident = TextEncoder.load(path, tokenizer_folder, precision)
        again = TextEncoder.load(path, tokenizer_folder, precision, stream=True)
        assert torch.equal(again.encode(PROMPT).prompt_embeds, resident.encode(PROMPT).prompt_embeds)
        assert relative_error(resident.encode(PROMPT).prompt_embeds, made) < 0.05
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "t5.gguf")
    from_folder = TextEncoder.load(folder, tokenizer_folder, precision="fp32")
    assert torch.equal(from_folder.encode(PROMPT).prompt_embeds, made)
    identity = identify(folder, tokenizer_folder)
    assert identity != identify(merged(model, tmp_path / "t5.safetensors"), tokenizer_folder)
    assert identity == identify(folder / "t5.gguf", tokenizer_folder)


@pytest.mark.parametrize("form", ["int8 by row", "mxfp8", "nvfp4"])
def test_other_forms_of_comfyui_are_dequantised(model, tokenizer_folder, tmp_path, form):
    pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen, which ComfyUI comes with")
    linear = {key: weight for key, weight in model.state_dict().items() if is_linear(key)}
    others = {key: weight for key, weight in model.state_dict().items() if "embed_tokens" not in key}
    tensors, _, expected = quantise_layers(linear, form)
    path = tmp_path / "t5.safetensors"
    save_file({key: weight.contiguous() for key, weight in (others | tensors).items()}, path)
    encoder = TextEncoder.load(path, tokenizer_folder, precision="fp32")
    for key, weight in expected.items():
        assert torch.equal(encoder.model.state_dict()[key], weight), key
    streamed = TextEncoder.load(path, tokenizer_folder, precision="fp32", stream=True)
    assert torch.equal(streamed.encode(PROMPT).prompt_embeds, encoder.encode(PROMPT).prompt_embeds)


def test_a_damaged_gguf_is_named(tokenizer_folder, tmp_path):
    (tmp_path / "t5-Q8_0.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "disguised.safetensors").write_bytes(b"GGUF" + bytes(60))
    for path in (tmp_path / "t5-Q8_0.gguf", tmp_path / "disguised.safetensors"):
        with pytest.raises(CheckpointError, match="GGUF of version 0"):
            TextEncoder.load(path, tokenizer_folder)


def test_folders_that_are_no_t5_are_refused(tokenizer_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        TextEncoder.load(tmp_path, tokenizer_folder)
    for text, message in (("{", "JSON"), ("[]", "no settings"), ('{"model_type": "clip"}', "'clip'")):
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
    wanted = "the 256 tokens of .*spiece.model or tokenizer.json with --tokenizer.*hf download"
    with pytest.raises(SigmaError, match=wanted):
        TextEncoder.load(path)
    with pytest.raises(SigmaError, match="does not exist"):
        TextEncoder.load(path, tmp_path / "absent")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with nothing on it: no models folder, no ComfyUI, no Hugging Face cache."""
    root = tmp_path / "machine"
    (root / "here").mkdir(parents=True)
    monkeypatch.chdir(root / "here")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("COMFYUI_PATH", str(root / "ComfyUI"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
    return root


@pytest.mark.parametrize(
    "place, name",
    [
        ("ComfyUI/models/diffusers/PixArt/tokenizer", "PixArt/tokenizer"),
        ("ComfyUI/models/diffusers/owner/SD3/tokenizer_3", "SD3/tokenizer_3"),
        ("comfy/ComfyUI/models/diffusers/PixArt/tokenizer", "PixArt/tokenizer"),
        ("here/models/PixArt/tokenizer", "PixArt/tokenizer"),
        ("other/models/diffusers/PixArt/tokenizer", "PixArt/tokenizer"),  # where the encoder is
        ("hub/models--PixArt--Sigma/snapshots/1a2b/tokenizer", "PixArt/Sigma"),
        ("hub/models--google--t5/snapshots/1a2b", "google/t5"),
        ("ComfyUI/comfy/text_encoders/t5_tokenizer", "text_encoders/t5_tokenizer"),
        ("comfy/ComfyUI/comfy/text_encoders/t5_tokenizer", "text_encoders/t5_tokenizer"),
    ],
)
def test_a_bare_encoder_takes_the_tokenizer_of_another_model(
    model, exact, machine, tokenizer_folder, place, name
):
    (machine / "other" / "models" / "text_encoders").mkdir(parents=True)
    path = merged(model, machine / "other" / "models" / "text_encoders" / "t5.safetensors")
    folder = machine / place
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes((tokenizer_folder / "spiece.model").read_bytes())
    assert torch.equal(
        TextEncoder.load(path, precision="fp32").encode(PROMPT).prompt_embeds,
        exact.encode(PROMPT).prompt_embeds,
    )
    assert identify(path).tokenizer == name and identify(path) == identify(path, folder)


def test_a_tokenizer_that_does_not_fit_is_never_taken(model, machine, tokenizer_folder, tmp_path):
    """The demo's, of 120 words; that of another model in the same folder; a damaged one."""
    from transformers import T5EncoderModel

    wide = T5EncoderModel(tiny_config(vocab_size=360))
    path = merged(wide, machine / "t5.safetensors")
    diffusers = machine / "ComfyUI" / "models" / "diffusers"
    shutil.copytree(DEMO / "tokenizer", diffusers / "a demo" / "tokenizer")
    (diffusers / "b damaged" / "tokenizer").mkdir(parents=True)
    (diffusers / "b damaged" / "tokenizer" / "spiece.model").write_bytes(bytes(100))
    (machine / "tokenizer.json").write_text('{"model": "of CLIP"}')
    with pytest.raises(SigmaError, match="No tokenizer for the 360 tokens"):
        TextEncoder.load(path)
    with pytest.raises(SigmaError, match="has 120 tokens, but the encoder knows 360"):
        TextEncoder.load(path, DEMO / "tokenizer")

    fitting = diffusers / "c fits" / "tokenizer"
    fitting.mkdir(parents=True)
    (fitting / "spiece.model").write_bytes((tokenizer_folder / "spiece.model").read_bytes())
    assert len(TextEncoder.load(path).tokenizer) == 141
    assert identify(path).tokenizer == "c fits/tokenizer"


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


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_4_bit_folders_in_another_storage_load(folder, tmp_path, storage):
    """As QLoRA recipes for FSDP write them (`bnb_4bit_quant_storage`)."""
    from transformers import BitsAndBytesConfig, T5EncoderModel

    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    quantised = T5EncoderModel.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(**asked, bnb_4bit_quant_storage=storage),
    )
    quantised.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")[Q + ".weight"].dtype == storage
    loaded = TextEncoder.load(tmp_path, folder.parent / "tokenizer")
    assert loaded.precision == "nf4"
    assert describe_encoder(tmp_path, folder.parent / "tokenizer")[1] == pytest.approx(
        loaded.nbytes, rel=0.02
    )
    direct = TextEncoder.load(folder, precision="nf4")
    assert torch.equal(loaded.encode(PROMPT).prompt_embeds, direct.encode(PROMPT).prompt_embeds)


# ---- configs


def with_config(folder, target, **changes):
    """A copy of an encoder's folder whose config.json says something else; None takes an entry out."""
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    (target / "config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_epsilon": 0.1},
        {"relative_attention_max_distance": 9},
        {"feed_forward_proj": "gated-silu", "dense_act_fn": None, "is_gated_act": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_config_says_is_obeyed(folder, exact, tmp_path, changes, stream):
    from transformers import T5EncoderModel

    path = with_config(folder, tmp_path / "t5", **changes)
    reference = T5EncoderModel.from_pretrained(path).eval()
    ids = exact.tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).last_hidden_state
    made = TextEncoder.load(path, folder.parent / "tokenizer", "fp32", stream=stream).encode_ids(ids)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert relative_error(made, exact.encode_ids(ids)) > 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"return_dict": False, "output_attentions": True}, ""),
        ({"num_layers": 1}, "num_layers 1, and the weights have 2"),
        ({"num_heads": 8, "d_kv": 8}, "num_heads 8, and the weights have 4"),
        (
            {"relative_attention_num_buckets": 16},
            "relative_attention_num_buckets 16, and the weights have 32",
        ),
        ({"vocab_size": 128}, "vocab_size 128, and the weights have 256"),
        (
            {"feed_forward_proj": None, "dense_act_fn": None, "is_gated_act": None},
            "feed_forward_proj 'relu', and the weights are gated",
        ),
        ({"dense_act_fn": "relu"}, "dense_act_fn 'relu', and feed_forward_proj 'gated-gelu'"),
        ({"is_gated_act": False}, "is_gated_act False, and feed_forward_proj"),
        ({"feed_forward_proj": "gated-new", "dense_act_fn": None}, "'gated-new', which is no activation"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon 0.0, which must be a number above 0"),
        ({"layer_norm_epsilon": "small"}, "does not describe a T5 encoder.*layer_norm_epsilon"),
        ({"relative_attention_max_distance": 0}, "relative_attention_max_distance 0"),
        ({"relative_attention_max_distance": 8}, "max_distance 8, which must be above 8"),
        ({"scalable_attention": True}, "scalable_attention True, which a T5 encoder has not"),
        ({"is_decoder": True}, "is_decoder True, which"),
    ],
    ids=str,
)
def test_a_config_of_another_encoder_is_named(folder, exact, tmp_path, changes, message):
    path = with_config(folder, tmp_path / "t5", **changes)
    if not message:  # it says how results are handed over, and they are the same
        made = TextEncoder.load(path, folder.parent / "tokenizer", "fp32")
        assert torch.equal(made.encode(PROMPT).prompt_embeds, exact.encode(PROMPT).prompt_embeds)
        return
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.load(path, folder.parent / "tokenizer")


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
