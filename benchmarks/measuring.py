"""How the benchmarks count and time what they compare."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart_sigma.memory.measure import make_meter


def multiply_adds(call: Callable[[], Any]) -> tuple[Any, int]:
    """What the call returns, and its multiply-adds.

    Torch's counter knows no formula for the fused attention kernel of CPUs and leaves attention out, so
    attention uses the `math` kernel here, whose matrix products it sees.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops() // 2


def seconds_in_turn(
    calls: Iterable[Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> list[list[float]]:
    """The seconds of each call in each round; a round has one of each, in turn."""
    calls = list(calls)
    seconds = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            start = clock()
            call()
            taken.append(clock() - start)
    return seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds: of the process on a CPU, on the wall where a GPU works, once it has done what it was asked."""

    def now() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def least_seconds(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The least of several rounds."""
    return min(seconds_in_turn([call], rounds, clock_of(device))[0])


def measured(call: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """What the call returns, its seconds, and the bytes on the device at its peak beyond those before."""
    now, meter = clock_of(device), make_meter(device)
    start = now()
    with meter:
        result = call()
    return result, now() - start, meter.peak - meter.before


@contextmanager
def at_most(nbytes: float, device: torch.device) -> Iterator[None]:
    """Within this block torch allocates at most so many bytes on a CUDA device, as on a smaller card; the
    driver's own some hundred MB apart. On a CPU nothing is limited."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
