"""What must hold on a GPU. Without one all of it is skipped; `--device cpu` runs what a CPU can show, by the
same code at small sizes."""

import pytest
import torch
from gpu_device import find_device, settled_bytes


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    found = find_device(request.config.getoption("--device"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def on_gpu(device) -> bool:
    """Whether there is a GPU, and sizes are the real ones."""
    return device.type == "cuda"


@pytest.fixture
def cuda(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("only CUDA has streams, limits and an allocator that counts")
    return device


@pytest.fixture(autouse=True)
def own_memory(device):
    """Each test begins with what the ones before have left, which is nothing, and counts from there."""
    settled_bytes(device)
    yield
    settled_bytes(device)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 as float32: a convolution on CUDA would take ten bits of it (TF32)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def no_embeddings_of_other_runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
