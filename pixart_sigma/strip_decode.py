"""The exact VAE decode in strips of rows, for pictures whose feature maps do not fit on the device.

Each layer runs over strips of its input with one row more above and below, so no strip has a border of its
own. Group normalisation takes the statistics of the whole map, gathered in float32 as its strips are made;
attention takes chunks of queries and all keys and values. The multiply-adds are those of the whole decode.
Between two layers a map waits on the device while there is room, and then in RAM; its strips are dropped as
the next layer consumes them.
"""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from torch.nn import functional

from .errors import SigmaError

# Larger strips are no faster.
WORKING_BYTES = 512 * 2**20
# Enough to fill a GPU with one head; without a fused kernel their scores stay near 2 GB at 4096x4096.
QUERIES = 4096


@dataclass(frozen=True)
class Resnet:
    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None


@dataclass(frozen=True)
class Attention:
    norm: nn.GroupNorm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module


@dataclass(frozen=True)
class Upsample:
    conv: nn.Conv2d


@dataclass(frozen=True)
class Decoder:
    """The layers of a decoder of the SDXL VAE's kind, in the order they run."""

    quant: nn.Conv2d | None
    conv_in: nn.Conv2d
    blocks: tuple[Resnet | Attention | Upsample, ...]
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d


def read_decoder(vae: nn.Module) -> Decoder | None:
    """The decoder of a diffusers AutoencoderKL or of ComfyUI's, None for another kind of VAE."""
    decoder = getattr(vae, "decoder", None)
    try:
        if hasattr(decoder, "mid_block"):
            blocks, norm_out = _diffusers_blocks(decoder), decoder.conv_norm_out
        elif hasattr(decoder, "mid"):
            blocks, norm_out = _original_blocks(decoder), decoder.norm_out
        else:
            return None
        return Decoder(
            getattr(vae, "post_quant_conv", None),
            _rowwise(decoder.conv_in),
            tuple(blocks),
            norm_out,
            _rowwise(decoder.conv_out),
        )
    except AttributeError:
        return None


def _diffusers_blocks(decoder) -> Iterator:
    def resnet(block):
        return _resnet_of(block, block.conv_shortcut)

    middle = decoder.mid_block
    yield resnet(middle.resnets[0])
    for attention, following in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            yield Attention(
                attention.group_norm, attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
            )
        yield resnet(following)
    for level in decoder.up_blocks:
        yield from map(resnet, level.resnets)
        for upsampler in level.upsamplers or ():
            yield Upsample(_rowwise(upsampler.conv))


def _original_blocks(decoder) -> Iterator:
    def resnet(block):
        return _resnet_of(block, getattr(block, "nin_shortcut", None))

    middle = decoder.mid
    yield resnet(middle.block_1)
    attention = middle.attn_1
    yield Attention(attention.norm, attention.q, attention.k, attention.v, attention.proj_out)
    yield resnet(middle.block_2)
    for level in reversed(decoder.up):
        if len(level.attn):
            raise AttributeError("attention above the middle")
        yield from map(resnet, level.block)
        if hasattr(level, "upsample"):
            yield Upsample(_rowwise(level.upsample.conv))


def _resnet_of(block, shortcut) -> Resnet:
    return Resnet(block.norm1, _rowwise(block.conv1), block.norm2, _rowwise(block.conv2), shortcut)


def _rowwise(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with the same weights, which leaves the rows above and below to its caller."""
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3) or conv.padding != (1, 1):
        raise AttributeError("another kind of convolution")
    conv = copy.copy(conv)
    conv.padding = (0, 1)
    return conv


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

    def park(self, strip: torch.Tensor) -> list[torch.Tensor]:
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

    def fetch(self, piece: torch.Tensor) -> torch.Tensor:
        """A piece on the device."""
        if id(piece) in self._stays:
            return piece
        self.moved += piece.nbytes
        return piece.to(self.device, non_blocking=True)

    def leave(self, piece: torch.Tensor):
        """A piece is not needed any more."""
        self.parked -= piece.nbytes
        if id(piece) in self._stays:
            self._stays.remove(id(piece))
            self.room += piece.nbytes

    def _to_ram(self, piece: torch.Tensor) -> torch.Tensor:
        if self.device.type == "meta":
            return piece.contiguous()
        waiting = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=self.device.type == "cuda")
        return waiting.copy_(piece, non_blocking=True)


class Rows:
    """A feature map (1, C, height, width) in strips of rows, with the mean and variance of each channel."""

    def __init__(self, parking: Parking):
        self.parking = parking
        self.edges = [0]  # the rows between which it was made
        self._pieces: list[tuple[int, torch.Tensor]] = []
        self._mean = self._variance = None

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


@torch.no_grad()
def decode_in_strips(
    decoder: Decoder,
    latent: torch.Tensor,
    budget: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    parking: Parking | None = None,
) -> torch.Tensor:
    """A picture (1, 3, 8h, 8w) in [-1, 1], float32, in RAM, from a latent (1, 4, h, w) on the VAE's device.

    The latent is divided by the scaling factor already, and in the dtype that the VAE computes in.
    budget: bytes on the device for feature maps, those at work and those that wait; by default WORKING_BYTES
    for those at work, and RAM for the others. `decode_memory` says beforehand what it comes to.
    on_progress(done, total) is called after each strip; what it raises stops the decode.
    Raises SigmaError for another shape, and for a budget that does not hold a row at work, or the keys and
    values of the attention.
    """
    if latent.ndim != 4 or latent.shape[0] != 1 or latent.shape[1] != decoder.conv_in.in_channels:
        raise SigmaError(
            f"One latent of shape (1, {decoder.conv_in.in_channels}, height, width) is decoded at a time; "
            f"this is {tuple(latent.shape)}."
        )
    working, room = _shares(budget)
    run = _Run(parking or Parking(latent.device, room), working, latent.dtype.itemsize, on_progress)
    layers = list(_layers(decoder, *latent.shape[2:]))
    run.total = sum(layer.rows for layer in layers)
    run.parking.room -= _bytes_beside(layers, latent.dtype.itemsize, budget)

    rows = run.new_rows()
    rows.append(latent if decoder.quant is None else decoder.quant(latent))
    first, *between, last = layers
    rows = run.convolve(first, rows)
    for layer in between:
        run_layer = {Resnet: run.resnet, Attention: run.attend, Upsample: run.upsample}[type(layer.block)]
        rows = run_layer(layer, rows)
    return run.finish(last, rows, decoder.norm_out)


def whole_decode_bytes(decoder: Decoder, height: int, width: int, itemsize: int) -> int:
    """Bytes on the device of the whole decode of a latent (1, 4, height, width), the weights apart.

    The peak is in a residual block: its input, what that is normalised to and what that is activated to; or
    at its end, in diffusers, the input, both summands, the sum, and the same divided by one.
    """
    largest = 0
    for layer in _layers(decoder, height, width):
        if isinstance(layer.block, Resnet):
            wide, narrow = layer.channels, layer.block.conv1.out_channels
            kept = 0 if layer.block.shortcut is None else wide
            largest = max(largest, max(3 * wide, kept + 4 * narrow) * layer.height * layer.width)
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
    working, room = _shares(budget)
    layers = list(_layers(decoder, height, width))
    room = max(room - _bytes_beside(layers, itemsize, budget), 0)
    if in_ram:
        room = math.inf
    edges, device, ram = [0, height], 0, 0
    for layer in layers:
        row = layer.width // layer.scale * itemsize
        strips = list(_split(edges, layer.at_work * row, working))
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


@dataclass(frozen=True)
class _Layer:
    """A layer, the map (height, width) it makes, and what it needs, in numbers rather than bytes.

    channels: of the map it reads. at_work: what a strip needs per pixel of the map it reads, which are its
    rows, the same normalised, and at the picture's edge the same with zeros around. waiting: the most that
    waits between two strips. beside: what stays on the device throughout.
    """

    block: nn.Conv2d | Resnet | Attention | Upsample
    channels: int
    height: int
    width: int
    at_work: int
    waiting: int
    beside: int = 0

    @property
    def scale(self) -> int:
        """Rows that a row of the map it reads becomes."""
        return 2 if isinstance(self.block, Upsample) else 1

    @property
    def rows(self) -> int:
        """Rows that it makes, in all its passes."""
        return self.height * (2 if isinstance(self.block, Resnet | Attention) else 1)


def _layers(decoder: Decoder, height: int, width: int) -> Iterator[_Layer]:
    """The layers of the decode of a latent (1, 4, height, width)."""
    for block in (decoder.conv_in, *decoder.blocks, decoder.conv_out):
        pixels = height * width
        if isinstance(block, Resnet):
            wide, narrow = block.conv1.in_channels, block.conv1.out_channels
            waiting = wide + narrow if block.shortcut is None else max(wide, 2 * narrow)
            yield _Layer(block, wide, height, width, 3 * max(wide, narrow), waiting * pixels)
        elif isinstance(block, Attention):
            wide = block.norm.num_channels
            yield _Layer(block, wide, height, width, 6 * wide, wide * pixels, 2 * wide * pixels)
        elif isinstance(block, Upsample):
            wide, height, width = block.conv.in_channels, 2 * height, 2 * width
            yield _Layer(block, wide, height, width, 12 * wide, wide * 4 * pixels)
        else:
            wide = max(block.in_channels, block.out_channels)
            yield _Layer(block, block.in_channels, height, width, 3 * wide, wide * pixels)


def least_budget(decoder: Decoder, height: int, width: int, itemsize: int) -> int:
    """The smallest budget, to the next 1 % or so, in which a latent (1, 4, height, width) is decoded."""
    budget = 1e6
    while True:
        try:
            decode_memory(decoder, height, width, itemsize, budget)
            return int(budget)
        except SigmaError:
            budget *= 1.01


def decode_within(
    decoder: Decoder | None,
    latent: torch.Tensor,
    budget: float,
    decode_whole: Callable[[torch.Tensor], torch.Tensor],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    may_be_whole: bool = True,
) -> torch.Tensor:
    """The picture of a latent as `decode_in_strips` takes and makes it: whole where the budget allows that,
    else in strips; in strips too where memory runs out, and in smaller ones if it does once more.

    A decoder of None can only be decoded whole. Raises SigmaError that says what would fit: in too little
    memory on the device, and where the maps that wait need more RAM than is free.
    """
    if decoder is None:
        return decode_whole(latent)
    shape = (latent.shape[2], latent.shape[3], latent.dtype.itemsize)
    if may_be_whole and whole_decode_bytes(decoder, *shape) <= budget:
        try:
            return decode_whole(latent)
        except torch.OutOfMemoryError:
            logging.warning("Memory ran out while the picture was decoded whole; decoding it in strips.")
    least = least_budget(decoder, *shape)
    for limit in (budget, max(budget / 2, least)):
        try:
            needed = decode_memory(decoder, *shape, limit).ram
            if latent.device.type != "cpu" and needed > (free := psutil.virtual_memory().available):
                raise SigmaError(
                    f"The decode keeps {needed / 1e9:.1f} GB in RAM, and {free / 1e9:.1f} GB is free. Close "
                    "other programs, give the decode a larger budget, or decode in tiles."
                )
            return decode_in_strips(decoder, latent, limit, on_progress)
        except torch.OutOfMemoryError:
            logging.warning(f"Memory ran out at a decode budget of {limit / 1e6:.0f} MB.")
    raise SigmaError(
        f"The decode does not fit in the memory that is free. It needs at least {least / 1e6:.0f} MB beside "
        "the VAE's weights: close other programs, make a smaller picture, or decode in tiles."
    )


def _shares(budget: float | None) -> tuple[float, float]:
    """(bytes at work, bytes that wait on the device)"""
    if budget is None:
        return WORKING_BYTES, 0
    working = min(WORKING_BYTES, budget / 2)
    return working, budget - working


def _split(edges: list[int], row: int, working: float) -> Iterator[tuple[int, int]]:
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


def _bytes_beside(layers: list[_Layer], itemsize: int, budget: float | None) -> int:
    """Bytes of the keys and values, for which there is room from the start. Raises SigmaError where not."""
    beside = sum(layer.beside for layer in layers) * itemsize
    working, room = _shares(budget)
    if budget is not None and room < beside:
        raise SigmaError(
            f"The decode needs {(working + beside) / 1e6:.0f} MB for the attention of a picture as large as "
            f"this, and the budget is {budget / 1e6:.0f} MB. Give it more, or decode in tiles."
        )
    return beside


class _Run:
    """One decode: where maps wait, how many bytes may be at work, and how far it is.

    Its methods take a layer and the map it reads, which they drop as they go, and return the map it makes.
    """

    def __init__(self, parking: Parking, working: float, itemsize: int, on_progress):
        self.parking, self.working, self.itemsize, self.on_progress = parking, working, itemsize, on_progress
        self.done = self.total = 0

    def new_rows(self) -> Rows:
        return Rows(self.parking)

    def strips(self, layer: _Layer, source: Rows) -> Iterator[tuple[int, int]]:
        """The rows (first, last) of the source that the layer takes at a time."""
        for first, last in _split(source.edges, layer.at_work * source.width * self.itemsize, self.working):
            yield first, last
            self.done += (last - first) * layer.scale
            self.on_progress(self.done, self.total)

    def convolve(self, layer: _Layer, source: Rows) -> Rows:
        made = self.new_rows()
        for first, last in self.strips(layer, source):
            made.append(_apply(layer.block, _same, *_with_neighbours(source, first, last)))
            source.forget(last - 1)
        source.forget(source.height)
        return made

    def finish(self, layer: _Layer, source: Rows, norm: nn.GroupNorm) -> torch.Tensor:
        """The last convolution, of the normalised and activated map, into a picture in RAM."""
        place = "meta" if self.parking.device.type == "meta" else "cpu"
        picture = torch.empty((1, layer.block.out_channels, source.height, source.width), device=place)
        activate = _activation(source, norm)
        for first, last in self.strips(layer, source):
            strip = _apply(layer.block, activate, *_with_neighbours(source, first, last))
            picture[:, :, first:last] = strip.float().to(place)
            source.forget(last - 1)
        source.forget(source.height)
        return picture

    def resnet(self, layer: _Layer, source: Rows) -> Rows:
        block: Resnet = layer.block
        hidden = self.new_rows()
        residual = source if block.shortcut is None else self.new_rows()
        activate = _activation(source, block.norm1)
        for first, last in self.strips(layer, source):
            rows, above, below = _with_neighbours(source, first, last)
            if block.shortcut is not None:
                residual.append(block.shortcut(rows[:, :, above : above + last - first]))
                source.forget(last - 1)
            hidden.append(_apply(block.conv1, activate, rows, above, below))
            del rows
        if block.shortcut is not None:
            source.forget(source.height)

        made = self.new_rows()
        activate = _activation(hidden, block.norm2)
        for first, last in self.strips(layer, hidden):
            strip = _apply(block.conv2, activate, *_with_neighbours(hidden, first, last))
            hidden.forget(last - 1)
            strip += residual.take(first, last)
            residual.forget(last)
            made.append(strip)
        hidden.forget(hidden.height)
        return made

    def upsample(self, layer: _Layer, source: Rows) -> Rows:
        """Each pixel becomes 2x2, then a convolution."""
        made = self.new_rows()
        for first, last in self.strips(layer, source):
            rows, above, below = _with_neighbours(source, first, last)
            rows = functional.interpolate(rows, scale_factor=2.0, mode="nearest")
            # Of a neighbour's two rows only the near one is next to the strip.
            rows = rows[:, :, above : rows.shape[2] - below]
            made.append(_apply(layer.block.conv, _same, rows, above, below))
            source.forget(last - 1)
            del rows
        source.forget(source.height)
        return made

    def attend(self, layer: _Layer, source: Rows) -> Rows:
        """Self-attention of all pixels with one head, added to the map."""
        block: Attention = layer.block
        normalise = source.normalise(block.norm)
        width = source.width
        keys = values = None
        for first, last in self.strips(layer, source):
            rows = normalise(source.take(first, last))
            key, value = _project(block.key, rows), _project(block.value, rows)
            if keys is None:
                keys, values = (
                    part.new_empty((1, source.height * width, part.shape[2])) for part in (key, value)
                )
            keys[:, first * width : last * width] = key
            values[:, first * width : last * width] = value
            del rows, key, value

        made = self.new_rows()
        most = max(1, QUERIES // width)
        for first, last in self.strips(layer, source):
            parts = []
            for start in range(first, last, most):
                rows = source.take(start, min(start + most, last))
                queries = _project(block.query, normalise(rows))
                attended = functional.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
                parts.append(rows + _unproject(block.out, attended, width))
            made.append(torch.cat(parts, dim=2))
            source.forget(last)
        self.parking.room += layer.beside * self.itemsize
        return made


def _with_neighbours(source: Rows, first: int, last: int) -> tuple[torch.Tensor, int, int]:
    """The rows with one more above and below where the map has one, and how many those are (0 or 1)."""
    above, below = int(first > 0), int(last < source.height)
    return source.take(first - above, last + below), above, below


def _activation(source: Rows, norm: nn.GroupNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    normalise = source.normalise(norm)
    return lambda rows: functional.silu(normalise(rows), inplace=True)


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _apply(conv: nn.Conv2d, activate, rows: torch.Tensor, above: int, below: int) -> torch.Tensor:
    """A rowwise convolution of the activated rows; beyond the picture's edge there is zero."""
    rows = activate(rows)
    if not (above and below):
        rows = functional.pad(rows, (0, 0, 1 - above, 1 - below))
    return conv(rows)


def _project(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Tokens (1, n, C') of rows (1, C, height, width), by a linear layer or a 1x1 convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer(rows).flatten(2).transpose(1, 2)
    return layer(rows.flatten(2).transpose(1, 2))


def _unproject(layer: nn.Module, tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Rows (1, C, height, width) of tokens (1, n, C')."""
    if isinstance(layer, nn.Conv2d):
        return layer(tokens.transpose(1, 2).unflatten(2, (-1, width)))
    return layer(tokens).transpose(1, 2).unflatten(2, (-1, width))
