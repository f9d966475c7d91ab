"""Prompt embeddings on disk in a real server: saved, loaded, cached across a restart, and refused."""

import shutil

import numpy as np
import pytest
from hosts import start_server
from prompts import node, number, quick, to_prompt
from server import DEMO, PACK, Rejected

LOADED = "Requested to load SigmaTextModel"  # the host's words, when T5 is brought into memory


@pytest.fixture(scope="module")
def own_server(host, tmp_path_factory):
    """A server of its own, for its log and its restart."""
    running = start_server(host, tmp_path_factory.mktemp("embeddings"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def demo_prompt(own_server):
    workflow = PACK / "example_workflows" / "demo_text_to_image.json"
    return quick(to_prompt(workflow, own_server.get("/object_info")))


def picture(server, prompt) -> np.ndarray:
    run = server.run(prompt)
    assert run.status == "success", run.error
    return server.pictures(run, number(prompt, "SaveImage"))[0]


def with_save(prompt: dict, prefix="prompt") -> dict:
    text = number(prompt, "PixArtSigmaTextEncode")
    inputs = {"positive": [text, 0], "negative": [text, 1], "filename_prefix": prefix}
    return prompt | {"keep": {"class_type": "PixArtSigmaSaveEmbeddings", "inputs": inputs}}


def with_load(prompt: dict, choice: str) -> dict:
    """The prompt without its text and T5, drawing from a file."""
    gone = {number(prompt, "PixArtSigmaTextEncode"), number(prompt, "PixArtSigmaLoadTextEncoder")}
    prompt = {key: entry for key, entry in prompt.items() if key not in gone}
    sampler = number(prompt, "PixArtSigmaSampler")
    inputs = prompt[sampler]["inputs"] | {"positive": ["words", 0], "negative": ["words", 1], "seed": 0}
    words = {"class_type": "PixArtSigmaLoadEmbeddings", "inputs": {"prompt_embeddings": choice}}
    return prompt | {sampler: prompt[sampler] | {"inputs": inputs}, "words": words}


def test_saved_prompts_draw_the_same_picture(own_server, demo_prompt):
    run = own_server.run(with_save(demo_prompt, "shapes/circle"))
    assert run.status == "success", run.error
    assert run.outputs["keep"]["text"] == ["output/shapes/circle_00001_.safetensors"]
    (expected,) = own_server.pictures(run, number(demo_prompt, "SaveImage"))
    loaded = picture(own_server, with_load(demo_prompt, "output/shapes/circle_00001_.safetensors"))
    assert np.array_equal(loaded, expected) and loaded.std() > 5
    other = with_save(demo_prompt, "shapes/circle")
    node(other, "PixArtSigmaTextEncode")["positive"] = "a yellow star"
    assert own_server.run(other).outputs["keep"]["text"] == ["output/shapes/circle_00002_.safetensors"]


def test_a_changed_file_is_read_again_and_a_damaged_one_is_named(own_server, demo_prompt):
    own_server.run(with_save(demo_prompt, "red"))
    blue = with_save(demo_prompt, "blue")
    blue[number(blue, "PixArtSigmaTextEncode")] = {
        "class_type": "PixArtSigmaTextEncode",
        "inputs": node(blue, "PixArtSigmaTextEncode") | {"positive": "a blue star on a white background"},
    }
    expected = picture(own_server, blue)
    folder = own_server.base / "output" / "prompt_embeddings"
    given = own_server.base / "input" / "prompt_embeddings" / "given.safetensors"
    given.parent.mkdir(parents=True)
    shutil.copy(folder / "red_00001_.safetensors", given)
    prompt = with_load(demo_prompt, "input/given.safetensors")
    assert not np.array_equal(picture(own_server, prompt), expected)
    shutil.copy(folder / "blue_00001_.safetensors", given)
    assert np.array_equal(picture(own_server, prompt), expected)

    content = bytearray(given.read_bytes())
    content[-5] ^= 1
    given.write_bytes(content)
    run = own_server.run(prompt)
    assert run.failed == "words" and "given.safetensors" in run.error and "damaged" in run.error
    given.write_bytes(content[:-200])
    run = own_server.run(prompt)
    assert run.failed == "words" and "cut off" in run.error
    assert own_server.run(with_load(demo_prompt, DEMO)).status == "success"


@pytest.mark.parametrize(
    "choice",
    ["../../custom_nodes/x.safetensors", "output/../../x.safetensors", "/etc/passwd", "input/no.safetensors"],
)
def test_a_file_that_is_not_offered_is_refused(own_server, demo_prompt, choice):
    with pytest.raises(Rejected) as refused:
        own_server.submit(with_load(demo_prompt, choice))
    assert "words" in refused.value.node_errors


@pytest.mark.parametrize("prefix", ["../out", "/etc/out", "a/../../out", "", ".hidden"])
def test_a_prefix_that_leads_elsewhere_is_refused(own_server, demo_prompt, prefix):
    run = own_server.run(with_save(demo_prompt, prefix))
    assert run.failed == "keep" and repr(prefix) in run.error, run.error
    for folder in (own_server.base.parent, own_server.base, own_server.base / "output"):
        assert not list(folder.glob("out*_.safetensors"))


def test_what_a_file_would_lose_is_named(own_server, demo_prompt):
    text = number(demo_prompt, "PixArtSigmaTextEncode")
    combined = {"conditioning_1": [text, 0], "conditioning_2": [text, 1]}
    ranged = {"conditioning": [text, 0], "start": 0.1, "end": 0.9}
    for kind, inputs, words in (
        ("ConditioningCombine", combined, "2 parts"),
        ("ConditioningSetTimestepRange", ranged, "start_percent"),
    ):
        prompt = with_save(demo_prompt) | {"changed": {"class_type": kind, "inputs": inputs}}
        prompt["keep"]["inputs"]["positive"] = ["changed", 0]
        run = own_server.run(prompt)
        assert run.failed == "keep" and words in run.error, run.error


def test_a_prompt_seen_before_loads_no_t5_after_a_restart(own_server, host, demo_prompt):
    prompt = with_save(demo_prompt, "restart")
    node(prompt, "PixArtSigmaTextEncode")["positive"] = "a (green:1.2) square on a black background"
    cache = own_server.base / "user" / "__pixart_sigma" / "embeddings"

    def draw(seed: int, change=None) -> tuple[np.ndarray, int]:
        node(prompt, "PixArtSigmaSampler")["seed"] = seed
        if change:
            node(prompt, "PixArtSigmaTextEncode")["positive"] = change
        before = own_server.log.read_text().count(LOADED)
        drawn = picture(own_server, prompt)
        return drawn, own_server.log.read_text().count(LOADED) - before

    expected, loaded = draw(5)
    assert loaded == 1 and len(list(cache.glob("*.safetensors"))) >= 2
    own_server.stop()
    own_server.start(host)
    drawn, loaded = draw(5)
    assert loaded == 0 and np.array_equal(drawn, expected)

    for file in cache.iterdir():  # damaged ones are encoded anew, and the picture is the same
        content = bytearray(file.read_bytes())
        content[-1] ^= 64
        file.write_bytes(content)
    own_server.stop()
    own_server.start(host)
    drawn, loaded = draw(5)
    assert loaded == 1 and np.array_equal(drawn, expected)
    assert draw(5, "a (green:1.3) square on a black background")[1] == 1

    shutil.rmtree(cache)
    cache.write_text("a file in the place of the folder")
    before = own_server.log.read_text().count("Prompt embeddings are not cached")
    _, loaded = draw(5, "a white circle")
    assert loaded == 1
    assert own_server.log.read_text().count("Prompt embeddings are not cached") == before + 1
