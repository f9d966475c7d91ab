"""Graphs that were made with ComfyUI_ExtraModels run without it: the host puts our nodes in their place."""

import json
import sys

import numpy as np
import pytest
from old_graphs import OLD_GRAPHS, old_prompt
from prompts import node, number
from server import PACK, Rejected

sys.path.insert(0, str(PACK / "tools" / "demo"))
from judge import look  # noqa: E402

GRAPHS = {graph.stem: graph for graph in OLD_GRAPHS}


@pytest.fixture
def prompt(old_server, request):
    return old_prompt(GRAPHS[request.param], old_server.get("/object_info"))


def picture(server, prompt) -> np.ndarray:
    run = server.run(prompt)
    assert run.status == "success", run.error
    return server.pictures(run, number(prompt, "SaveImage"))[0]


def ours(size, steps, sampler_name, text="a large red circle on a blue background", lora=None) -> dict:
    """The same picture by our nodes and the host's, wired by hand."""
    width, height = size
    entries = {
        "model": ("PixArtSigmaLoadTransformer", {"transformer": "demo (built in)"}),
        "t5": ("PixArtSigmaLoadTextEncoder", {"text_encoder": "demo (built in)", "precision": "int8"}),
        "vae": ("PixArtSigmaLoadVAE", {"vae": "demo (built in)"}),
        "positive": ("CLIPTextEncode", {"clip": ["t5", 0], "text": text}),
        "negative": ("CLIPTextEncode", {"clip": ["t5", 0], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": width, "height": height, "batch_size": 1}),
        "sample": (
            "KSampler",
            {
                "model": ["lora" if lora else "model", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": 1,
                "steps": steps,
                "cfg": 4.5,
                "sampler_name": sampler_name,
                "scheduler": "normal",
                "denoise": 1.0,
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["vae", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "ours"}),
    }
    entries["model"][1].update(variant="auto", dtype="auto")
    entries["t5"][1].update(device="auto")
    if lora:
        entries["lora"] = ("LoraLoaderModelOnly", {"model": ["model", 0], "lora_name": lora[0]})
        entries["lora"][1].update(strength_model=lora[1])
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in entries.items()}


@pytest.mark.parametrize("prompt", ["text_to_image"], indirect=True)
def test_an_old_graph_draws_what_it_is_asked_for(old_server, prompt):
    drawn = picture(old_server, prompt)
    ground, seen = look(drawn)
    assert ground == "blue" and [(one.color, one.shape) for one in seen] == [("red", "circle")]
    assert np.array_equal(drawn, picture(old_server, ours((256, 256), 20, "dpmpp_2m")))


@pytest.mark.parametrize("prompt", ["lora"], indirect=True)
def test_an_old_lora_loader_acts(old_server, prompt):
    drawn = picture(old_server, prompt)
    with_it = ours((256, 256), 10, "euler", lora=("old_lora.safetensors", 0.5))
    assert np.array_equal(drawn, picture(old_server, with_it))
    node(prompt, "PixArtLoraLoader")["strength"] = 0.0
    assert np.array_equal(picture(old_server, prompt), picture(old_server, ours((256, 256), 10, "euler")))
    assert not np.array_equal(drawn, picture(old_server, prompt))


@pytest.mark.parametrize("prompt", ["resolution"], indirect=True)
def test_an_old_size_is_what_it_was(old_server, prompt):
    """Its label is width : height, and 0.60 of 512 was 384x640."""
    assert picture(old_server, prompt).shape == (640, 384, 3)


@pytest.mark.parametrize("prompt", ["text_to_image"], indirect=True)
def test_a_file_that_is_gone_is_named(old_server, prompt):
    node(prompt, "PixArtCheckpointLoader")["ckpt_name"] = "gone.safetensors"
    with pytest.raises(Rejected, match=r"There is no model 'gone\.safetensors'"):
        old_server.submit(prompt)


def test_every_replacement_is_offered(old_server):
    """By what the host offers: targets that exist, with inputs and outputs that they have, and no input that
    has to be given left out."""
    object_info = old_server.get("/object_info")
    offered = old_server.get("/node_replacements")
    mine = {
        old: found[0]
        for old, found in offered.items()
        if found[0]["new_node_id"].startswith("PixArtSigma") or old.startswith(("PixArt", "T5"))
    }
    assert set(mine) == {
        "PixArtCheckpointLoader",
        "PixArtCheckpointLoaderSimple",
        "PixArtResolutionSelect",
        "PixArtLoraLoader",
        "T5v11Loader",
        "PixArtT5FromSD3CLIP",
        "T5TextEncode",
        "PixArtT5TextEncode",
        "ExtraVAELoader",
    }
    for old, found in mine.items():
        info = object_info[found["new_node_id"]]
        given = {entry["new_id"] for entry in found["input_mapping"]}
        required = set(info["input"]["required"])
        assert given == required, old
        for entry in found["output_mapping"]:
            assert entry["new_idx"] < len(info["output"]), old


def test_an_old_graph_is_no_graph_of_ours():
    """What is tested here are the old nodes."""
    for graph in OLD_GRAPHS:
        kinds = {entry["type"] for entry in json.loads(graph.read_text(encoding="utf-8"))["nodes"]}
        assert not [kind for kind in kinds if kind.startswith("PixArtSigma")] and len(kinds) >= 7
