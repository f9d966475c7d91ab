"""How the benchmarks count and time what they compare."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
