"""Stages: a model is loaded when it is used, released when it is done, and what it cost is written down."""

import gc
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import SigmaError

RELEASES = ("keep", "offload", "free")


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
    model where it is, "offload" moves it to RAM, "free" drops it; it is loaded again when next used.
    With `measure`, `costs` holds a StageCost per stage name.
    """

    def __init__(self, device: str | torch.device = "cpu", release: str = "free", measure: bool = False):
        if release not in RELEASES:
            raise SigmaError(f"release is {release!r}; choose one of {', '.join(RELEASES)}.")
        self.device = torch.device(device)
        self.release = release
        self.measure = measure
        self.costs: dict[str, StageCost] = {}
        self._held: dict[str, Any] = {}

    def run(
        self,
        name: str,
        load: Callable[[], Any],
        use: Callable[[Any], Any],
        on_cpu: bool = False,
    ) -> Any:
        """use(model), the stage's model loaded by `load` unless it is held, and released before this returns.

        on_cpu: the model works there, wherever the others do.
        `use` must not keep the model. Where it raises, the frames of the traceback forget their variables, so
        that an error that somebody keeps does not keep the weights.
        """
        meter = _meter(self.device) if self.measure else None
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
        if self.release == "free":
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
        rows = [("stage", "before", "peak", "after", "weights", "loaded", "freed", "seconds")]
        for name, cost in self.costs.items():
            sizes = (cost.before, cost.peak, cost.after, cost.weights, cost.loaded, cost.freed)
            rows.append((name, *(readable(size) for size in sizes), f"{cost.seconds:.1f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )

    def as_dict(self) -> dict[str, dict[str, float]]:
        """The costs per stage, ready for JSON."""
        return {name: asdict(cost) for name, cost in self.costs.items()}


def first_that_fits(stage: str, ways: dict[str, Callable[[], Any]]) -> Any:
    """What the first of a stage's ways gives that does not run out of memory; SigmaError after the last."""
    for number, (name, run) in enumerate(ways.items(), start=1):
        try:
            return run()
        except torch.OutOfMemoryError:
            following = list(ways)[number : number + 1]
            logging.getLogger(__name__).warning(
                f"Memory ran out in the {stage} ({name})."
                + "".join(f" It is released and runs again: {way}." for way in following)
            )
    raise SigmaError(
        f"Memory ran out in the {stage}. Close other programs or make a smaller picture; `pixart-sigma plan` "
        "says what each stage needs."
    )


def peak_bytes(device: torch.device, use: Callable[[], Any]) -> int:
    """Bytes of storages alive at the peak of `use()`, beyond those alive before; on the meta device too."""
    meter = _StorageMeter(device)
    with meter:
        use()
    return meter.peak - meter.before


def readable(size: float) -> str:
    """Bytes for people; GB are 10^9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _forget_variables(error: BaseException | None):
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _stage_bytes(model: Any) -> int:
    """Bytes of weights that a stage needs on the device; a streamed model knows its own."""
    nbytes = getattr(_module(model), "nbytes", None)
    return weight_bytes(_module(model)) if nbytes is None else nbytes


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each storage counted once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def live_bytes(device: torch.device) -> int:
    """Bytes of tensors alive on the device: the allocator's count on CUDA, the live storages elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return sum(size for _, size in _live_storages(device).values())


def _live_storages(device: torch.device) -> dict[int, tuple[StorageWeakRef, int]]:
    storages = {}
    for thing in gc.get_objects():
        # type(), because isinstance asks lazy modules and proxies for their class, which imports them.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == device.type:
            try:
                storage = thing.untyped_storage()
                storages[_key(thing)] = (StorageWeakRef(storage), storage.nbytes())
            except (NotImplementedError, RuntimeError):
                continue  # a tensor without storage, such as a fake or sparse one
    return storages


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device: what the driver has and what torch keeps on CUDA, else
    free RAM."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _module(model: Any) -> Any:
    """The part of a stage's model that has `to`: a network, or a streamed encoder."""
    return model if isinstance(model, torch.nn.Module) else model.model


def _meter(device: torch.device):
    return _CudaMeter(device) if device.type == "cuda" else _StorageMeter(device)


class _CudaMeter:
    def __init__(self, device: torch.device):
        self.device, self.before, self.peak = device, 0, 0

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = self.peak = torch.cuda.memory_allocated(self.device)

    def __exit__(self, *_):
        self.look()

    def look(self):
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))


class _StorageMeter(TorchDispatchMode):
    """Follows the storages alive and those that operations make; counts them at a possible peak."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.peak = 0
        self.look()
        self.before = self.peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device.type:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._sum += storage.nbytes()
        if self._sum > self.peak:
            self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
            self._sum = sum(size for _, size in self._storages.values())
            self.peak = max(self.peak, self._sum)
        return output

    def look(self):
        """Count everything alive afresh: files bring tensors that no operation made."""
        self._storages = _live_storages(self.device)
        self._sum = sum(size for _, size in self._storages.values())
        self.peak = max(self.peak, self._sum)
