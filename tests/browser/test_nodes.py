"""What a user finds by the search, and what the frontend sends of nodes that an earlier version saved."""

import json

from prompts import SAVED_WORKFLOW, node


def test_the_search_finds_a_node_by_what_users_call_it(page):
    page.open("demo_text_to_image")
    for words, name in (
        ("t5 loader", "Load Σ Text Encoder (T5)"),
        ("pixart lora", "Load Σ Transformer"),
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
