"""What a user sees who opens the example workflows in a browser."""

import json

import pytest
from server import PACK

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


def contents(workflow) -> dict:
    return json.loads(workflow.read_text(encoding="utf-8"))


def downloads(workflow) -> set[str]:
    """The names of the files that a workflow needs."""
    return {
        model["name"]
        for node in contents(workflow)["nodes"]
        for model in node.get("properties", {}).get("models", ())
    }


def needs_nothing(workflow) -> bool:
    """It draws with the demo model, from no picture of the user's."""
    return not downloads(workflow) and all(
        node["type"] != "LoadImage" for node in contents(workflow)["nodes"]
    )


def test_some_workflows_need_nothing_and_some_need_downloads():
    assert any(map(needs_nothing, WORKFLOWS)) and any(map(downloads, WORKFLOWS))


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
        assert all(name in offered for name in downloads(workflow)), offered
    assert page.problems == []


@pytest.mark.parametrize(
    "workflow", list(filter(needs_nothing, WORKFLOWS)), ids=lambda workflow: workflow.stem
)
def test_run_shows_the_picture(page, workflow):
    page.open(workflow.stem)
    width, height = page.run()
    assert min(width, height) >= 128
    assert page.problems == []


def test_a_help_page_opens(page):
    page.open("demo_text_to_image")
    written = (PACK / "web" / "docs" / "PixArtSigmaSampler.md").read_text(encoding="utf-8")
    title = written.splitlines()[0].removeprefix("# ")
    assert title in page.help("PixArtSigmaSampler")
    assert page.problems == []
