"""Embeddings on disk: what is written is read again, and what is not whole is never used."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.pipeline import DEMO, SigmaPipeline
from pixart_sigma.prompt_embeds import Encoded
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text.cache import CACHE_BYTES, EmbeddingCache, cache_key, user_cache_folder
from pixart_sigma.text.embeddings import TEXTS, PromptEmbeddings, write_tensors
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.identity import EncoderIdentity, identify
from pixart_sigma.text.quantize import quantize_t5

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[3]


def embeds(tokens=5, width=64, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(**fields) -> PromptEmbeddings:
    return PromptEmbeddings(**{"positive": embeds(), "negative": embeds(1, seed=1)} | fields)


def key_of(text: str) -> str:
    return cache_key(EncoderIdentity("some T5", "fp32"), CPU, text=text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_gives_back_all_of_it(tmp_path, dtype):
    fields = {
        "positive_text": "A Red “circle” \n雪の中の狐 🦊",
        "negative_text": "blurry",
        "precision": "nf4",
        "clean_caption": True,
        "fingerprint": "12ab",
        "positive_truncated": "boat boat",
        "negative_truncated": "x",
        "max_sequence_length": 77,
    }
    written = made(positive=embeds(299, dtype=dtype), negative=embeds(1, dtype=dtype), **fields)
    written.save(tmp_path / "prompt.safetensors")
    read = PromptEmbeddings.load(tmp_path / "prompt.safetensors")
    for name in ("positive", "negative"):
        assert getattr(read, name).dtype == dtype
        assert torch.equal(getattr(read, name), getattr(written, name))
    assert {name: getattr(read, name) for name in fields} == fields
    assert read.width == 64


def test_a_file_of_before_was_cut_at_300(tmp_path):
    path = tmp_path / "prompt.safetensors"
    texts = {name: "" for name in TEXTS} | {"positive_text": "a boat", "clean_caption": "false"}
    write_tensors(path, {"positive": embeds(), "negative": embeds(1)}, texts)
    read = PromptEmbeddings.load(path)
    assert (read.positive_text, read.max_sequence_length) == ("a boat", 300)


def test_a_file_holds_the_prompts_embeddings_and_where_they_are_from(pipeline_folder, tmp_path):
    pipeline = SigmaPipeline.from_path(pipeline_folder, Ways(device="cpu", t5_precision="bf16"))
    pipeline.encode_prompts(Settings("A Boat " + "boat " * 400, "blurry")).save(
        tmp_path / "prompt.safetensors"
    )
    read = PromptEmbeddings.load(tmp_path / "prompt.safetensors")
    expected = TextEncoder.load(pipeline_folder, precision="bf16").encode("A Boat " + "boat " * 400)
    assert torch.equal(read.positive, expected.prompt_embeds)
    assert read.positive_truncated == expected.truncated != ""
    assert (read.negative_text, read.negative_truncated, read.precision) == ("blurry", "", "bf16")
    assert read.fingerprint == identify(pipeline_folder).fingerprint


def test_one_prompt_may_be_both_prompts(tmp_path):
    made(negative=(same := embeds()), positive=same).save(tmp_path / "prompt.safetensors")
    read = PromptEmbeddings.load(tmp_path / "prompt.safetensors")
    assert torch.equal(read.positive, same) and torch.equal(read.negative, same)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"positive": embeds()[0]}, r"positive.*\(5, 64\)"),
        ({"positive": embeds().repeat(2, 1, 1)}, r"positive.*\(2, 5, 64\)"),
        ({"negative": embeds(0)}, r"negative.*\(1, 0, 64\)"),
        ({"negative": embeds(2, width=32)}, "64 wide.*32"),
        ({"positive": embeds() * torch.nan}, "positive.*not finite"),
        ({"positive": embeds().double()}, "float64"),
        ({"positive": embeds().long()}, "int64"),
    ],
)
def test_embeddings_that_are_none_are_refused(fields, message):
    with pytest.raises(SigmaError, match=message):
        made(**fields)


def change(path: Path, tensors=None, **metadata):
    """Rewrites a file with other tensors or metadata, as somebody else's program might."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(tensors or load_file(path), path, {k: v for k, v in (old | metadata).items() if v is not None})


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def not_finite_but_signed(path: Path):
    """The checksum is right, the numbers are not."""
    wrong = made()
    object.__setattr__(wrong, "positive", embeds() * torch.nan)
    wrong.save(path)


DAMAGES = {
    "not there": (Path.unlink, "no file"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut off"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:60]), "cut off"),
    "one bit": (flip_a_bit, "damaged"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "web page"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 40), "safetensors"),
    "a pickle": (lambda path: torch.save({"positive": embeds()}, path), "prompt embeddings"),
    "weights": (lambda path: save_file({"emb_params": embeds()[0]}, path), "format is None"),
    "a later version": (
        lambda path: change(path, format="pixart-sigma prompt embeddings 7"),
        r"newer version.*7",
    ),
    "another tensor": (lambda path: change(path, load_file(path) | {"extra": embeds()}), "extra"),
    "a missing tensor": (lambda path: change(path, {"positive": embeds()}), "positive, not"),
    "other numbers": (lambda path: change(path, {"positive": embeds(3), "negative": embeds(1)}), "changed"),
    "another text": (lambda path: change(path, positive_text="a cat"), "changed"),
    "no checksum": (lambda path: change(path, sha256=None), "changed"),
    "not finite": (not_finite_but_signed, "not finite"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_not_whole_is_named(tmp_path, damage, message):
    path = tmp_path / "prompt.safetensors"
    made(positive_text="a dog").save(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as raised:
        PromptEmbeddings.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES.values()], ids=DAMAGES)
def test_what_is_not_whole_is_a_miss_and_is_replaced(tmp_path, damage):
    cache, key = EmbeddingCache(tmp_path), key_of("a boat")
    made().save(cache.folder / f"{key}.safetensors")
    damage(cache.folder / f"{key}.safetensors")
    assert cache.get(key) is None
    cache.put(key, Encoded(embeds(), "cut"))
    found = cache.get(key)
    assert torch.equal(found.prompt_embeds, embeds()) and found.truncated == "cut"


def test_a_whole_file_under_another_prompts_name_is_a_miss(tmp_path):
    cache, red, blue = EmbeddingCache(tmp_path), key_of("red"), key_of("blue")
    cache.put(red, Encoded(embeds(), ""))
    shutil.copy(tmp_path / f"{red}.safetensors", tmp_path / f"{blue}.safetensors")
    assert cache.get(blue) is None and cache.get(red) is not None


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    made(positive_text="old").save(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SigmaError, match="No space left"):
        made(positive_text="new").save(path)
    assert PromptEmbeddings.load(path).positive_text == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_least_recently_used_go_first(tmp_path):
    size = _file_size(tmp_path / "one")
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=3 * size)
    foreign = tmp_path / "cache" / "keep.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"x" * 10 * size)
    for age, text in enumerate(("first", "second", "third")):
        cache.put(key_of(text), Encoded(embeds(), ""))
        moment = time.time() - 100 + age
        os.utime(tmp_path / "cache" / f"{key_of(text)}.safetensors", (moment, moment))
    assert cache.get(key_of("first")) is not None  # and so it is used last
    cache.put(key_of("fourth"), Encoded(embeds(), ""))
    held = [text for text in ("first", "second", "third", "fourth") if cache.get(key_of(text))]
    assert held == ["first", "third", "fourth"] and foreign.exists()


def test_files_of_a_date_to_come_go_before_all_others(tmp_path):
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=3 * _file_size(tmp_path / "one"))
    for text in ("first", "second", "third"):  # as after a clock that ran ahead was set right
        cache.put(key_of(text), Encoded(embeds(), ""))
        moment = time.time() + 1e8
        os.utime(tmp_path / "cache" / f"{key_of(text)}.safetensors", (moment, moment))
    assert cache.get(key_of("second")) is not None  # and so it was used before now
    for text in ("fourth", "fifth"):
        cache.put(key_of(text), Encoded(embeds(), ""))
    held = [text for text in ("first", "second", "third", "fourth", "fifth") if cache.get(key_of(text))]
    assert held == ["second", "fourth", "fifth"]


def nested(path: Path):
    header = b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def a_folder(path: Path):
    (path / "inside").mkdir(parents=True)


def too_large(path: Path):
    path.touch()
    os.truncate(path, 2**40)  # with no byte on the disk


@pytest.mark.parametrize(
    "put_there",
    [nested, a_folder, too_large, os.mkfifo, lambda path: path.symlink_to(path.parent / "foreign")],
    ids=["nested", "folder", "too large", "pipe", "link"],
)
def test_whatever_is_in_an_entrys_place_is_dropped(tmp_path, put_there):
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"somebody else's")
    cache, path = EmbeddingCache(tmp_path), tmp_path / f"{key_of('a boat')}.safetensors"
    put_there(path)
    assert cache.get(key_of("a boat")) is None and not os.path.lexists(path)
    put_there(path)  # since it was asked for
    cache.put(key_of("a boat"), Encoded(embeds(), ""))
    assert cache.get(key_of("a boat")) is not None
    assert foreign.read_bytes() == b"somebody else's"


def _file_size(folder: Path) -> int:
    cache = EmbeddingCache(folder)
    cache.put(key_of("x"), Encoded(embeds(), ""))
    return (folder / f"{key_of('x')}.safetensors").stat().st_size


def test_what_is_larger_than_the_cache_does_not_empty_it(tmp_path):
    cache = EmbeddingCache(tmp_path, max_bytes=2 * _file_size(tmp_path / "one"))
    cache.put(key_of("small"), Encoded(embeds(), ""))
    cache.put(key_of("large"), Encoded(embeds(5000), ""))
    assert cache.get(key_of("small")) is not None and cache.get(key_of("large")) is None


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_disk_that_takes_nothing_is_told_once(tmp_path, monkeypatch, caplog, number, words):
    cache, replace = EmbeddingCache(tmp_path), os.replace

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fails)
    for text in ("one", "two"):
        cache.put(key_of(text), Encoded(embeds(), ""))
    assert len(caplog.messages) == 1 and words in caplog.text and str(tmp_path) in caplog.text
    assert "\n" not in caplog.messages[0] and not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", replace)
    cache.put(key_of("one"), Encoded(embeds(), ""))
    assert cache.get(key_of("one")) is not None, "there is room again"


def test_a_folder_that_cannot_be_made_is_told_and_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = EmbeddingCache(tmp_path / "file" / "embeddings")
    cache.put(key_of("one"), Encoded(embeds(), ""))
    assert cache.get(key_of("one")) is None and len(caplog.messages) == 1


MANY = """
import sys, torch
from pixart_sigma.prompt_embeds import Encoded
from pixart_sigma.text.cache import EmbeddingCache, cache_key
from pixart_sigma.text.identity import EncoderIdentity
folder, max_bytes, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache = EmbeddingCache(folder, max_bytes)
random = torch.Generator().manual_seed(seed)
hits = 0
for number in torch.randint(0, 12, (200,), generator=random).tolist():
    key = cache_key(EncoderIdentity("some T5", "fp32"), torch.device("cpu"), text=str(number))
    found = cache.get(key)
    if found is None:
        cache.put(key, Encoded(torch.full((1, 5, 64), float(number)), str(number)))
    else:
        hits += 1
        assert (found.prompt_embeds == number).all() and found.truncated == str(number)
print(hits)
"""


def test_two_processes_share_a_cache_that_is_too_small_for_them(tmp_path):
    size = _file_size(tmp_path / "one")
    command = [sys.executable, "-c", MANY, tmp_path / "cache", str(6 * size)]
    running = [
        subprocess.Popen(
            [*command, str(seed)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for seed in (1, 2)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and err == "", err
        assert int(out) > 15
    left = list((tmp_path / "cache").iterdir())
    assert 0 < len(left) <= 6 and all(path.name.endswith(".safetensors") for path in left)


def test_all_that_decides_the_embeddings_decides_the_key():
    encoder, keys = EncoderIdentity("some T5", "int8"), set()
    keys.add(cache_key(encoder, CPU, text="a boat"))
    keys.add(cache_key(encoder, CPU, text="a  boat"))
    keys.add(cache_key(encoder, CPU, tokens=[[3, 1.0]]))
    keys.add(cache_key(encoder, CPU, tokens=[[3, 1.1]]))
    keys.add(cache_key(EncoderIdentity("some T5", "nf4"), CPU, text="a boat"))
    keys.add(cache_key(EncoderIdentity("another T5", "int8"), CPU, text="a boat"))
    keys.add(cache_key(encoder, torch.device("mps"), text="a boat"))
    assert len(keys) == 7 and all(len(key) == 64 for key in keys)
    assert cache_key(encoder, torch.device("cpu", 0), text="a boat") in keys


def test_an_encoder_is_known_by_its_weights_its_config_and_its_tokenizer(pipeline_folder, tmp_path):
    known = identify(pipeline_folder)
    assert known == identify(pipeline_folder / "text_encoder") and known.precision == "int8"
    shutil.copytree(pipeline_folder, tmp_path / "copy")
    assert identify(tmp_path / "copy", precision="fp32") == replace(known, precision="fp32")

    weights = tmp_path / "copy" / "text_encoder" / "model.safetensors"
    original = load_file(weights)
    last = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    changes = {
        "one number": original | {last: original[last].index_fill(1, torch.tensor([0]), 0.5)},
        "halves": {key: weight.half() for key, weight in original.items()},
    }
    seen = {known.fingerprint}
    for changed in changes.values():
        save_file({key: weight.contiguous() for key, weight in changed.items()}, weights)
        seen.add(identify(tmp_path / "copy").fingerprint)
    save_file(original, weights)
    assert identify(tmp_path / "copy").fingerprint == known.fingerprint

    config = tmp_path / "copy" / "text_encoder" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"layer_norm_epsilon": 1e-5}))
    seen.add(identify(tmp_path / "copy").fingerprint)
    config.write_text(text)
    settings = tmp_path / "copy" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"extra_ids": 0}))
    seen.add(identify(tmp_path / "copy").fingerprint)
    seen.add(identify(pipeline_folder, DEMO / "tokenizer").fingerprint)
    assert len(seen) == 6


def test_a_quantised_encoder_and_a_broken_one(pipeline_folder, tmp_path):
    quantize_t5(pipeline_folder / "text_encoder", tmp_path / "t5", "nf4")
    known = identify(tmp_path / "t5")
    assert known.precision == "nf4" and known.fingerprint != identify(pipeline_folder).fingerprint
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        identify(tmp_path / "t5")


@pytest.fixture
def loads(monkeypatch):
    """How often a T5 was loaded."""
    seen, load = [], TextEncoder.load
    monkeypatch.setattr(TextEncoder, "load", lambda *given, **named: seen.append(1) or load(*given, **named))
    return seen


@pytest.fixture
def draw(pipeline_folder, tmp_path, loads):
    """The latents of a run, and whether it loaded T5."""

    def run(prompt="a boat", negative="", cache=None, folder=pipeline_folder, release="free", **settings):
        pipeline = SigmaPipeline.from_path(
            folder, Ways(device="cpu", t5_precision=settings.pop("t5_precision", "fp32"), release=release)
        )
        before = len(loads)
        cache = cache or EmbeddingCache(tmp_path / "cache")
        size = {"width": 64, "height": 64, "steps": 1, "binning": False}
        result = pipeline.generate(Settings(prompt, negative, **size, **settings), embedding_cache=cache)
        return result, len(loads) > before

    return run


@pytest.mark.parametrize("release", ["free", "keep"])
def test_a_prompt_seen_before_draws_the_same_without_t5(draw, release):
    long = "A Boat " + "boat " * 400
    first, loaded = draw(long, "blurry", release=release)
    assert loaded
    second, loaded = draw(long.lower(), "blurry", release=release)
    assert not loaded and torch.equal(first.latents, second.latents)
    assert first.truncated == second.truncated != ""
    assert second.metadata.ways.t5_precision == "fp32"
    assert draw(long, "blurry", guidance_scale=1.0)[1] is False


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a boat!"},
        {"negative": "blurry"},
        {"t5_precision": "bf16"},
        {"prompt": "a boat <b>and a</b> house", "clean_caption": True},
        {"max_sequence_length": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_new_is_encoded(draw, change):
    draw("a boat")
    draw("a boat <b>and a</b> house")
    first, loaded = draw(**change)
    assert loaded
    assert draw(**change)[1] is False


def test_another_t5_in_the_same_place_is_encoded_anew(draw, pipeline_folder, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    old, _ = draw(folder=folder)
    assert draw(folder=folder)[1] is False
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({key: weight * 1.01 for key, weight in load_file(weights).items()}, weights)
    new, loaded = draw(folder=folder)
    assert loaded and not torch.equal(old.latents, new.latents)


def test_a_t5_that_is_kept_answers_for_itself(pipeline_folder, tmp_path, loads):
    """Its files are replaced while it is in memory."""
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    held = SigmaPipeline.from_path(folder, Ways(device="cpu", t5_precision="fp32", release="keep"))
    cache = EmbeddingCache(tmp_path / "cache")
    held.encode_prompts(Settings("a boat"), embedding_cache=cache)
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({key: weight * 1.01 for key, weight in load_file(weights).items()}, weights)
    old = held.encode_prompts(Settings("a house"), embedding_cache=cache)
    fresh = SigmaPipeline.from_path(folder, Ways(device="cpu", t5_precision="fp32"))
    new = fresh.encode_prompts(Settings("a house"), embedding_cache=cache)
    assert len(loads) == 2 and not torch.equal(old.positive, new.positive)


def test_a_full_disk_does_not_stop_the_run(draw, monkeypatch, caplog):
    expected, _ = draw(cache=EmbeddingCache("/nowhere/at/all", max_bytes=0))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result, loaded = draw()
    assert loaded and torch.equal(result.latents, expected.latents)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([record for record in told if "cached" in record.getMessage()]) == 1


def test_encoded_prompts_need_no_t5(draw, pipeline_folder, tmp_path, loads):
    expected, _ = draw("a boat", "blurry")
    embeddings = SigmaPipeline.from_path(
        pipeline_folder, Ways(device="cpu", t5_precision="fp32")
    ).encode_prompts(Settings("a boat", "blurry"))
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    shutil.rmtree(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    del index["text_encoder"]
    (folder / "model_index.json").write_text(json.dumps(index))
    del loads[:]
    without = SigmaPipeline.from_path(folder, Ways(device="cpu"), needs_text_encoder=False)
    size = {"width": 64, "height": 64, "steps": 1, "binning": False}
    result = without.generate(Settings(**size), embeddings=embeddings)
    assert torch.equal(result.latents, expected.latents) and not loads
    assert result.metadata.settings.prompt == "a boat" and result.metadata.settings.negative == "blurry"
    with pytest.raises(SigmaError, match="no text encoder"):
        without.generate(Settings("a boat", **size))
    with pytest.raises(SigmaError, match="negative"):
        without.generate(Settings(negative="ugly", **size), embeddings=embeddings)


def test_embeddings_of_another_width_are_named_before_anything_loads(pipeline_folder, monkeypatch):
    monkeypatch.setattr("pixart_sigma.memory.stages.Stages.run", lambda *_: 1 / 0)
    wrong = made(positive=embeds(width=4096), negative=embeds(1, width=4096))
    with pytest.raises(SigmaError, match="4096 wide.*64"):
        SigmaPipeline.from_path(pipeline_folder, Ways(device="cpu")).generate(Settings(), embeddings=wrong)


def test_the_users_cache_folder(monkeypatch, tmp_path):
    assert CACHE_BYTES == 256 * 1024 * 1024
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/somebody")
    if os.name != "nt":
        assert user_cache_folder() == tmp_path / "pixart_sigma" / "embeddings"
        for unset in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
            assert user_cache_folder() == Path("/home/somebody/.cache/pixart_sigma/embeddings")


def test_the_demos_embeddings_are_of_the_demos_t5():
    """If not: pixart-sigma encode "a red square to the left of a blue star on a white background"
    --t5-precision fp16 --no-embedding-cache --out pixart_sigma/demo/prompt_embeddings.safetensors"""
    embeddings = PromptEmbeddings.load(DEMO / "prompt_embeddings.safetensors")
    assert embeddings.fingerprint == identify(DEMO).fingerprint
    result = SigmaPipeline.from_path("demo", Ways(device="cpu")).generate(
        Settings(steps=1), embeddings=embeddings
    )
    assert result.metadata.settings.prompt == "a red square to the left of a blue star on a white background"
