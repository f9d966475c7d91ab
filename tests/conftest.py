import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hosts import find_host, host_python, start_server  # noqa: E402
from old_graphs import place_old_models  # noqa: E402


def pytest_configure():
    host_python()  # a wrong name is said before anything runs


def pytest_collection_finish():
    # The engine calls gc.collect() and counts live tensors, hundreds of times in a session: each would go
    # through the half million objects of the imported libraries.
    gc.freeze()


@pytest.fixture(scope="session")
def host() -> Path:
    return find_host()


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """A running ComfyUI with a copy of this pack."""
    running = start_server(host, tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def old_server(host, tmp_path_factory):
    """A server with the demo in the folders of an old installation."""
    base = tmp_path_factory.mktemp("old_graphs")
    place_old_models(base / "models")
    running = start_server(host, base)
    yield running
    running.stop()
