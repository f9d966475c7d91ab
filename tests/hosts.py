"""The ComfyUI that tests run in, and its interpreter. One that cannot start is found out once: its tests are
skipped with the reason, and with the command that mends it."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from server import PACK, DidNotStart, Server

DEFAULTS = {"COMFYUI_PATH": Path.home() / "comfy" / "ComfyUI", "COMFYUI_OLDEST_PATH": None}
# Prints which of its arguments, names of packages, are not installed.
MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        version(name)
    except PackageNotFoundError:
        print(name)
"""
# Why a host could not start, by its folder.
_refused: dict[Path, str] = {}


def find_host(variable: str = "COMFYUI_PATH") -> Path:
    """The folder of the ComfyUI that `variable` names, or of the usual one.

    Skips the test where there is none, or one that cannot start.
    """
    named = os.environ.get(variable) or DEFAULTS[variable]
    if named is None:
        _leave(variable, f"no ComfyUI: {variable} is not set")
    folder = Path(named).resolve()
    if not (folder / "comfy" / "sd.py").is_file():
        _leave(variable, f"no ComfyUI at {folder}; set {variable} to the folder that holds custom_nodes")
    if reason := _refused.get(folder) or _missing_packages():
        _leave(variable, reason)
    return folder


def host_python() -> str:
    """The interpreter that hosts run with: `$COMFYUI_PYTHON`, or the one of the tests."""
    named = os.environ.get("COMFYUI_PYTHON") or sys.executable
    if not (program := shutil.which(named)):
        raise pytest.UsageError(f"COMFYUI_PYTHON is {named}, which is no program")
    # Not resolved: a link is how a virtual environment knows itself.
    return os.path.abspath(program)


def start_server(folder: Path, base: Path, variable: str = "COMFYUI_PATH", flags=("--cpu",)) -> Server:
    """A server that runs, with these flags. Skips the test where the host cannot start, as `find_host` does
    from then on."""
    if folder in _refused:
        _leave(variable, _refused[folder])
    try:
        return Server(folder, base, host_python(), flags)
    except DidNotStart as error:
        refuse(folder, error.said, variable)


def refuse(folder: Path, said: str, variable: str = "COMFYUI_PATH") -> NoReturn:
    """Skips this test and those that follow: the host at `folder` ended before it was ready, as it `said`."""
    lines = [line.strip() for line in said.splitlines() if re.search(r"\w\W+\w", line)]
    last = lines[-1] if lines else "it said nothing"
    _refused[folder] = (
        f"ComfyUI at {folder} cannot start with {host_python()}: {last}. "
        f"If a package is missing: {_install('-r', folder / 'requirements.txt')}"
    )
    _leave(variable, _refused[folder])


def _leave(variable: str, reason: str) -> NoReturn:
    # Whoever names a host in CI wants its tests to run.
    if os.environ.get(variable) and os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@functools.cache
def _missing_packages() -> str:
    """What keeps the nodes and `tests/host/inside` from running with the host's interpreter, or ""."""
    requirements = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in map(_name, requirements) if line] + ["pytest"]
    found = subprocess.run([host_python(), "-c", MISSING, *names], capture_output=True, text=True, check=True)
    if not found.stdout:
        return ""
    return (
        f"{host_python()}, with which ComfyUI runs, lacks {', '.join(found.stdout.split())}: "
        f"{_install('-r', PACK / 'requirements.txt', 'pytest')}"
    )


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]*", requirement).group()


def _install(*what: str | Path) -> str:
    return shlex.join(map(str, [host_python(), "-m", "pip", "install", *what]))
