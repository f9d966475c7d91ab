"""The T5 encoder as the host's CLIP, with the built-in demo model, on the CPU."""

import json
import shutil

import comfy.cli_args
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.text_encoders.pixart_t5 import PixArtT5XXL, PixArtTokenizer
from comfy.text_encoders.sd3_clip import SD3ClipModel, SD3Tokenizer
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL
from comfy_extras.nodes_hunyuan import CLIPTextEncodeHunyuanDiT
from comfy_extras.nodes_model_merging import CLIPMergeSimple, CLIPSave
from comfy_extras.nodes_sd3 import CLIPTextEncodeSD3
from pack.nodes.host.adapters import patch_clip
from pack.nodes.host.mapping import obey_host
from pack.nodes.host.t5_alone import t5_alone
from pack.nodes.host.text_encoder import load_clip
from pack.pixart_sigma import DEMO, TextEncoder
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.files.mapping import files_are_mapped
from pack.pixart_sigma.files.weight_files import read_state_dict
from pack.pixart_sigma.text.quantize import quantize_t5
from pack.pixart_sigma.transformer.lora import fit_adapter
from safetensors.torch import save_file

import nodes as host_nodes

PROMPT = "  A Red circle on the left, a blue square  "
CONFIG = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 128}
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
    theirs = PixArtT5XXL("cpu", torch.float32, {"t5xxl_model_config": CONFIG})
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


@pytest.fixture
def sd3_clip(theirs):
    """The host's CLIP for SD3, of which the T5 has the demo's weights, and the others are not loaded."""
    made = comfy.sd.CLIP(no_init=True)
    small = {"t5xxl_model_config": CONFIG}
    made.cond_stage_model = SD3ClipModel(False, False, dtype=torch.float32, model_options=small)
    made.cond_stage_model.t5xxl.transformer = theirs.t5xxl.transformer
    made.tokenizer, made.layer_idx, made.tokenizer_options = SD3Tokenizer(), None, {}
    made.use_clip_schedule, made.apply_hooks_to_conds = False, None
    cpu = torch.device("cpu")
    made.patcher = comfy.model_patcher.ModelPatcher(made.cond_stage_model, cpu, cpu)
    return made


def test_the_t5_of_an_sd3_clip_encodes_as_the_hosts_clip_for_pixart(sd3_clip, theirs, clip):
    before = sd3_clip.encode_from_tokens(sd3_clip.tokenize("a"))
    alone = t5_alone(sd3_clip, 1)
    assert [len(alone.tokenize(text)["t5xxl"][0]) for text in ("", "a red circle")] == [1, 5]
    padded = t5_alone(sd3_clip, 12).tokenize("a red circle")["t5xxl"][0]
    assert len(padded) == 12 and padded[5:] == [(0, 1.0)] * 7
    for prompt in ("a (red:1.3) circle", PROMPT, ""):
        tokens = clip.tokenize(prompt)
        expected = theirs.encode_token_weights(tokens)[0]
        assert torch.equal(alone.encode_from_tokens(tokens), expected), prompt
    # The CLIP that it is of has its own words for nothing still, and other tokens.
    assert sd3_clip.cond_stage_model.t5xxl.special_tokens == {"end": 1, "pad": 0}
    assert len(sd3_clip.tokenize("a")["t5xxl"][0]) == 77
    assert torch.equal(sd3_clip.encode_from_tokens(sd3_clip.tokenize("a")), before)
    weights = [key for key in sd3_clip.cond_stage_model.state_dict() if key.startswith("t5xxl.")]
    assert weights == list(alone.cond_stage_model.state_dict()), "a LoRA's patches find them by name"


def test_a_clip_without_t5_is_told_apart(sd3_clip, clip):
    sd3_clip.cond_stage_model.t5xxl = None
    for other in (sd3_clip, clip):
        with pytest.raises(ValueError, match="no T5-XXL in this CLIP"):
            t5_alone(other, 1)


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a (house:1e999)", "gives 'house' the weight inf"),
        ("a (house:-9999)", "gives 'house' the weight -9999"),
        ("(" * 900 + "house" + ")" * 900, "brackets in brackets, 900 deep"),
        ("a \ud800 house", "halves of characters"),
    ],
    ids=["infinite", "large", "nested", "half"],
)
def test_prompts_of_which_nothing_can_be_made_are_named(clip, text, words):
    with pytest.raises(SigmaError, match=words):
        clip.tokenize(text)
    assert clip.tokenize("(" * 50 + "house" + ")" * 50)


def test_files_are_mapped_as_the_host_was_told(monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "disable_mmap", True)
    try:
        obey_host()
        assert not files_are_mapped()
    finally:
        monkeypatch.undo()
        obey_host()
    assert files_are_mapped()


def test_the_hosts_tokenizer_options_belong_to_one_clone(clip):
    padded = clip.clone()
    padded.set_tokenizer_option("t5xxl_min_length", 40)
    padded.set_tokenizer_option("t5xxl_min_padding", 2)
    assert encode(padded, "red").shape[1] == 40 and encode(clip, "red").shape[1] < 10
    assert clip.tokenizer.decode([token for token, _ in clip.tokenize("red")["t5xxl"][0]]) == "red"


@pytest.fixture
def embeddings_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], set()))
    return tmp_path


@pytest.fixture
def hosts_clip(theirs, embeddings_folder):
    """The host's own CLIP of the same weights, with its own way to find embeddings."""

    def tokenize(text, tokenizer):
        """As the host does, with the demo's words in place of those of T5-XXL."""
        own = PixArtTokenizer(embedding_directory=[str(embeddings_folder)]).clip_t5xxl
        own.tokenizer, own.embedding_size = tokenizer, 128
        return {"t5xxl": own.tokenize_with_weights(text)}

    def encode(text, tokenizer):
        return theirs.encode_token_weights(tokenize(text, tokenizer))[0]

    return encode


def vectors(count, width=128, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


EMBEDDED = [
    "a red embedding:Two circle",
    "embedding:Two",
    "embedding:one.safetensors, a circle",
    "a (red:1.3) (embedding:Two:1.4) circle",
    "a (embedding:nowhere) red embedding:nothing, circle",
    "embedding: Two embedding:wide red",
    "red embedding:Two<x> circle",
]


def test_embeddings_in_a_prompt_are_taken_as_in_the_hosts_own_t5(clip, engine, hosts_clip, embeddings_folder):
    save_file({"emb": vectors(2)}, embeddings_folder / "Two.safetensors")
    save_file({"emb": vectors(1, seed=1)[0]}, embeddings_folder / "one.safetensors")
    torch.save({"string_to_param": {"*": vectors(1, 768)}}, embeddings_folder / "wide.pt")
    for prompt in EMBEDDED:
        host = hosts_clip(prompt, engine.tokenizer)
        ours = encode(clip, prompt)
        # The host puts a padding token at the end for each vector that does not fit.
        assert host.shape[1] - ours.shape[1] == ("wide" in prompt), prompt
        if "wide" not in prompt:
            assert (ours - host).abs().max() < 1e-5, prompt
    plain = engine.encode("a red circle").prompt_embeds
    assert encode(clip, "a red embedding:Two circle").shape[1] == plain.shape[1] + 2
    assert torch.equal(encode(clip, "a red embedding:nothing circle"), plain)


def test_what_is_wrong_with_an_embedding_is_said(clip, embeddings_folder, caplog):
    torch.save({"string_to_param": {"*": vectors(1, 768)}}, embeddings_folder / "wide.pt")
    (embeddings_folder / "broken.safetensors").write_bytes(b"no")
    for name, message in (
        ("nothing", "no embedding 'nothing' in models/embeddings"),
        ("../secret", "no embedding '../secret'"),
        ("wide", "'wide' is 768 wide, and this T5 reads 128"),
        ("broken", "no embedding 'broken'"),
    ):
        caplog.clear()
        clip.tokenize(f"a red embedding:{name} circle")
        assert message in caplog.messages[-1], name


def test_embeddings_streamed_cleaned_and_cut(clip, embeddings_folder):
    save_file({"emb": vectors(5)}, embeddings_folder / "Five.safetensors")
    streamed = load_clip(DEMO, "fp32", "stream")
    prompt = "a red embedding:Five circle"
    assert (encode(streamed, prompt) - encode(clip, prompt)).abs().max() < 1e-5
    cleaned = clip.tokenize("a <b>red</b> embedding:Five circle", clean_caption=True)["t5xxl"][0]
    assert sum(isinstance(token, torch.Tensor) for token, _ in cleaned) == 5
    cut = clip.tokenize("red " * 297 + "embedding:Five")
    assert len(cut["t5xxl"][0]) == 300 and clip.tokenizer.truncated("red " * 297 + "embedding:Five")


@pytest.mark.parametrize(
    "node, given, message",
    [
        (CLIPTextEncodeSDXL, (64, 64, 0, 0, 64, 64, "red", "red"), "tokens of 'l'.*Σ Text Encode"),
        (CLIPTextEncodeHunyuanDiT, ("red", "red"), "tokens of 'mt5xl'"),
        (CLIPTextEncodeSD3, ("red", "red", "red", "none"), "tokens of 'l'"),
        (CLIPTextEncodeSD3, ("", "", "", "none"), "no tokens for T5"),
    ],
)
def test_nodes_of_other_models_are_told_what_to_use(clip, node, given, message):
    with pytest.raises(ValueError, match=message):
        node.execute(clip, *given)


def test_every_other_entry_explains_a_wrong_use(clip):
    for tokens in ({"l": [[(1, 1.0)]]}, {}, "red", None, {"t5xxl": []}):
        with pytest.raises(ValueError, match="no tokens for T5"):
            clip.encode_from_tokens(tokens)
    with pytest.raises(ValueError, match="must be a text"):
        clip.tokenize(None)
    with pytest.raises(ValueError, match="writes no text"):
        clip.generate(clip.tokenize("red"))
    with pytest.raises(ValueError, match="reads its own file"):
        clip.load_sd({})


def test_a_bare_file_takes_the_hosts_tokenizer(tmp_path):
    """As t5xxl_fp16.safetensors lies beside Flux's."""
    from transformers import T5Config, T5EncoderModel

    small = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 1, "vocab_size": 32128}
    model = T5EncoderModel(T5Config(**small, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    weights = {key: value for key, value in model.eval().state_dict().items() if "embed_tokens" not in key}
    save_file(weights, tmp_path / "t5xxl_fp16.safetensors")
    found = load_clip(tmp_path / "t5xxl_fp16.safetensors", "fp32", "cpu")
    own = PixArtTokenizer().tokenize_with_weights("a red circle")
    assert found.tokenize("A red circle") == own
    expected = model(torch.tensor([[token for token, _ in own["t5xxl"][0]]])).last_hidden_state
    assert (found.encode_from_tokens(found.tokenize("A red circle")) - expected).abs().max() < 1e-4
    assert found.cond_stage_model.identify().tokenizer == "text_encoders/t5_tokenizer"


@pytest.mark.parametrize("quantised", [False, True])
def test_what_the_hosts_clip_save_writes_loads(theirs, clip, tmp_path, monkeypatch, quantised):
    """In fp32, and in scaled fp8 as the host quantises and dequantises it."""
    if quantised:
        weights = read_state_dict(DEMO / "text_encoder")
        for key in [key for key in weights if key.endswith((".q.weight", ".wo.weight"))]:
            layer = key.removesuffix(".weight")
            scale = weights[key].abs().max().float() / 448
            weights[key] = (weights[key].float() / scale).to(torch.float8_e4m3fn)
            weights[layer + ".weight_scale"] = scale
            facts = json.dumps({"format": "float8_e4m3fn"}).encode()
            weights[layer + ".comfy_quant"] = torch.tensor(list(facts), dtype=torch.uint8)
        theirs = PixArtT5XXL(
            "cpu",
            torch.float32,
            {"t5xxl_model_config": CONFIG, "quantization_metadata": {"mixed_ops": True}},
        )
        theirs.load_sd(weights)
    saved = comfy.sd.CLIP(no_init=True)
    saved.cond_stage_model, saved.tokenizer = theirs, PixArtTokenizer()
    saved.patcher = comfy.model_patcher.ModelPatcher(theirs, torch.device("cpu"), torch.device("cpu"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    CLIPSave().save(saved, "t5")
    (path,) = tmp_path.glob("*.safetensors")
    keys = read_state_dict(path)
    assert any("logit_scale" in key for key in keys) and quantised == any(
        "comfy_quant" in key for key in keys
    )
    shutil.copytree(DEMO / "tokenizer", tmp_path / "tokenizer")
    found = encode(load_clip(path, "fp32", "cpu"), PROMPT)
    expected = theirs.encode_token_weights(clip.tokenize(PROMPT))[0]
    assert (found - expected).abs().max() < 1e-4


def test_nothing_of_a_lora_is_applied_which_is_said_once(clip, expected, caplog):
    encode(clip, PROMPT)
    caplog.clear()
    for patched in (clip.clone(), clip):
        assert patched.add_patches({"some.weight": ("diff", (torch.zeros(1),))}, 1.0) == []
    (message,) = caplog.messages
    assert "LoRA" in message
    _, loaded = comfy.sd.load_lora_for_models(None, clip, {}, 1.0, 1.0)
    assert torch.equal(encode(loaded, PROMPT), expected)


def lora_for_t5(folder):
    """An adapter of the demo's T5 and nothing else, and what it adds."""
    layer = "encoder.block.1.layer.0.SelfAttention.q"
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, 128), (128, 4)))
    name = "lora_te_" + layer.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, folder / "t5.safetensors")
    return folder / "t5.safetensors", f"{layer}.weight", 0.5 * up @ down


def test_load_sigma_lora_changes_t5(clip, expected, theirs, tmp_path):
    """Ours in any precision that is not saved, and the host's own, as a merge by hand; the given stay."""
    file, name, delta = lora_for_t5(tmp_path)
    adapter = fit_adapter(file, {})
    hosts = comfy.sd.CLIP(no_init=True)
    hosts.cond_stage_model, hosts.tokenizer, hosts.layer_idx = theirs, clip.tokenizer, None
    hosts.tokenizer_options, hosts.use_clip_schedule, hosts.apply_hooks_to_conds = {}, False, None
    hosts.patcher = comfy.model_patcher.ModelPatcher(theirs, torch.device("cpu"), torch.device("cpu"))
    merged = tmp_path / "merged"
    shutil.copytree(DEMO / "text_encoder", merged)
    (file_of_weights,) = merged.glob("*.safetensors")
    weights = {key: value.float() for key, value in read_state_dict(merged).items()}
    weights[name] = weights[name] + 0.7 * delta
    save_file(weights, file_of_weights)
    shutil.copytree(DEMO / "tokenizer", tmp_path / "tokenizer")
    for precision in ("fp32", "int8"):
        by_hand = encode(load_clip(merged, precision, "cpu"), PROMPT)
        changed, left_out = patch_clip(load_clip(DEMO, precision, "cpu"), adapter, 0.7)
        assert left_out == ()
        assert (encode(changed, PROMPT) - by_hand).abs().max() < 1e-5 * by_hand.abs().max()
        if precision == "fp32":
            assert (encode(hosts, PROMPT) - expected).abs().max() < 1e-4
            on_hosts = encode(patch_clip(hosts, adapter, 0.7)[0], PROMPT)
            assert (on_hosts - by_hand).abs().max() < 1e-4
            assert (on_hosts - expected).abs().max() > 1e-2
    changed, _ = patch_clip(clip, adapter, 0.5)
    changed, _ = patch_clip(changed, adapter, 0.2)  # each on top of the one before
    by_hand = encode(load_clip(merged, "fp32", "cpu"), PROMPT)
    assert (encode(changed, PROMPT) - by_hand).abs().max() < 1e-5 * by_hand.abs().max()
    assert torch.equal(encode(clip, PROMPT), expected)
    assert changed.cond_stage_model.identify() != clip.cond_stage_model.identify()


def test_what_of_a_lora_is_not_done_to_a_clip(clip, sd3_clip, tmp_path):
    file, _, _ = lora_for_t5(tmp_path)
    adapter = fit_adapter(file, {})
    assert patch_clip(clip, adapter, 0.0) == (clip, ())
    sd3_clip.cond_stage_model.t5xxl = None
    with pytest.raises(ValueError, match="This CLIP has no T5-XXL"):
        patch_clip(sd3_clip, adapter, 1.0)
    save_file({"lora_te_elsewhere.alpha": torch.tensor(1.0)}, file)
    with pytest.raises(ValueError, match="changes what this text encoder does not have"):
        patch_clip(clip, fit_adapter(file, {}), 1.0)
    quantize_t5(DEMO, tmp_path / "int8", "int8")
    saved = load_clip(tmp_path / "int8", None, "cpu")
    file, _, _ = lora_for_t5(tmp_path)
    same, (notice,) = patch_clip(saved, adapter, 1.0)
    assert same is saved and "was saved in int8; use a T5 in bf16" in notice


def test_a_merge_of_it_is_refused(clip, theirs):
    """Either way round."""
    hosts = comfy.model_patcher.ModelPatcher(theirs, torch.device("cpu"), torch.device("cpu"))
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
