"""A ComfyUI that is not there or cannot start: said once, in seconds."""

import os
import shutil
import subprocess
import sys
import venv

import pytest
from server import PACK

TESTS = PACK / "tests"
IN_A_SERVER = [TESTS / "host" / "test_notice.py", TESTS / "browser" / "test_nodes.py"]
IN_ITS_PROCESS = [TESTS / "host" / "inside" / name for name in ("test_planner.py", "test_release.py")]


@pytest.fixture
def broken(tmp_path):
    """A folder of ComfyUI whose requirements are not installed; `starts` tells how often it was tried."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "sd.py").touch()
    starting = f"open({str(folder / 'starts')!r}, 'a').write('started ')\nimport what_nobody_has\n"
    for name in ("main.py", "comfy/options.py"):
        (folder / name).write_text(starting)
    return folder


def run_tests(paths, **environment) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "CI" and "COMFYUI" not in name}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | environment, cwd=PACK)
    return done.stdout + done.stderr


@pytest.mark.parametrize("paths", [IN_A_SERVER + IN_ITS_PROCESS, IN_ITS_PROCESS], ids=["server", "inside"])
def test_what_cannot_start_is_tried_once_and_its_tests_are_skipped(broken, paths):
    told = run_tests(paths, COMFYUI_PATH=str(broken))
    assert "passed" not in told and "failed" not in told and "error" not in told, told
    assert "No module named 'what_nobody_has'" in told
    assert f"{sys.executable} -m pip install -r {broken / 'requirements.txt'}" in told
    assert (broken / "starts").read_text() == "started "


def test_in_ci_a_host_that_is_named_must_start(broken):
    told = run_tests(IN_ITS_PROCESS, COMFYUI_PATH=str(broken), CI="true")
    assert "failed" in told and "skipped" not in told and "No module named 'what_nobody_has'" in told
    told = run_tests(IN_ITS_PROCESS, COMFYUI_PATH=str(broken / "elsewhere"), CI="true")
    assert "failed" in told and f"no ComfyUI at {broken / 'elsewhere'}" in told


def test_the_hosts_interpreter_is_asked_for_what_the_pack_needs(broken, tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    programs = tmp_path / "empty" / ("Scripts" if sys.platform == "win32" else "bin")
    python = shutil.which("python", path=programs)
    told = run_tests(IN_ITS_PROCESS, COMFYUI_PATH=str(broken), COMFYUI_PYTHON=python)
    assert "skipped" in told and "lacks torch, diffusers" in told
    assert f"{python} -m pip install -r {PACK / 'requirements.txt'} pytest" in told
    assert not (broken / "starts").exists()
    told = run_tests(IN_ITS_PROCESS, COMFYUI_PATH=str(broken), COMFYUI_PYTHON="no-such-python")
    assert "COMFYUI_PYTHON is no-such-python, which is no program" in told
