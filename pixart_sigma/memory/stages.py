"""Stages: a model is loaded when it is used, released when it is done, and what it cost is written down."""

import gc
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from ..choices import RELEASES
from ..errors import SettingError
from ..table import align
from .measure import live_bytes, make_meter, readable, weight_bytes

Result = TypeVar("Result")


@dataclass(frozen=True)
class StageCost:
    """Bytes on the device before, at the peak of and after a stage; of its weights, all of them, those that
    came to the device for it and those that left it afterwards; and the seconds it took."""

    before: int
    peak: int
    after: int
    weights: int
    loaded: int
    freed: int
    seconds: float


class Stages:
    """The models of a run, one stage at a time.

    `release` says what happens when a stage ends, also by an exception or an interrupt: "keep" leaves its
    model where it is, "offload" moves it to RAM, "free" drops it; it is loaded again when next used. A model
    that says it is not `is_movable` is dropped by "offload" too.
    With `measure`, `costs` holds a StageCost per stage name.
    """

    def __init__(self, device: str | torch.device = "cpu", release: str = "free", measure: bool = False):
        if release not in RELEASES:
            raise SettingError("release", repr(release), f"choose one of {', '.join(RELEASES)}")
        self.device = torch.device(device)
        self.release = release
        self.measure = measure
        self.costs: dict[str, StageCost] = {}
        self._held: dict[str, Any] = {}

    def run(
        self,
        name: str,
        load: Callable[[], Any],
        use: Callable[[Any], Result],
        on_cpu: bool = False,
    ) -> Result:
        """use(model), the stage's model loaded by `load` unless it is held, and released before this returns.

        on_cpu: the model works there, wherever the others do.
        `use` must not keep the model. Where it raises, the frames of the traceback forget their variables, so
        that an error that somebody keeps does not keep the weights.
        """
        meter = make_meter(self.device) if self.measure else None
        start = time.perf_counter()
        weights = 0
        is_there = self._is_there(name, on_cpu)
        try:
            with meter or nullcontext():
                if name not in self._held:
                    self._held[name] = load()
                elif not is_there:
                    _module(self._held[name]).to(self.device)
                if meter:
                    meter.look()
                    weights = _stage_bytes(self._held[name])
                return use(self._held[name])
        except BaseException as error:
            _forget_variables(error)
            raise
        finally:
            self._release(name)
            if meter:
                seconds = time.perf_counter() - start
                self.costs[name] = StageCost(
                    before=meter.before,
                    peak=meter.peak,
                    after=live_bytes(self.device),
                    weights=weights,
                    loaded=0 if is_there else weights,
                    freed=0 if self._is_there(name, on_cpu) else weights,
                    seconds=seconds,
                )

    def _is_there(self, name: str, on_cpu: bool) -> bool:
        """Whether the stage's model is where it works, between two uses."""
        return name in self._held and (self.release == "keep" or self.device.type == "cpu" or on_cpu)

    def drop(self, name: str):
        """Forget a model that is held, whatever `release` says; it is loaded again when next used."""
        if self._held.pop(name, None) is not None:
            self._collect()

    def _release(self, name: str):
        if name not in self._held or self.release == "keep":
            return
        if self.release == "free" or not (self.device.type == "cpu" or _is_movable(self._held[name])):
            del self._held[name]
        elif self.device.type != "cpu":
            _module(self._held[name]).to("cpu")
        self._collect()

    def _collect(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def table(self) -> str:
        """What each stage cost, as text for people; GB are 10^9 bytes."""
        rows: list[tuple[str, ...]] = [
            ("stage", "before", "peak", "after", "weights", "loaded", "freed", "seconds")
        ]
        for name, cost in self.costs.items():
            sizes = (cost.before, cost.peak, cost.after, cost.weights, cost.loaded, cost.freed)
            rows.append((name, *(readable(size) for size in sizes), f"{cost.seconds:.1f}"))
        return align(rows)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """The costs per stage, ready for JSON."""
        return {name: asdict(cost) for name, cost in self.costs.items()}


def _forget_variables(error: BaseException | None):
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _stage_bytes(model: Any) -> int:
    """Bytes of weights that a stage needs on the device; a streamed model knows its own."""
    nbytes = getattr(_module(model), "nbytes", None)
    return weight_bytes(_module(model)) if nbytes is None else nbytes


def _is_movable(model: Any) -> bool:
    """Whether `to` moves all of a model's weights; only one for which it does not says so."""
    return getattr(model, "is_movable", True)


def _module(model: Any) -> Any:
    """The part of a stage's model that has `to`: a network, or a streamed encoder."""
    return model if isinstance(model, torch.nn.Module) else model.model
