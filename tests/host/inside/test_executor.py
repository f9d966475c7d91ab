"""The host's own executor with our nodes: what it keeps from run to run loads nothing again. On the CPU."""

import json

import comfy.model_management as management
import execution
import pytest
import torch
from comfy_api.latest import io
from pack.nodes.loaders import LoadTextEncoder
from pack.nodes.memory import MemoryReport, ReleaseModel
from pack.nodes.text import TextEncode
from pack.pixart_sigma import TextEncoder

import nodes as host_nodes

seen = []  # by the probes of a run


class Probe:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = ("*",), "run", True, "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (io.AnyType.io_type,)}, "optional": {"seed": ("INT", {"default": 0})}}

    def run(self, value, seed=0):
        seen.append(value)
        return (value,)


class Client:
    """Whom the executor reports to."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata = {}

    def send_sync(self, event, data, client=None):
        pass


@pytest.fixture
def executor(monkeypatch):
    for node in (LoadTextEncoder, TextEncode, ReleaseModel, MemoryReport):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "Probe", Probe)
    return execution.PromptExecutor(
        Client(),
        cache_type=execution.CacheType.CLASSIC,
        cache_args={"lru": 0, "ram": 0, "ram_inactive": 0},
    )


@pytest.fixture
def loads(monkeypatch):
    """Grows when a T5 is loaded."""
    loads, load = [], TextEncoder.load
    monkeypatch.setattr(
        TextEncoder, "load", lambda *given, **options: loads.append(1) or load(*given, **options)
    )
    return loads


def make_prompt(positive, seed) -> dict:
    graph = {
        "t5": (
            "PixArtSigmaLoadTextEncoder",
            {"text_encoder": "demo (built in)", "precision": "int8", "device": "cpu"},
        ),
        "text": (
            "PixArtSigmaTextEncode",
            {
                "clip": ["t5", 0],
                "positive": positive,
                "negative": "",
                "clean_caption": False,
                "after_use": "free",
            },
        ),
        "sample": ("Probe", {"value": ["text", 0], "seed": seed}),
        "release": (
            "PixArtSigmaReleaseModel",
            {"after": ["sample", 0], "model": ["t5", 0], "mode": "offload"},
        ),
        "report": ("PixArtSigmaMemoryReport", {"after": ["release", 0]}),
        "show": ("Probe", {"value": ["report", 1]}),
        "figures": ("Probe", {"value": ["report", 2]}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}


def run(executor, name, positive="a red circle", seed=0) -> list[str]:
    """The stages that the report names."""
    seen.clear()
    with torch.inference_mode(False):  # the executor turns it on where it should be
        executor.execute(make_prompt(positive, seed), name, {}, ["show", "figures", "sample", "release"])
    assert executor.success, executor.status_messages
    assert management.current_loaded_models == []
    texts = [text for text in seen if isinstance(text, str)]
    (table,) = [text for text in texts if not text.startswith("{")]
    (figures,) = [json.loads(text) for text in texts if text.startswith("{")]
    for stage in figures["stages"]:
        assert (stage["loaded"] > 400_000) == (stage["name"] == "Encode the prompts"), stage
        assert stage["freed"] == stage["loaded"], stage
    return [line.split("  ")[0] for line in table.splitlines()[2:]]


def test_a_freed_encoder_is_not_loaded_for_a_cached_prompt(executor, loads):
    assert run(executor, "first") == ["Encode the prompts", "Release CLIP"] and len(loads) == 1
    assert run(executor, "only the seed", seed=1) == ["Release CLIP"]
    assert len(loads) == 1, "a freed T5 was loaded again"
    assert isinstance(seen[0], list) and seen[0][0][0].shape[2] == 128
    run(executor, "nothing new", seed=1)
    assert len(loads) == 1 and len(seen) == 2, "only the report is made anew"
    assert run(executor, "the prompt", "a blue circle", 1) == ["Encode the prompts", "Release CLIP"]
    assert len(loads) == 2
