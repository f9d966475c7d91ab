import gc
import os
import sys
from pathlib import Path

import pytest

MOST_WORKERS = 4  # each may run a ComfyUI, which takes a gigabyte


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before torch is imported, and for what the tests start: more threads than cores wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // int(workers))))

sys.path.insert(0, str(Path(__file__).parent))
from hosts import find_host, host_python, start_server  # noqa: E402
from old_graphs import place_old_models  # noqa: E402


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means."""
    return min(cores(), MOST_WORKERS)


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="for tests/gpu: cuda, or cpu to try them without a GPU")


def pytest_configure(config):
    host_python()  # a wrong name is said before anything runs
    # Not the files with the most tests first: those of the browser are few and long, and come first by name.
    config.option.loadscopereorder = False


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
