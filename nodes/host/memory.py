"""What the stages of the current run cost in memory."""

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
    """Bytes in use before, at the peak of and after a stage, and the seconds it took."""

    name: str
    before: int
    peak: int
    after: int
    seconds: float


_stages: deque[Stage] = deque(maxlen=50)
_run = None


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
        peak = meter.stop()
        _stages.append(Stage(name, meter.before, peak, bytes_in_use(), time.perf_counter() - start))


def stages() -> list[Stage]:
    """The stages of the last run in which any of our nodes did something."""
    return list(_stages)


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


class _Meter:
    """Looks at the memory again and again in a thread of its own."""

    def __init__(self):
        self.before = self.peak = bytes_in_use()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self):
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, bytes_in_use())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self.peak, bytes_in_use())
