"""What a user sees who opens the example workflows in a browser."""

import json

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


@pytest.mark.parametrize("workflow", DEMO_WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_run_shows_the_picture(page, workflow):
    page.open(workflow.stem)
    width, height = page.run()
    assert min(width, height) >= 128
    assert page.problems == []


def test_a_help_page_opens(page):
    page.open("demo_text_to_image")
    written = (PACK / "web" / "docs" / "PixArtSigmaSampler.md").read_text(encoding="utf-8")
    first_sentence = written.splitlines()[2].partition(".")[0]
    assert first_sentence in page.help("PixArtSigmaSampler")
    assert page.problems == []
