"""What a user sees who opens the example workflows in a browser."""

import json
from itertools import combinations

import pytest
from server import PACK

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


def contents(workflow) -> dict:
    return json.loads(workflow.read_text(encoding="utf-8"))


def downloads(workflow) -> set[tuple[str, str]]:
    """The files that a workflow needs, each with its folder."""
    return {
        (model["name"], model["directory"])
        for node in contents(workflow)["nodes"]
        for model in node.get("properties", {}).get("models", ())
    }


def assert_readable(page):
    """Nothing lies on anything else, nodes are in groups, and notes as tall as their text."""
    nodes, groups = page.boxes(), page.groups()
    for (name, box), (other_name, other_box) in combinations(nodes, 2):
        assert not box.overlaps(other_box), f"{name} overlaps {other_name}: {box}, {other_box}"
    for (name, box), (other_name, other_box) in combinations(groups, 2):
        assert not box.overlaps(other_box), f"{name} overlaps {other_name}: {box}, {other_box}"
    for name, box in nodes:
        around = [title for title, group in groups if group.overlaps(box)]
        inside = [title for title, group in groups if group.holds(box)]
        assert around == inside, f"{name} is partly in {around}: {box}"
        assert len(inside) == (not name.startswith("MarkdownNote")), f"{name} is in {len(inside)} groups"
    text, note = page.note()
    assert 0 < text <= note <= text + 64


DEMO_WORKFLOWS = [workflow for workflow in WORKFLOWS if not downloads(workflow)]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_a_workflow_opens(page, workflow):
    page.open(workflow.stem)
    nodes = page.nodes()
    assert sorted(node["type"] for node in nodes) == sorted(
        node["type"] for node in contents(workflow)["nodes"]
    )
    assert [node["type"] for node in nodes if not node["known"]] == []
    if downloads(workflow):
        offered = page.missing_models()
        for name, folder in downloads(workflow):
            assert f"{name}\n{folder}\nDownload" in offered
    assert page.problems == []
    assert_readable(page)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_links_lead_to_the_right_or_down(workflow):
    saved = contents(workflow)
    places = {node["id"]: node["pos"] for node in saved["nodes"]}
    for _, origin, _, target, *_ in saved["links"]:
        assert places[origin] < places[target]


@pytest.mark.parametrize("workflow", DEMO_WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_run_shows_the_picture(page, workflow):
    page.open(workflow.stem)
    width, height = page.run(steps=4)
    assert min(width, height) >= 128
    assert page.problems == []
    assert_readable(page)


def test_a_help_page_opens(page):
    page.open("demo_text_to_image")
    written = (PACK / "web" / "docs" / "PixArtSigmaSampler.md").read_text(encoding="utf-8")
    first_sentence = written.splitlines()[2].partition(".")[0]
    assert first_sentence in page.help("PixArtSigmaSampler")
    assert page.problems == []


# Last, as their page goes on drawing for as long as it is open.


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_nothing_overlaps_in_nodes_2(nodes_2, workflow):
    nodes_2.load(workflow.stem)
    assert len(nodes_2.boxes()) == len(contents(workflow)["nodes"])
    assert_readable(nodes_2)


def test_what_a_run_adds_has_room_in_nodes_2(server, nodes_2):
    """A picture, and the line in which Save Prompt Embeddings says what it has saved."""
    server.post("/free", {"free_memory": True})  # what it has run already it would not run again
    nodes_2.load("reuse_prompt_embeddings")
    (name,) = (name for name, _ in nodes_2.boxes() if name.startswith("PixArtSigmaSaveEmbeddings"))
    before = dict(nodes_2.boxes())[name].height
    nodes_2.run(steps=4)
    assert dict(nodes_2.boxes())[name].height > before
    assert_readable(nodes_2)
