import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def host() -> Path:
    """The folder of the real ComfyUI: $COMFYUI_PATH or ~/comfy/ComfyUI."""
    folder = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (folder / "comfy" / "sd.py").is_file():
        pytest.skip(f"no ComfyUI at {folder}; set COMFYUI_PATH to the folder that holds custom_nodes")
    return folder


@pytest.fixture
def run_in_host(host):
    """Runs a script with ComfyUI's modules importable, on the CPU; gives its standard output."""

    def run(script: str, *arguments) -> str:
        start = (
            "import sys; sys.path.insert(0, '.'); import comfy.options; comfy.options.enable_args_parsing()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", start + script, "--cpu"],
            cwd=host,
            env=os.environ | {f"ARGUMENT_{index}": str(value) for index, value in enumerate(arguments)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
