"""Runs pytest in ComfyUI's own process, on the CPU: its modules can be imported, and the pack as `pack`.
Run it with the interpreter that ComfyUI runs with.

`conftest.py` starts it. By hand, as to use a debugger:

    COMFYUI_PATH=~/comfy/ComfyUI python tests/host/inside/start.py tests/host/inside/test_decode.py --pdb
"""

import gc
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

PACK = Path(__file__).parents[3]
TRY_ALL = "--try-all"  # to import all of the host, which takes a second more


def become_the_host(base: str, try_all: bool):
    """ComfyUI's modules come first; its options are given, since they are read when it is imported."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv[1:] = ["--cpu", "--base-directory", base]
    import comfy.options

    comfy.options.enable_args_parsing()
    if try_all:  # as main.py does: what these need and is not there ends this before any test
        for name in ("execution", "nodes", "server"):
            importlib.import_module(name)
    # As ComfyUI loads a pack: a package under a folder name that it does not choose.
    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py")
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])


class Inside:
    """How each test runs, and the reports for the process that started this one."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        """With its fixtures, as the host runs nodes."""
        import torch

        with torch.inference_mode():
            return (yield)

    @pytest.fixture(autouse=True)
    def nothing_stays_loaded(self):
        """Each test begins with an empty list of loaded models."""
        yield
        import comfy.model_management

        comfy.model_management.unload_all_models()

    def pytest_collection_finish(self):
        gc.freeze()  # as tests/conftest.py does

    def pytest_addoption(self, parser):
        parser.addoption("--reports", type=Path, help="a file for the reports, a line of JSON each")

    def pytest_configure(self, config):
        self.config, self.file = config, config.getoption("--reports")
        if self.file:  # the sign that ComfyUI could be imported
            self.file.touch()

    def pytest_runtest_logreport(self, report):
        if self.file:  # at once: the process may be killed
            written = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(written) + "\n")


if __name__ == "__main__":
    options = [f"--config-file={PACK / 'tests' / 'pytest.ini'}", "--noconftest", "-pno:cacheprovider"]
    given = [argument for argument in sys.argv[1:] if argument != TRY_ALL]
    try_all = len(given) < len(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="comfyui_base_") as base:
        become_the_host(base, try_all)
        pytest.register_assert_rewrite("random_models")
        sys.exit(pytest.main(options + given, plugins=[Inside()]))
