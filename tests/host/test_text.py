"""The T5 encoder as the host's CLIP, with the built-in demo model, on the CPU."""

TEXT_ENCODER = """
import logging, sys
import torch
import pack.nodes.text, pack.nodes.memory
assert "diffusers" not in sys.modules, "importing the nodes must not import diffusers"
import comfy.sd, comfy.sampler_helpers, comfy.text_encoders.pixart_t5 as pixart_t5
import nodes as host_nodes
from pack.nodes.host.text_encoder import load_clip
from pack.pixart_sigma import DEMO, TextEncoder
from pack.pixart_sigma.files.weight_files import read_state_dict

logged = []
class Keep(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())
logging.getLogger().addHandler(Keep(logging.WARNING))

def encode(clip, text, **options):
    (conditioning,) = [clip.encode_from_tokens_scheduled(clip.tokenize(text, **options))]
    assert len(conditioning) == 1 and conditioning[0][1] == {"pooled_output": None}
    return conditioning[0][0]

def raises(kind, message, act):
    try:
        act()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was raised instead of {message}")

with torch.inference_mode():
    PROMPT = "  A Red circle on the left, a blue square  "
    engine = TextEncoder.load(DEMO, precision="fp32")
    clip = load_clip(DEMO, "fp32", "auto")

    # unweighted: the engine's own embeddings, through the host's nodes, loaded at the first encode
    assert clip.cond_stage_model.encoder is None
    (conditioning,) = host_nodes.CLIPTextEncode().encode(clip, PROMPT)
    assert clip.cond_stage_model.encoder is not None
    expected = engine.encode(PROMPT).prompt_embeds
    assert torch.equal(conditioning[0][0], expected) and conditioning[0][0].dtype == torch.float32
    assert encode(clip, "").shape == (1, 1, 128)
    assert clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[1] is None
    assert torch.equal(clip.encode_from_tokens(clip.tokenize(PROMPT)), expected)
    assert "cross_attn" in comfy.sampler_helpers.convert_cond(conditioning)[0]
    (zeroed,) = host_nodes.ConditioningZeroOut().zero_out(conditioning)
    assert not zeroed[0][0].any()
    (averaged,) = host_nodes.ConditioningAverage().addWeighted(conditioning, zeroed, 0.5)
    torch.testing.assert_close(averaged[0][0], expected / 2)

    # prompt weights and layers: the host's own T5 on the same weights, tokenised alike
    config = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 128}
    theirs = pixart_t5.PixArtT5XXL("cpu", torch.float32, {"t5xxl_model_config": config})
    weights = {key: value.float() for key, value in read_state_dict(DEMO / "text_encoder").items()}
    missing, unexpected = theirs.load_sd(weights)
    assert not [key for key in missing if "embed_tokens" not in key] and not unexpected, (missing, unexpected)
    for prompt in ("a (red:1.3) circle", "(a (red) circle)", "(a red:0.5) (blue:-1) square", PROMPT):
        tokens = clip.tokenize(prompt)
        ours, host = encode(clip, prompt), theirs.encode_token_weights(tokens)[0]
        assert (ours - host).abs().max() < 1e-5, (prompt, (ours - host).abs().max())
    assert [weight for _, weight in clip.tokenize("a (red:1.3) circle")["t5xxl"][0]].count(1.3) > 0
    words = [word for *_, word in clip.tokenize("a (red:1.3)", return_word_ids=True)["t5xxl"][0]]
    assert words[0] == 1 and words[-2:] == [2, 0]
    assert torch.equal(encode(clip, r"a \\(red\\)"), engine.encode("a (red)").prompt_embeds)
    (lower,) = host_nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    theirs.set_clip_options({"layer": -2})
    assert (encode(lower, PROMPT) - theirs.encode_token_weights(clip.tokenize(PROMPT))[0]).abs().max() < 1e-5
    assert torch.equal(encode(clip, PROMPT), expected), "the clone's layer must stay its own"
    deep = clip.clone()
    deep.clip_layer(-9)
    raises(ValueError, "no layer -9", lambda: encode(deep, PROMPT))

    # cleaned captions have no weights
    cleaned = clip.tokenize("a (red:1.3) circle <b>x</b>", clean_caption=True)
    assert {weight for _, weight in cleaned["t5xxl"][0]} == {1.0}
    assert torch.equal(
        encode(clip, "a (red:1.3) circle", clean_caption=True),
        engine.encode("a (red:1.3) circle", clean_caption=True).prompt_embeds,
    )

    # 300 tokens; what is cut is quoted
    logged.clear()
    long = "red circle " * 400 + "(blue:1.2) square"
    cut = engine.encode("red circle " * 400 + "blue square")
    assert encode(clip, "red circle " * 400).shape[1] == 300
    assert len(logged) == 1 and "red circle" in logged[0]
    encode(clip, long)
    assert logged[-1].count("red circle") == logged[0].count("red circle") and "blue square" in logged[-1]
    assert torch.equal(encode(clip, "red circle " * 400)[:, :299], cut.prompt_embeds[:, :299])

    # the host's tokenizer options belong to one clone
    padded = clip.clone()
    padded.set_tokenizer_option("t5xxl_min_length", 40)
    padded.set_tokenizer_option("t5xxl_min_padding", 2)
    assert encode(padded, "red").shape[1] == 40 and encode(clip, "red").shape[1] < 10
    assert clip.tokenizer.decode([token for token, _ in clip.tokenize("red")["t5xxl"][0]]) == "red"

    # LoRA: nothing applied, said once
    logged.clear()
    patched = clip.clone()
    assert patched.add_patches({"some.weight": ("diff", (torch.zeros(1),))}, 1.0) == []
    assert clip.add_patches({"some.weight": ("diff", (torch.zeros(1),))}, 1.0) == []
    assert len(logged) == 1 and "LoRA" in logged[0], logged
    _, loaded = comfy.sd.load_lora_for_models(None, clip, {}, 1.0, 1.0)
    assert torch.equal(encode(loaded, PROMPT), expected) and clip.get_key_patches() == {}
    raises(ValueError, "quantize-t5", clip.get_sd)

    # 8 and 4 bit: near the exact ones, as large as expected before they are loaded
    for precision, bound in (("int8", 0.1), ("nf4", 0.5)):
        small = load_clip(DEMO, precision, "cpu")
        before = small.patcher.model_size()
        result = encode(small, PROMPT)
        assert result.dtype == torch.float32
        error = (result - expected).norm() / expected.norm()
        assert error < bound, (precision, error)
        # a CPU with AVX512-BF16 makes bitsandbytes keep the scales of 4 bit in bf16
        after = small.patcher.model_size()
        assert 0.95 * before < after < 1.02 * before, (before, after)
    print("done")
"""

NODE = """
import shutil, torch
from pack.nodes.host import embeddings
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.text import TextEncode
from pack.pixart_sigma import DEMO, TextEncoder
import comfy.model_management, comfy.sd, comfy.utils

calls = []
comfy.utils.set_progress_bar_global_hook(lambda *call, **_: calls.append(call[:2]))

def raises(kind, message, act):
    try:
        act()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was raised instead of {message}")

with torch.inference_mode():
    TextEncode.GET_NODE_INFO_V1()
    clip = load_clip(DEMO, "int8", "cpu")
    engine = TextEncoder.load(DEMO, precision="int8")
    for mode in ("keep", "free", "offload"):
        prompt = f"A red circle to {mode}"  # one that is not cached
        positive, negative = TextEncode.execute(clip, prompt, "", False, mode).result
        assert torch.equal(positive[0][0], engine.encode(prompt).prompt_embeds.float())
        assert negative[0][0].shape == (1, 1, 128)
        loaded = [entry for entry in comfy.model_management.current_loaded_models]
        assert len(loaded) == (1 if mode == "keep" else 0), (mode, loaded)
        assert (clip.cond_stage_model.encoder is None) == (mode == "free")
    assert calls[0][0] == 1 and calls[-1][0] == calls[-1][1] > 20, calls

    # the host's own encoder
    class HostClip:
        def __init__(self, width):
            self.width, self.seen = width, []
            self.patcher = clip.patcher
        def tokenize(self, text):
            self.seen.append(text)
            return text
        def encode_from_tokens_scheduled(self, tokens):
            return [[torch.zeros(1, 3, self.width), {"pooled_output": None}]]
    theirs = HostClip(4096)
    positive, _ = TextEncode.execute(theirs, " A (Red:1.3) circle ", "", False, "keep").result
    assert positive[0][0].shape == (1, 3, 4096) and theirs.seen == ["a (red:1.3) circle", ""]
    TextEncode.execute(theirs, "A (Red:1.3) circle", "", True, "keep")
    assert "(" not in theirs.seen[2]
    wrong = HostClip(2048)
    raises(ValueError, "2048 numbers wide", lambda: TextEncode.execute(wrong, "x", "", False, "keep"))
    raises(ValueError, "no text encoder", lambda: TextEncode.execute(None, "x", "", False, "keep"))

    # the host's KSampler and its own PixArt take the conditioning, positive and negative of unequal lengths
    import comfy.model_patcher, comfy.supported_models
    import nodes as host_nodes
    config = comfy.supported_models.PixArtSigma(
        {"image_model": "pixart_sigma", "hidden_size": 48, "depth": 1, "num_heads": 2, "input_size": 32,
         "caption_channels": 128, "model_max_length": 300, "micro_condition": False, "pe_interpolation": 1})
    config.set_inference_dtype(torch.float32, None)
    native = config.get_model({})
    generator = torch.Generator().manual_seed(0)
    for weight in native.diffusion_model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    model = comfy.model_patcher.ModelPatcher(native, torch.device("cpu"), torch.device("cpu"))
    positive, negative = TextEncode.execute(clip, "A red circle on the left", "", False, "free").result
    latent = {"samples": torch.zeros(1, 4, 64, 64)}
    (sampled,) = host_nodes.KSampler().sample(
        model, 0, 2, 4.5, "euler", "normal", positive, negative, latent)
    assert sampled["samples"].isfinite().all() and sampled["samples"].std() > 0.1
    (entry,) = comfy.model_management.current_loaded_models
    assert entry.model.is_clone(model)
    from pack.nodes.host.release import release
    release(model, "free")
    assert comfy.model_management.current_loaded_models == []

    # streamed: the same embeddings, the host counts the window only, and an interrupt between blocks
    for precision in ("int8", "bf16"):
        resident, streamed = (load_clip(DEMO, precision, device) for device in ("cpu", "stream"))
        whole, window = resident.patcher.model_size(), streamed.patcher.model_size()
        assert window < 0.6 * whole, (window, whole)
        expected, _ = TextEncode.execute(resident, "A (red:1.3) circle", "", False, "free").result
        calls.clear()
        for mode in ("keep", "offload", "free"):
            shutil.rmtree(embeddings._cache_folder())  # what is known is not encoded
            positive, _ = TextEncode.execute(streamed, "A (red:1.3) circle", "", False, mode).result
            assert torch.equal(positive[0][0], expected[0][0])
            encoder = streamed.cond_stage_model.encoder
            assert (encoder is None) == (mode == "free")
            if mode == "keep":
                assert streamed.patcher.loaded_size() == streamed.patcher.model_size() == window
                assert streamed.patcher.is_clone(comfy.model_management.current_loaded_models[0].model)
        assert comfy.model_management.current_loaded_models == []
        assert (0, 2) in calls and calls[-1] == (2, 2), calls  # the host leaves out quick ones
        encode_ids = TextEncoder.encode_ids
        def interrupted(self, *given):
            comfy.model_management.interrupt_current_processing(True)
            return encode_ids(self, *given)
        TextEncoder.encode_ids = interrupted
        try:
            TextEncode.execute(streamed, "x", "", False, "free")
        except comfy.model_management.InterruptProcessingException:
            pass
        else:
            raise AssertionError("the interrupt was swallowed")
        finally:
            TextEncoder.encode_ids = encode_ids
        assert comfy.model_management.current_loaded_models == []
    raises(ValueError, "can not be streamed", lambda: TextEncode.execute(
        load_clip(DEMO, "nf4", "stream"), "x", "", False, "free"))

    # an interrupt while T5 loads, in a worker thread (fp32) and in the main one (int8)
    for precision in ("fp32", "int8"):
        fresh = load_clip(DEMO, precision, "cpu")
        fresh.tokenize("x")
        comfy.model_management.interrupt_current_processing(True)
        try:
            TextEncode.execute(fresh, "x", "", False, "keep")
        except comfy.model_management.InterruptProcessingException:
            pass
        else:
            raise AssertionError("the interrupt was swallowed")
        assert fresh.cond_stage_model.encoder is None
        assert not any(entry.model is fresh.patcher for entry in comfy.model_management.current_loaded_models)
        TextEncode.execute(fresh, "x", "", False, "free")
    raises(ValueError, "nowhere", lambda: TextEncode.execute(
        load_clip(DEMO / "nowhere", "int8", "cpu"), "x", "", False, "free"))
    print("done")
"""


def test_the_encoder_answers_as_the_hosts_clip(run_in_host):
    assert run_in_host(TEXT_ENCODER).strip().endswith("done")


def test_the_text_node(run_in_host):
    assert run_in_host(NODE).strip().endswith("done")
