"""What the decode of a latent will need in memory, and how a budget is shared out and rows are cut to it."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import SigmaError
from .layers import Decoder, Layer, Resnet, layers_of

# Larger strips are no faster.
WORKING_BYTES = 512 * 2**20


def whole_decode_bytes(decoder: Decoder, height: int, width: int, itemsize: int) -> int:
    """Bytes on the device of the whole decode of a latent (1, 4, height, width), the weights apart.

    The peak is in a residual block: its input, what that is normalised to and what that is activated to; or
    at its end, in diffusers, the input, both summands, the sum, and the same divided by one.
    """
    largest = 0
    for layer in layers_of(decoder, height, width):
        if isinstance(layer.block, Resnet):
            wide, narrow = layer.channels, layer.block.conv1.out_channels
            kept = 0 if layer.block.shortcut is None else wide
            largest = max(largest, max(3 * wide, kept + 4 * narrow) * layer.height * layer.width)
    return largest * itemsize


def whole_encode_bytes(widths: Sequence[int], height: int, width: int, itemsize: int) -> int:
    """Bytes on the device of the encode of a picture (1, 3, height, width), the weights apart.

    widths: the channels of the encoder's levels, each of half the size of the one before. The peak is at the
    end of a residual block, as in `whole_decode_bytes`.
    """
    largest, narrow = 0, widths[0]
    for level, wide in enumerate(widths):
        kept = narrow if narrow != wide else 0
        largest = max(largest, max(3 * narrow, kept + 4 * wide) * (height >> level) * (width >> level))
        narrow = wide
    return largest * itemsize


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes that a decode in strips needs on the device and in RAM, the VAE's weights apart."""

    device: int
    ram: int


def decode_memory(
    decoder: Decoder,
    height: int,
    width: int,
    itemsize: int,
    budget: float | None = None,
    in_ram: bool = False,
) -> DecodeMemory:
    """What the decode in strips of a latent (1, 4, height, width) needs, within one strip of each map.

    in_ram: the device is the CPU, where all maps wait on it.
    Raises SigmaError for a budget that is too small, as the decode does.
    """
    working, room = shares(budget)
    layers = list(layers_of(decoder, height, width))
    room = max(room - bytes_beside(layers, itemsize, budget), 0)
    if in_ram:
        room = math.inf
    edges, device, ram = [0, height], 0.0, 0.0
    for layer in layers:
        row = layer.width // layer.scale * itemsize
        strips = list(split_rows(edges, layer.at_work * row, working))
        rows = max(last - first for first, last in strips)
        strip = rows * layer.scale * layer.channels * layer.width * itemsize
        waiting = layer.waiting * itemsize + strip
        device = max(device, rows * layer.at_work * row + layer.beside * itemsize + min(waiting, room))
        if waiting > room:
            ram = max(ram, waiting - room + strip)
        if budget is not None:
            room += layer.beside * itemsize
        edges = [0, *(last * layer.scale for _, last in strips)]
    return DecodeMemory(int(device), int(ram))


def least_budget(decoder: Decoder, height: int, width: int, itemsize: int) -> int:
    """The smallest budget, to the next 1 % or so, in which a latent (1, 4, height, width) is decoded."""
    budget = 1e6
    while True:
        try:
            decode_memory(decoder, height, width, itemsize, budget)
            return int(budget)
        except SigmaError:
            budget *= 1.01


def shares(budget: float | None) -> tuple[float, float]:
    """(bytes at work, bytes that wait on the device)"""
    if budget is None:
        return WORKING_BYTES, 0
    working = min(WORKING_BYTES, budget / 2)
    return working, budget - working


def split_rows(edges: list[int], row: int, working: float) -> Iterator[tuple[int, int]]:
    """Strips (first, last) of rows that need `row` bytes each. Raises SigmaError where not even one fits.

    Never across two strips of the map, and in equal parts: one that waits in RAM comes back as a whole.
    """
    most = int(working // row)
    if most < 1:
        raise SigmaError(
            f"The decode needs {2 * row / 1e6:.0f} MB for a row of a picture as wide as this, and the budget "
            f"is {2 * working / 1e6:.0f} MB. Give it more, or decode in tiles."
        )
    for start, end in itertools.pairwise(edges):
        count = -(-(end - start) // -(-(end - start) // most))
        for first in range(start, end, count):
            yield first, min(first + count, end)


def bytes_beside(layers: list[Layer], itemsize: int, budget: float | None) -> int:
    """Bytes of the keys and values, for which there is room from the start. Raises SigmaError where not."""
    beside = sum(layer.beside for layer in layers) * itemsize
    working, room = shares(budget)
    if budget is not None and room < beside:
        raise SigmaError(
            f"The decode needs {(working + beside) / 1e6:.0f} MB for the attention of a picture as large as "
            f"this, and the budget is {budget / 1e6:.0f} MB. Give it more, or decode in tiles."
        )
    return beside
