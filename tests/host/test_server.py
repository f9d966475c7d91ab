"""The pack in a real server: what a user sees, presses and reads."""

import json
import sys

import pytest
from prompts import (
    SAVED_WORKFLOW,
    WORKFLOWS,
    at_defaults,
    contract,
    node,
    number,
    promised_contract,
    quick,
    run_with_the_demo,
    to_prompt,
)
from server import PACK, Rejected, with_the_demo

sys.path.insert(0, str(PACK / "tools" / "demo"))
from judge import look  # noqa: E402


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def ours(object_info):
    return {name: info for name, info in object_info.items() if name.startswith("PixArtSigma")}


@pytest.fixture(scope="module")
def demo_prompt(object_info):
    return to_prompt(PACK / "example_workflows" / "demo_text_to_image.json", object_info)


def test_the_nodes_are_as_promised(object_info):
    """A workflow that somebody saved must open in later versions."""
    assert contract(object_info) == promised_contract()


def test_every_node_explains_itself(ours, server):
    assert len(ours) >= 10
    translations = server.get("/i18n")
    for name, info in ours.items():
        assert info["description"] and info["search_aliases"] and info["category"] == "PixArt Sigma", name
        assert "Σ" in info["display_name"], name
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"]), name
        inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
        for key, (_, options) in inputs.items():
            assert options.get("tooltip"), (name, key)
        assert (PACK / "web" / "docs" / f"{name}.md").is_file(), name
        for language in ("en", "zh"):
            texts = translations[language]["nodeDefs"][name]
            assert texts["display_name"] and texts["description"], (name, language)
            assert set(texts["inputs"]) == set(inputs) and "Σ" in texts["display_name"], (name, language)


def test_every_node_is_in_a_workflow(ours):
    used = {
        entry["type"]
        for workflow in WORKFLOWS
        for entry in json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    }
    # Those for old graphs are in tests/host/old_graphs and test_text_encoder.py.
    assert {name for name, info in ours.items() if not info.get("deprecated")} <= used
    for workflow in WORKFLOWS:
        assert workflow.with_suffix(".jpg").is_file(), workflow.name


def test_the_host_offers_the_workflows_and_the_help(server):
    templates = server.get("/workflow_templates")
    assert set(templates["pixart-sigma"]) == {workflow.stem for workflow in WORKFLOWS}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_a_workflow_runs(server, object_info, workflow):
    run_with_the_demo(server, workflow, object_info)


def test_two_models_in_a_row_are_one_run(server, object_info):
    """Of the same weights, with euler, which remembers nothing: 8 steps by the first and 2 by the second."""
    prompt = to_prompt(PACK / "example_workflows" / "sigma_two_stage.json", object_info)
    with_the_demo(prompt)
    node(prompt, "PixArtSigmaTextEncode")["positive"] = "a green circle on a white background"
    node(prompt, "KSamplerSelect")["sampler_name"] = "euler"
    node(prompt, "PixArtSigmaReferenceSchedule")["steps"] = 10
    decoded = node(prompt, "PixArtSigmaVAEDecode")
    pictures = []
    for step in (10, 8):  # with 10 there is nothing left for the second
        node(prompt, "SplitSigmas")["step"] = step
        run = server.run(prompt)
        assert run.status == "success", run.error
        pictures += server.pictures(run, number(prompt, "SaveImage"))
    assert abs(pictures[0].astype(int) - pictures[1]).max() <= 1
    second = decoded["samples"][0]
    decoded["samples"] = prompt[second]["inputs"]["latent_image"]
    (left,) = server.pictures(server.run(prompt), number(prompt, "SaveImage"))
    assert abs(left.astype(int) - pictures[0]).max() > 20, "what the first leaves is no finished picture"


def test_the_demo_draws_what_it_is_asked_for(server, demo_prompt):
    run = server.run(demo_prompt)
    assert run.status == "success", run.error
    (picture,) = server.pictures(run, number(demo_prompt, "SaveImage"))
    assert picture.shape == (256, 256, 3)
    ground, seen = look(picture)
    assert ground == "white"
    left_to_right = sorted(seen, key=lambda one: one.x)
    assert [(one.color, one.shape) for one in left_to_right] == [("red", "square"), ("blue", "star")]


def test_nodes_from_the_menu_draw_once_they_are_wired(server, object_info):
    """No widget is touched: the demo, its own size, and a prompt that it knows."""
    pack = "PixArtSigma"
    prompt = {
        name: at_defaults(object_info, kind, **links)
        for name, kind, links in (
            ("model", f"{pack}LoadTransformer", {}),
            ("clip", f"{pack}LoadTextEncoder", {}),
            ("vae", f"{pack}LoadVAE", {}),
            ("words", f"{pack}TextEncode", {"clip": ["clip", 0]}),
            ("size", f"{pack}AspectRatioBucket", {"model": ["model", 0]}),
            (
                "sampler",
                f"{pack}Sampler",
                {
                    "model": ["model", 0],
                    "positive": ["words", 0],
                    "negative": ["words", 1],
                    "latent_image": ["size", 0],
                },
            ),
            ("decode", f"{pack}VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
            ("save", "SaveImage", {"images": ["decode", 0]}),
        )
    }
    run = server.run(prompt)
    assert run.status == "success", run.error
    (picture,) = server.pictures(run, "save")
    assert picture.shape == (256, 256, 3)
    ground, seen = look(picture)
    assert ground == "blue" and [(one.color, one.shape) for one in seen] == [("yellow", "star")]


def test_a_workflow_from_before_the_list_keeps_its_text(server, object_info):
    prompt = quick(to_prompt(SAVED_WORKFLOW, object_info))
    sampler = node(prompt, "PixArtSigmaSampler")
    pictures = {}
    for setting in ("mean:2:all", "all", "off"):
        if pictures:
            sampler["kv_compression"] = setting
        assert sampler["kv_compression"] == setting
        run = server.run(prompt)
        assert run.status == "success", run.error
        (pictures[setting],) = server.pictures(run, number(prompt, "SaveImage"))
    assert (pictures["mean:2:all"] == pictures["all"]).all()
    assert (pictures["mean:2:all"] != pictures["off"]).any()


def test_a_second_run_is_cached_and_a_new_seed_does_not_load_t5(server, demo_prompt):
    prompt = quick(demo_prompt)
    assert server.run(prompt).status == "success"
    again = server.run(prompt)
    assert {number(prompt, "PixArtSigmaSampler"), number(prompt, "PixArtSigmaTextEncode")} <= again.cached
    node(prompt, "PixArtSigmaSampler")["seed"] = 77
    other = server.run(prompt)
    assert number(prompt, "PixArtSigmaTextEncode") in other.cached
    assert number(prompt, "PixArtSigmaSampler") not in other.cached


@pytest.mark.parametrize("choice", ["../../x", "/etc/passwd", "no-such-file.safetensors"])
def test_a_model_that_is_not_offered_is_refused(server, demo_prompt, choice):
    for kind, name in (
        ("PixArtSigmaLoadTransformer", "transformer"),
        ("PixArtSigmaLoadTextEncoder", "text_encoder"),
        ("PixArtSigmaLoadVAE", "vae"),
    ):
        prompt = quick(demo_prompt)
        node(prompt, kind)[name] = choice
        with pytest.raises(Rejected) as refused:
            server.submit(prompt)
        assert choice in str(refused.value) and number(prompt, kind) in refused.value.node_errors
    assert server.run(quick(demo_prompt)).status == "success"


def test_a_wrong_setting_is_explained_on_its_node(server, demo_prompt):
    for kind, name, value, message in (
        ("PixArtSigmaSampler", "kv_compression", "mean:9:all", "ratio must be 2, 3 or 4"),
        ("PixArtSigmaSampler", "kv_compression", "custom", "custom_kv_compression is empty"),
        ("PixArtSigmaAspectRatioBucket", "width", 512, "Give both"),
        ("PixArtSigmaVAEDecode", "asked_width", 0, "Give both"),
    ):
        prompt = quick(demo_prompt)
        node(prompt, kind)[name] = value
        run = server.run(prompt)
        assert run.status == "error" and message in run.error, run.error
    assert server.run(quick(demo_prompt)).status == "success"


def test_an_interrupted_run_leaves_the_server_well(server, demo_prompt):
    prompt = quick(demo_prompt, steps=900)
    prompt_id = server.submit(prompt)
    while not server.get("/queue")["queue_running"]:
        pass
    server.post("/interrupt")
    run = server.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in run.messages)
    assert server.run(quick(demo_prompt)).status == "success"


def test_the_host_can_free_everything_and_go_on(server, demo_prompt):
    assert server.run(quick(demo_prompt, steps=3)).status == "success"
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert server.run(quick(demo_prompt, steps=3)).status == "success"
