"""Σ Text Encode in the real host: its modes, other encoders, streaming, and interrupts. On the CPU."""

import shutil

import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import torch
from pack.nodes.host import embeddings
from pack.nodes.host.release import release
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.text import EncodePromptList, TextEncode
from pack.pixart_sigma import DEMO, TextEncoder
from pack.pixart_sigma.text.blocks import StoredBlocks

import nodes as host_nodes

WEIGHTED = "A (red:1.3) circle"


@pytest.fixture
def progress():
    """What the host's progress bar is told: (done, of so many)."""
    calls = []
    comfy.utils.set_progress_bar_global_hook(lambda *call, **_: calls.append(call[:2]))
    yield calls
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture
def clip():
    return load_clip(DEMO, "int8", "cpu")


@pytest.fixture
def no_cache():
    """Prompts that are known are not encoded."""
    shutil.rmtree(embeddings._cache_folder(), ignore_errors=True)


def encode(clip, positive, mode, negative="", clean_caption=False):
    """The embeddings of both prompts."""
    made = TextEncode.execute(clip, positive, negative, clean_caption, mode).result
    return [conditioning[0][0] for conditioning in made]


def test_the_node_has_a_description_that_the_host_can_read():
    assert TextEncode.GET_NODE_INFO_V1()


def test_each_mode_leaves_the_encoder_where_it_says(clip, progress, no_cache):
    engine = TextEncoder.load(DEMO, precision="int8")
    progress.clear()
    for mode in ("keep", "free", "offload"):
        prompt = f"A red circle to {mode}"
        positive, negative = encode(clip, prompt, mode)
        assert torch.equal(positive, engine.encode(prompt).prompt_embeds.float())
        assert negative.shape == (1, 1, 128)
        assert len(management.current_loaded_models) == (1 if mode == "keep" else 0), mode
        assert (clip.cond_stage_model.encoder is None) == (mode == "free")
    assert progress[0][0] == 1 and progress[-1][0] == progress[-1][1] > 20


class HostClip:
    """As an encoder of the host answers, with embeddings of any width."""

    def __init__(self, width, patcher):
        self.width, self.patcher, self.seen = width, patcher, []

    def tokenize(self, text):
        self.seen.append(text)
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.zeros(1, 3, self.width), {"pooled_output": None}]]


def test_the_hosts_own_encoder_gets_prepared_prompts(clip):
    theirs = HostClip(4096, clip.patcher)
    positive, _ = encode(theirs, " A (Red:1.3) circle ", "keep")
    assert positive.shape == (1, 3, 4096) and theirs.seen == ["a (red:1.3) circle", ""]
    encode(theirs, "A (Red:1.3) circle", "keep", clean_caption=True)
    assert "(" not in theirs.seen[2]


def test_what_is_no_t5_xxl_is_refused(clip):
    with pytest.raises(ValueError, match="2048 numbers wide"):
        encode(HostClip(2048, clip.patcher), "x", "keep")
    with pytest.raises(ValueError, match="no text encoder"):
        encode(None, "x", "keep")
    with pytest.raises(ValueError, match="nowhere"):
        encode(load_clip(DEMO / "nowhere", "int8", "cpu"), "x", "free")


def hosts_pixart():
    """The host's own PixArt, small, with random weights."""
    config = comfy.supported_models.PixArtSigma(
        {
            "image_model": "pixart_sigma",
            "hidden_size": 48,
            "depth": 1,
            "num_heads": 2,
            "input_size": 32,
            "caption_channels": 128,
            "model_max_length": 300,
            "micro_condition": False,
            "pe_interpolation": 1,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    native = config.get_model({})
    generator = torch.Generator().manual_seed(0)
    for weight in native.diffusion_model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return comfy.model_patcher.ModelPatcher(native, torch.device("cpu"), torch.device("cpu"))


def test_the_hosts_ksampler_and_pixart_take_the_conditioning(clip):
    """Positive and negative of unequal lengths."""
    model = hosts_pixart()
    positive, negative = TextEncode.execute(clip, "A red circle on the left", "", False, "free").result
    latent = {"samples": torch.zeros(1, 4, 64, 64)}
    (sampled,) = host_nodes.KSampler().sample(model, 0, 2, 4.5, "euler", "normal", positive, negative, latent)
    assert sampled["samples"].isfinite().all() and sampled["samples"].std() > 0.1
    (entry,) = management.current_loaded_models
    assert entry.model.is_clone(model)
    release(model, "free")
    assert management.current_loaded_models == []


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_streamed_the_embeddings_are_the_same_and_the_host_counts_the_window(precision, progress, no_cache):
    resident, streamed = (load_clip(DEMO, precision, device) for device in ("cpu", "stream"))
    whole, window = resident.patcher.model_size(), streamed.patcher.model_size()
    assert window < 0.6 * whole
    expected, _ = encode(resident, WEIGHTED, "free")
    progress.clear()
    for mode in ("keep", "offload", "free"):
        shutil.rmtree(embeddings._cache_folder())
        positive, _ = encode(streamed, WEIGHTED, mode)
        assert torch.equal(positive, expected)
        assert (streamed.cond_stage_model.encoder is None) == (mode == "free")
        if mode == "keep":
            assert streamed.patcher.loaded_size() == streamed.patcher.model_size() == window
            assert streamed.patcher.is_clone(management.current_loaded_models[0].model)
    assert management.current_loaded_models == []
    assert (0, 2) in progress and progress[-1] == (2, 2)  # the host leaves out quick ones


def interrupted(clip, mode):
    with pytest.raises(management.InterruptProcessingException):
        encode(clip, "x", mode)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_an_interrupt_between_streamed_blocks_frees_the_encoder(precision, no_cache, monkeypatch):
    streamed = load_clip(DEMO, precision, "stream")
    encode_each = TextEncoder.encode_each

    def interrupt_and_encode(self, *given):
        management.interrupt_current_processing(True)
        return encode_each(self, *given)

    monkeypatch.setattr(TextEncoder, "encode_each", interrupt_and_encode)
    interrupted(streamed, "free")
    assert management.current_loaded_models == [] and not streamed.cond_stage_model.ahead


def test_4_bit_can_not_be_streamed():
    with pytest.raises(ValueError, match="can not be streamed"):
        encode(load_clip(DEMO, "nf4", "stream"), "x", "free")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_interrupt_while_t5_loads_leaves_it_to_be_loaded(precision, no_cache):
    """It loads in a worker thread (fp32), or in the main one (int8)."""
    fresh = load_clip(DEMO, precision, "cpu")
    fresh.tokenize("x")
    management.interrupt_current_processing(True)
    interrupted(fresh, "keep")
    assert fresh.cond_stage_model.encoder is None
    assert not any(entry.model is fresh.patcher for entry in management.current_loaded_models)
    encode(fresh, "x", "free")


@pytest.fixture
def input_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    return tmp_path


def encode_list(clip, prompts="", file="none", negative="", seed=0, after_use="free"):
    return EncodePromptList.execute(clip, prompts, file, negative, seed, False, after_use).result


def test_a_list_is_encoded_with_t5_loaded_once(clip, progress, no_cache, monkeypatch):
    loads, load = [], TextEncoder.load
    monkeypatch.setattr(TextEncoder, "load", lambda *given, **named: loads.append(1) or load(*given, **named))
    positive, negative, seeds, texts = encode_list(
        clip, "a red circle\n\n a blue star ", negative="fog", seed=5
    )
    assert len(loads) == 1 and clip.cond_stage_model.encoder is None
    assert (seeds, texts) == ([5, 6], ["a red circle", "a blue star"])
    assert progress[-1] == (3, 3)  # what both leave out is encoded once
    for index, text in enumerate(texts):
        expected = encode(clip, text, "free", negative="fog")
        assert torch.equal(positive[index][0][0], expected[0])
        assert torch.equal(negative[index][0][0], expected[1])


def test_a_streamed_t5_is_read_once_for_all_that_are_not_cached(progress, no_cache, monkeypatch):
    """A prompt is what it is alone; a weighted one, which needs another of padding, too."""
    read, blocks = StoredBlocks.read, []
    monkeypatch.setattr(StoredBlocks, "read", lambda self, index: blocks.append(index) or read(self, index))
    streamed, texts = load_clip(DEMO, "bf16", "stream"), ["a red circle", WEIGHTED, "a blue star, a moon"]
    expected = [encode(streamed, text, "keep", negative="fog")[0] for text in texts]
    assert sorted(blocks) == [0, 0, 0, 1, 1, 1]  # the negative prompt is cached after the first
    for known, times in ((), 1), (texts[:1], 1), (texts, 0):
        shutil.rmtree(embeddings._cache_folder())
        for text in known:
            encode(streamed, text, "keep", negative="fog")
        blocks.clear()
        positive, *_ = encode_list(streamed, "\n".join(texts), negative="fog", after_use="keep")
        assert sorted(blocks) == [0] * times + [1] * times
        assert all(torch.equal(made[0][0], alone) for made, alone in zip(positive, expected, strict=True))
    assert not streamed.cond_stage_model.ahead
    release(streamed, "free")


def test_a_file_of_the_input_folder_brings_prompts_and_more(clip, input_folder):
    (input_folder / "many.csv").write_text("prompt,negative,seed\na star,fog,\na circle,,9\n")
    options = EncodePromptList.define_schema().inputs[2].options
    assert options == ["none", "many.csv"]
    before = EncodePromptList.fingerprint_inputs(file="many.csv", prompts="")
    _, negative, seeds, texts = encode_list(clip, "ignored", "many.csv", negative="grey", seed=3)
    assert (seeds, texts) == ([3, 9], ["a star", "a circle"])
    assert torch.equal(negative[1][0][0], encode(clip, "a star", "free", negative="grey")[1])
    (input_folder / "many.csv").write_text("prompt\na star\n")
    assert EncodePromptList.fingerprint_inputs(file="many.csv", prompts="") != before


@pytest.mark.parametrize(
    "prompts, rows, words",
    [
        (" \n", None, "no prompt; write one"),
        ("", '{"prompt": "a", "steps": 4}', "row 1: it sets steps"),
        ("", '"a"\n{"seed": 4}', "row 2: it has no prompt"),
        ("", '"a"\n{"prompt": "a", "seed": -1}', "row 2: seed is -1"),
    ],
)
def test_a_list_that_cannot_be_used_loads_nothing(clip, input_folder, prompts, rows, words):
    if rows:
        (input_folder / "rows.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=words):
        encode_list(clip, prompts, "rows.jsonl" if rows else "none")
    assert clip.cond_stage_model.encoder is None


def test_a_file_that_is_not_offered_is_not_read(clip, input_folder):
    (input_folder.parent / "secret.txt").write_text("a prompt")
    for name in ("../secret.txt", str(input_folder.parent / "secret.txt"), "none.txt"):
        with pytest.raises(ValueError, match="no file"):
            encode_list(clip, "", name)


def test_an_interrupt_between_prompts_releases_the_encoder(clip, no_cache, monkeypatch):
    encode_one = TextEncoder.encode_ids

    def then_interrupt(self, *given):
        management.interrupt_current_processing(True)
        return encode_one(self, *given)

    monkeypatch.setattr(TextEncoder, "encode_ids", then_interrupt)
    with pytest.raises(management.InterruptProcessingException):
        encode_list(clip, "a\nb")
    assert clip.cond_stage_model.encoder is None
