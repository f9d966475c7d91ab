"""What the stages of the current run cost in memory, and which models the host holds."""

import os
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import psutil
import torch
from comfy_execution.utils import get_executing_context

INTERVAL = 0.02  # seconds between two looks


@dataclass(frozen=True)
class Stage:
    """Bytes in use before, at the peak of and after a stage, the bytes of weights that came to their device
    during it and that left it again, and the seconds it took; the node's number in the graph, or None outside
    of a run."""

    name: str
    node: str | None
    before: int
    peak: int
    after: int
    loaded: int
    freed: int
    seconds: float


@dataclass(frozen=True)
class Held:
    """A model that the host holds, of whatever pack: its class, where it is, and its bytes there."""

    model: str
    device: str
    bytes: int


_stages: deque[Stage] = deque(maxlen=50)
_run = None
_running: list["_Meter"] = []


@contextmanager
def record(name: str):
    """Write down what the block costs, also when it raises; the first one of a run forgets the last run's."""
    global _run
    context = get_executing_context()
    run = context.prompt_id if context else None
    if run != _run:
        _stages.clear()
        _run = run
    start = time.perf_counter()
    meter = _Meter()
    try:
        yield
    finally:
        meter.stop()
        _stages.append(
            Stage(
                name=name,
                node=context.node_id if context else None,
                before=meter.before,
                peak=meter.peak,
                after=bytes_in_use(),
                loaded=meter.loaded,
                freed=meter.freed,
                seconds=time.perf_counter() - start,
            )
        )


def look():
    """Count now, in the stage that runs: what is released at once would be gone before the next look."""
    for meter in list(_running):
        meter.look()


def stages() -> list[Stage]:
    """The stages of the last run in which any of our nodes did something."""
    return list(_stages)


def held_models() -> list[Held]:
    """Every model that the host holds loaded, the largest first."""
    held = [
        Held(type(real).__name__, str(device), size)
        for real, device, size in _loaded_models().values()
        if size
    ]
    return sorted(held, key=lambda model: -model.bytes)


def total_memory() -> int:
    """Bytes of the graphics card's memory; 0 without one."""
    device = comfy.model_management.get_torch_device()
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def what_is_measured() -> str:
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return f"Memory in use on {torch.cuda.get_device_name(device)}, all programs together"
    return "Memory of the ComfyUI process (RAM)"


def bytes_in_use() -> int:
    """The graphics card's memory in use, whoever allocated it; without a card the process's RAM."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        # The host has allocators that torch does not count.
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return psutil.Process(os.getpid()).memory_info().rss


def _loaded_models() -> dict[int, tuple]:
    """(model, device, bytes of its weights there) by the model's id; clones share one model."""
    found = {}
    for loaded in list(comfy.model_management.current_loaded_models):
        patcher = loaded.model  # None once every clone is gone
        if patcher is not None:
            found[id(patcher.model)] = (patcher.model, loaded.device, patcher.loaded_size())
    return found


class _Meter:
    """Looks at the memory again and again in a thread of its own."""

    def __init__(self):
        self.before = self.peak = bytes_in_use()
        self._models_before = self._weights()
        self._most = dict(self._models_before)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)
        self._thread.start()
        _running.append(self)

    def look(self):
        self.peak = max(self.peak, bytes_in_use())
        for key, size in self._weights().items():
            self._most[key] = max(self._most.get(key, 0), size)

    def stop(self):
        self._done.set()
        self._thread.join()
        _running.remove(self)
        self.look()
        after = self._weights()
        self.loaded = sum(size - self._models_before.get(key, 0) for key, size in self._most.items())
        self.freed = sum(size - after.get(key, 0) for key, size in self._most.items())

    def _keep_looking(self):
        while not self._done.wait(INTERVAL):
            self.look()

    @staticmethod
    def _weights() -> dict[int, int]:
        return {key: size for key, (_, _, size) in _loaded_models().items()}
