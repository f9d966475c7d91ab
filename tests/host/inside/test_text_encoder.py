"""The T5 encoder as the host's CLIP, with the built-in demo model, on the CPU."""

import comfy.sampler_helpers
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders.pixart_t5 import PixArtT5XXL
from comfy_extras.nodes_model_merging import CLIPMergeSimple
from pack.nodes.host.text_encoder import load_clip
from pack.pixart_sigma import DEMO, TextEncoder
from pack.pixart_sigma.files.weight_files import read_state_dict

import nodes as host_nodes

PROMPT = "  A Red circle on the left, a blue square  "
LONG = "red circle " * 400


@pytest.fixture(scope="module")
def engine():
    return TextEncoder.load(DEMO, precision="fp32")


@pytest.fixture(scope="module")
def expected(engine):
    """What PROMPT is to become."""
    return engine.encode(PROMPT).prompt_embeds


@pytest.fixture
def clip():
    return load_clip(DEMO, "fp32", "auto")


@pytest.fixture
def theirs():
    """The host's own T5 with the same weights."""
    config = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 128}
    theirs = PixArtT5XXL("cpu", torch.float32, {"t5xxl_model_config": config})
    weights = {key: value.float() for key, value in read_state_dict(DEMO / "text_encoder").items()}
    missing, unexpected = theirs.load_sd(weights)
    assert not [key for key in missing if "embed_tokens" not in key] and not unexpected
    return theirs


def encode(clip, text, **options):
    (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(text, **options))
    assert entry[1] == {"pooled_output": None}
    return entry[0]


def test_unweighted_prompts_become_the_engines_own_embeddings(clip, expected):
    """Through the host's nodes; it is loaded at the first encode."""
    assert clip.cond_stage_model.encoder is None
    (conditioning,) = host_nodes.CLIPTextEncode().encode(clip, PROMPT)
    assert clip.cond_stage_model.encoder is not None
    assert torch.equal(conditioning[0][0], expected) and conditioning[0][0].dtype == torch.float32
    assert encode(clip, "").shape == (1, 1, 128)
    assert clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[1] is None
    assert torch.equal(clip.encode_from_tokens(clip.tokenize(PROMPT)), expected)
    assert "cross_attn" in comfy.sampler_helpers.convert_cond(conditioning)[0]
    (zeroed,) = host_nodes.ConditioningZeroOut().zero_out(conditioning)
    assert not zeroed[0][0].any()
    (averaged,) = host_nodes.ConditioningAverage().addWeighted(conditioning, zeroed, 0.5)
    torch.testing.assert_close(averaged[0][0], expected / 2)


def test_prompt_weights_act_as_in_the_hosts_own_t5(clip, engine, theirs):
    for prompt in ("a (red:1.3) circle", "(a (red) circle)", "(a red:0.5) (blue:-1) square", PROMPT):
        host = theirs.encode_token_weights(clip.tokenize(prompt))[0]
        assert (encode(clip, prompt) - host).abs().max() < 1e-5, prompt
    assert [weight for _, weight in clip.tokenize("a (red:1.3) circle")["t5xxl"][0]].count(1.3) > 0
    words = [word for *_, word in clip.tokenize("a (red:1.3)", return_word_ids=True)["t5xxl"][0]]
    assert words[0] == 1 and words[-2:] == [2, 0]
    assert torch.equal(encode(clip, r"a \(red\)"), engine.encode("a (red)").prompt_embeds)


def test_a_clones_layer_is_its_own_and_as_in_the_hosts_own_t5(clip, expected, theirs):
    (lower,) = host_nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    theirs.set_clip_options({"layer": -2})
    assert (encode(lower, PROMPT) - theirs.encode_token_weights(clip.tokenize(PROMPT))[0]).abs().max() < 1e-5
    assert torch.equal(encode(clip, PROMPT), expected)
    deep = clip.clone()
    deep.clip_layer(-9)
    with pytest.raises(ValueError, match="no layer -9"):
        encode(deep, PROMPT)


def test_cleaned_captions_have_no_weights(clip, engine):
    cleaned = clip.tokenize("a (red:1.3) circle <b>x</b>", clean_caption=True)
    assert {weight for _, weight in cleaned["t5xxl"][0]} == {1.0}
    cleaned = engine.encode("a (red:1.3) circle", clean_caption=True).prompt_embeds
    assert torch.equal(encode(clip, "a (red:1.3) circle", clean_caption=True), cleaned)


def test_what_is_beyond_300_tokens_is_quoted(clip, engine, caplog):
    cut = engine.encode(LONG + "blue square").prompt_embeds
    caplog.clear()
    made = encode(clip, LONG)
    assert made.shape[1] == 300
    assert torch.equal(made[:, :299], cut[:, :299])
    (first,) = caplog.messages
    assert "red circle" in first
    encode(clip, LONG + "(blue:1.2) square")
    second = caplog.messages[-1]
    assert second.count("red circle") == first.count("red circle") and "blue square" in second


def test_the_hosts_tokenizer_options_belong_to_one_clone(clip):
    padded = clip.clone()
    padded.set_tokenizer_option("t5xxl_min_length", 40)
    padded.set_tokenizer_option("t5xxl_min_padding", 2)
    assert encode(padded, "red").shape[1] == 40 and encode(clip, "red").shape[1] < 10
    assert clip.tokenizer.decode([token for token, _ in clip.tokenize("red")["t5xxl"][0]]) == "red"


def test_nothing_of_a_lora_is_applied_which_is_said_once(clip, expected, caplog):
    encode(clip, PROMPT)
    caplog.clear()
    for patched in (clip.clone(), clip):
        assert patched.add_patches({"some.weight": ("diff", (torch.zeros(1),))}, 1.0) == []
    (message,) = caplog.messages
    assert "LoRA" in message
    _, loaded = comfy.sd.load_lora_for_models(None, clip, {}, 1.0, 1.0)
    assert torch.equal(encode(loaded, PROMPT), expected)


def test_a_merge_of_it_is_refused(clip, theirs):
    """Either way round."""
    hosts = ModelPatcher(theirs, torch.device("cpu"), torch.device("cpu"))
    for encoders in ((clip, clip), (hosts, clip), (clip, hosts)):
        with pytest.raises(ValueError, match="can not be merged.*CLIPLoader"):
            CLIPMergeSimple().merge(*encoders, 0.5)


def test_a_workflow_can_not_save_it(clip):
    with pytest.raises(ValueError, match="quantize-t5"):
        clip.get_sd()


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.1), ("nf4", 0.5)])
def test_8_and_4_bit_are_near_the_exact_ones_and_as_large_as_expected(expected, precision, bound):
    small = load_clip(DEMO, precision, "cpu")
    before = small.patcher.model_size()
    result = encode(small, PROMPT)
    assert result.dtype == torch.float32
    assert (result - expected).norm() / expected.norm() < bound
    # a CPU with AVX512-BF16 makes bitsandbytes keep the scales of 4 bit in bf16
    after = small.patcher.model_size()
    assert 0.95 * before < after < 1.02 * before
