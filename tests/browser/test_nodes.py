"""What a user finds by the search, and what the frontend makes of nodes that an earlier version or another
pack has saved."""

import json

import pytest
from frontend import frontend
from old_graphs import OLD_GRAPHS
from prompts import SAVED_WORKFLOW, node


def test_the_search_finds_a_node_by_what_users_call_it(page):
    page.open("demo_text_to_image")
    for words, name in (
        ("t5 loader", "Load Σ Text Encoder (T5)"),
        ("pixart lora", "Load Σ LoRA"),
        ("unload", "Σ Release Model"),
        ("memory", "Σ Memory Report"),
    ):
        assert page.find(words, name), words
    assert page.problems == []


def test_a_saved_text_stays_in_what_became_a_list(page):
    page.open("demo_text_to_image")
    prompt = page.to_prompt(json.loads(SAVED_WORKFLOW.read_text(encoding="utf-8")))
    assert node(prompt, "PixArtSigmaKVCompression")["kv_compression"] == "mean:2:deep"
    sampler = node(prompt, "PixArtSigmaSampler")
    assert sampler["kv_compression"] == "mean:2:all" and sampler["custom_kv_compression"] == ""
    assert sampler["after_use"] == "free", "the values stand by their place"
    size = node(prompt, "PixArtSigmaAspectRatioBucket")
    assert size["base"] == "256" and size["ratio"] == "1:1"
    assert page.problems == []


@pytest.mark.parametrize("graph", OLD_GRAPHS, ids=lambda graph: graph.stem)
def test_a_graph_of_extramodels_is_replaced_and_runs(old_server, browser, graph):
    """By a press of Replace All, without that pack."""
    saved = json.loads(graph.read_text(encoding="utf-8"))
    with frontend(browser, old_server.address) as page:
        page.open("demo_text_to_image")
        page.page.evaluate("async graph => await app.loadGraphData(graph)", saved)
        assert not all(node["known"] for node in page.nodes())
        page.replace_all()
        assert all(node["known"] for node in page.nodes()), page.nodes()
        prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
        assert len(prompt) == len(saved["nodes"])
        loader = node(prompt, "PixArtSigmaLoadTransformer")
        assert loader["transformer"] == "pixart_sigma/diffusion_pytorch_model.safetensors"
        assert node(prompt, "PixArtSigmaLoadTextEncoder")["text_encoder"] == "t5-v1_1-xxl/model.safetensors"
        assert node(prompt, "PixArtSigmaLoadVAE")["vae"] == "sdxl/diffusion_pytorch_model.safetensors"
        links = [value for entry in prompt.values() for value in entry["inputs"].values()]
        assert sum(isinstance(value, list) for value in links) == len(saved["links"])
        size = (384, 640) if graph.stem == "resolution" else (256, 256)
        assert page.run(steps=2) == size
        assert page.problems == []
