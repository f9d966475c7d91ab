"""The pack in the oldest ComfyUI that it promises to work with."""

import pytest
from hosts import find_host, start_server
from prompts import SAVED_WORKFLOW, WORKFLOWS, contract, promised_contract, run_with_the_demo


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    variable = "COMFYUI_OLDEST_PATH"
    running = start_server(find_host(variable), tmp_path_factory.mktemp("oldest_comfyui"), variable)
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
