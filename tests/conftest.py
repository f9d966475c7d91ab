import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from server import Server  # noqa: E402


@pytest.fixture(scope="session")
def host() -> Path:
    """The folder of the real ComfyUI: $COMFYUI_PATH or ~/comfy/ComfyUI."""
    folder = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (folder / "comfy" / "sd.py").is_file():
        pytest.skip(f"no ComfyUI at {folder}; set COMFYUI_PATH to the folder that holds custom_nodes")
    return folder


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """A running ComfyUI with a copy of this pack."""
    running = Server(host, tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()
