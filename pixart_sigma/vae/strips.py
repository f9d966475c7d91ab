"""The exact VAE decode in strips of rows, for pictures whose feature maps do not fit on the device.

Each layer runs over strips of its input with one row more above and below, so no strip has a border of its
own. Group normalisation takes the statistics of the whole map, gathered in float32 as its strips are made;
attention takes chunks of queries and all keys and values. The multiply-adds are those of the whole decode.
Between two layers a map waits on the device while there is room, and then in RAM; its strips are dropped as
the next layer consumes them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from ..errors import SigmaError
from .feature_maps import Parking, Rows
from .layers import Attention, Decoder, Layer, Resnet, Upsample, layers_of
from .memory import bytes_beside, shares, split_rows

# Enough to fill a GPU with one head; without a fused kernel their scores stay near 2 GB at 4096x4096.
QUERIES = 4096


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
    working, room = shares(budget)
    run = _Run(parking or Parking(latent.device, room), working, latent.dtype.itemsize, on_progress)
    layers = list(layers_of(decoder, *latent.shape[2:]))
    run.total = sum(layer.rows for layer in layers)
    run.parking.room -= bytes_beside(layers, latent.dtype.itemsize, budget)

    first, *between, last = layers
    try:
        rows = run.new_rows()
        rows.append(latent if decoder.quant is None else decoder.quant(latent))
        rows = run.convolve(first, rows)
        for layer in between:
            run_layer = {Resnet: run.resnet, Attention: run.attend, Upsample: run.upsample}[type(layer.block)]
            rows = run_layer(layer, rows)
        return run.finish(last, rows, decoder.norm_out)
    finally:
        run.parking.close()


class _Run:
    """One decode: where maps wait, how many bytes may be at work, and how far it is.

    Its methods take a layer and the map it reads, which they drop as they go, and return the map it makes.
    """

    def __init__(self, parking: Parking, working: float, itemsize: int, on_progress):
        self.parking, self.working, self.itemsize, self.on_progress = parking, working, itemsize, on_progress
        self.done = self.total = 0

    def new_rows(self) -> Rows:
        return Rows(self.parking)

    def strips(self, layer: Layer, source: Rows) -> Iterator[tuple[int, int]]:
        """The rows (first, last) of the source that the layer takes at a time."""
        for first, last in split_rows(
            source.edges, layer.at_work * source.width * self.itemsize, self.working
        ):
            yield first, last
            self.done += (last - first) * layer.scale
            self.on_progress(self.done, self.total)

    def convolve(self, layer: Layer, source: Rows) -> Rows:
        made = self.new_rows()
        for first, last in self.strips(layer, source):
            made.append(_apply(layer.block, _same, *_with_neighbours(source, first, last)))
            source.forget(last - 1)
        source.forget(source.height)
        return made

    def finish(self, layer: Layer, source: Rows, norm: nn.GroupNorm) -> torch.Tensor:
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

    def resnet(self, layer: Layer, source: Rows) -> Rows:
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

    def upsample(self, layer: Layer, source: Rows) -> Rows:
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

    def attend(self, layer: Layer, source: Rows) -> Rows:
        """Self-attention of all pixels with one head, added to the map."""
        block: Attention = layer.block
        normalise = source.normalise(block.norm)
        width = source.width
        keys = values = torch.empty(0)
        for first, last in self.strips(layer, source):
            rows = normalise(source.take(first, last))
            key, value = _project(block.key, rows), _project(block.value, rows)
            if first == 0:
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
    """A convolution of the activated rows; beyond the picture's edge there is zero."""
    rows = activate(rows)
    if not (above and below):
        rows = functional.pad(rows, (0, 0, 1 - above, 1 - below))
    padding, conv.padding = conv.padding, (0, 1)
    try:
        return conv(rows)
    finally:
        conv.padding = padding


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
