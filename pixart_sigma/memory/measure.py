"""Bytes: of weights, of what is alive on a device, of what is free there, and the peak of a piece of work."""

import gc
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    """Bytes that can still be allocated on the device: what the driver has and what torch keeps on CUDA, both
    within the share of the card that the process may use; else free RAM."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        free, total = torch.cuda.mem_get_info(index)
        reserved, allocated = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(index))
        return min(free + reserved, allowed) - allocated
    return psutil.virtual_memory().available


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(device: torch.device, use: Callable[[], Any]) -> int:
    """Bytes of storages alive at the peak of `use()`, beyond those alive before; on the meta device too."""
    meter = StorageMeter(device)
    with meter:
        use()
    return meter.peak - meter.before


def readable(size: float) -> str:
    """Bytes for people; GB are 10^9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def make_meter(device: torch.device):
    return CudaMeter(device) if device.type == "cuda" else StorageMeter(device)


class CudaMeter:
    def __init__(self, device: torch.device):
        self.device, self.before, self.peak = device, 0, 0

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = self.peak = torch.cuda.memory_allocated(self.device)

    def __exit__(self, *_):
        self.look()

    def look(self):
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))


class StorageMeter(TorchDispatchMode):
    """Follows the storages alive and those that operations make; counts them at a possible peak."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = 0
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
