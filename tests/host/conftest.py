import os
import subprocess
import sys

import pytest
from server import PACK

# The pack as ComfyUI loads it: a package under a folder name that it does not choose.
START = f"""
import importlib.util, os, sys
sys.path.insert(0, ".")
import comfy.options
comfy.options.enable_args_parsing()
spec = importlib.util.spec_from_file_location("pack", {str(PACK / "__init__.py")!r})
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
"""


@pytest.fixture
def run_in_host(host, tmp_path_factory):
    """Runs a script with ComfyUI's modules and `pack` importable, on the CPU, in a base folder of its own;
    gives its standard output."""

    def run(script: str, *arguments) -> str:
        base = tmp_path_factory.mktemp("comfyui_base")
        done = subprocess.run(
            [sys.executable, "-c", START + script, "--cpu", "--base-directory", str(base)],
            cwd=host,
            env=os.environ | {f"ARGUMENT_{index}": str(value) for index, value in enumerate(arguments)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
