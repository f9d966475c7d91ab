"""The pack in the oldest ComfyUI that it promises to work with."""

import os
from pathlib import Path

import pytest
from prompts import SAVED_WORKFLOW, WORKFLOWS, contract, promised_contract, run_with_the_demo
from server import Server


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    folder = os.environ.get("COMFYUI_OLDEST_PATH")
    if not folder:
        pytest.skip("no old ComfyUI: set COMFYUI_OLDEST_PATH to the folder of a ComfyUI 0.26")
    running = Server(Path(folder), tmp_path_factory.mktemp("oldest_comfyui"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def object_info(oldest):
    return oldest.get("/object_info")


def test_the_nodes_are_as_promised(object_info):
    assert contract(object_info) == promised_contract()


@pytest.mark.parametrize("workflow", [*WORKFLOWS, SAVED_WORKFLOW], ids=lambda workflow: workflow.stem)
def test_a_workflow_runs(oldest, object_info, workflow):
    run_with_the_demo(oldest, workflow, object_info)
