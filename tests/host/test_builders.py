"""The example workflows and the English texts are what their builders make of the host's nodes."""

import sys

import pytest
from server import PACK

sys.path.insert(0, str(PACK / "tools"))
import build_locales  # noqa: E402
import build_workflows  # noqa: E402


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def test_the_workflows_are_what_the_builder_makes(object_info):
    files = (PACK / "example_workflows").glob("*.json")
    shipped = {file.name: file.read_bytes() for file in files}
    built = {name: text.encode() for name, text in build_workflows.build(object_info).items()}
    assert built.keys() == shipped.keys()
    for name, content in built.items():
        assert content == shipped[name], f"{name}: run tools/build_workflows.py"


def test_the_english_texts_are_the_nodes_own(object_info):
    built = build_locales.build(object_info).encode()
    assert built == build_locales.ENGLISH.read_bytes(), "run tools/build_locales.py"
