import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from server import Server, find_host  # noqa: E402


@pytest.fixture(scope="session")
def host() -> Path:
    return find_host()


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """A running ComfyUI with a copy of this pack."""
    running = Server(host, tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()
