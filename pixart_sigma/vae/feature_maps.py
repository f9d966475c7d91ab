"""Feature maps in strips of rows, which wait on the device or in RAM between two layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

# Torch rounds pinned memory up to a power of two, and keeps what is freed for the next of the same size.
CHUNK = 2**20


class Parking:
    """Where feature maps wait: on the device while `room` bytes last, then in RAM, pinned for a GPU.

    On a CPU it is all the same. `parked` are the bytes that wait now, `parked_peak` the most there were, and
    `moved` those that went to RAM or came back.
    """

    def __init__(self, device: torch.device, room: float):
        self.device, self.room = device, room
        self.leaves_device = device.type != "cpu"
        self.parked = self.parked_peak = self.moved = 0
        self._stays: set[int] = set()

    def park(self, strip: torch.Tensor) -> list[torch.Tensor | InRAM]:
        """The rows (1, C, rows, width) as pieces that wait, from the top.

        In RAM the first and the last row, which two strips need, wait apart, so that each piece comes back
        as one copy.
        """
        self.parked += strip.nbytes
        self.parked_peak = max(self.parked_peak, self.parked)
        if not self.leaves_device or strip.nbytes <= self.room:
            self.room -= strip.nbytes
            self._stays.add(id(strip))
            return [strip]
        self.moved += strip.nbytes
        edges = (0, 1, strip.shape[2] - 1, strip.shape[2])
        pieces = [strip[:, :, first:last] for first, last in itertools.pairwise(edges) if first < last]
        return [self._to_ram(piece) for piece in pieces]

    def fetch(self, piece: torch.Tensor | InRAM) -> torch.Tensor:
        """A piece on the device."""
        if isinstance(piece, torch.Tensor) and id(piece) in self._stays:
            return piece
        self.moved += piece.nbytes
        return piece.to(self.device)

    def leave(self, piece: torch.Tensor | InRAM):
        """A piece is not needed any more."""
        self.parked -= piece.nbytes
        if id(piece) in self._stays:
            self._stays.remove(id(piece))
            self.room += piece.nbytes

    def _to_ram(self, piece: torch.Tensor) -> torch.Tensor | InRAM:
        return piece.contiguous() if self.device.type == "meta" else InRAM(piece)

    def close(self):
        """Give pinned memory back to the system."""
        if self.device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()


class InRAM:
    """A copy of a piece in RAM, in chunks of equal size; pinned if it comes from CUDA and RAM allows."""

    def __init__(self, piece: torch.Tensor):
        self.shape, self.dtype, self.nbytes = piece.shape, piece.dtype, piece.nbytes
        self._chunks = []
        for part in piece.reshape(-1).split(CHUNK // piece.dtype.itemsize):
            chunk = _pinned(part) if piece.is_cuda else torch.empty_like(part)
            self._chunks.append(chunk[: part.numel()].copy_(part, non_blocking=True))

    def to(self, device: torch.device) -> torch.Tensor:
        piece = torch.empty(self.shape, dtype=self.dtype, device=device)
        parts = piece.view(-1).split(CHUNK // self.dtype.itemsize)
        for part, chunk in zip(parts, self._chunks, strict=True):
            part.copy_(chunk, non_blocking=True)
        return piece


def _pinned(part: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty(CHUNK // part.dtype.itemsize, dtype=part.dtype, pin_memory=True)
    except RuntimeError:  # the system allows no more: slower, and as right
        return torch.empty_like(part, device="cpu")


class Rows:
    """A feature map (1, C, height, width) in strips of rows, with the mean and variance of each channel."""

    def __init__(self, parking: Parking):
        self.parking = parking
        self.edges = [0]  # the rows between which it was made
        self._pieces: list[tuple[int, torch.Tensor | InRAM]] = []
        self._mean = self._variance = torch.empty(0)  # until there are rows

    @property
    def height(self) -> int:
        """Rows so far."""
        return self.edges[-1]

    def append(self, strip: torch.Tensor):
        """Take the next rows, (1, C, rows, width)."""
        self.channels, self.width = strip.shape[1], strip.shape[3]
        self._add_statistics(strip)
        row = self.height
        self.edges.append(row + strip.shape[2])
        for piece in self.parking.park(strip):
            self._pieces.append((row, piece))
            row += piece.shape[2]

    def take(self, first: int, last: int) -> torch.Tensor:
        """Rows first to last, the last not included, on the device."""
        found = [
            self.parking.fetch(piece)[:, :, max(first - start, 0) : last - start]
            for start, piece in self._pieces
            if start < last and first < start + piece.shape[2]
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def forget(self, row: int):
        """Drop the pieces that lie wholly above `row`."""
        while self._pieces and self._pieces[0][0] + self._pieces[0][1].shape[2] <= row:
            self.parking.leave(self._pieces.pop(0)[1])

    def _add_statistics(self, strip: torch.Tensor):
        # A few channels at a time, so that half precision needs no whole copy in float32.
        parts = [torch.var_mean(part.float(), dim=(0, 2, 3), correction=0) for part in strip.chunk(8, dim=1)]
        variance, mean = (torch.cat(values) for values in zip(*parts, strict=True))
        before, count = self.height, strip.shape[2]
        if before == 0:
            self._mean, self._variance = mean, variance
            return
        # Chan, Golub and LeVeque (1979), equation 2.1, for the variance instead of the sum of squares.
        share = count / (before + count)
        difference = mean - self._mean
        self._mean = self._mean + difference * share
        self._variance = (
            self._variance * (1 - share) + variance * share + difference.square() * (share * (1 - share))
        )

    def normalise(self, norm: nn.GroupNorm) -> Callable[[torch.Tensor], torch.Tensor]:
        """The group normalisation of the whole map, for any of its rows."""
        means = self._mean.view(norm.num_groups, -1)
        variances = self._variance.view(norm.num_groups, -1)
        mean = means.mean(dim=1, keepdim=True)
        variance = (variances + (means - mean).square()).mean(dim=1, keepdim=True)
        mean, variance = mean.expand_as(means).flatten(), variance.expand_as(means).flatten()
        weight, bias = (tensor.to(mean.device, torch.float32) for tensor in (norm.weight, norm.bias))
        # Batch normalisation with given statistics: one kernel, float32 inside.
        return lambda rows: functional.batch_norm(rows, mean, variance, weight, bias, False, 0.0, norm.eps)
