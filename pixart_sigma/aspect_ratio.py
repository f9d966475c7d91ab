"""The sizes PixArt-Σ was trained on, and how one is picked.

The tables are the authors' (`diffusion/data/datasets/utils.py` of PixArt-sigma): the key is height / width,
the value (height, width). People write ratios the other way round, width:height, and so does this module
wherever it speaks to them: `16:9` is landscape.
"""

import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SettingError, SigmaError

if TYPE_CHECKING:
    import torch

MIN_SIZE = 16
MAX_SIZE = 8192

# Base size -> {height / width: (height, width)}; 4096 is the authors' ASPECT_RATIO_2880_TEST.
TABLES: dict[int, dict[str, tuple[int, int]]] = {
    int(base): {key: tuple(size) for key, size in table.items()}
    for base, table in json.loads(
        Path(__file__).with_name("aspect_ratio_tables.json").read_text(encoding="utf-8")
    ).items()
}

# The reference pipeline keeps fewer ratios than the training tables, except at 2048.
_NOT_BINNED = {"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"}

# Transformer sample_size -> the table of PixArtSigmaPipeline's `use_resolution_binning`.
BINNING: dict[int, dict[str, tuple[int, int]]] = {
    base // 8: {key: size for key, size in TABLES[base].items() if base == 2048 or key not in _NOT_BINNED}
    for base in (256, 512, 1024, 2048)
}


@dataclass(frozen=True)
class Bucket:
    """A trained size in pixels; `ratio` is width:height in lowest terms, `base` the table it is from."""

    width: int
    height: int
    ratio: str
    base: int


def buckets(base: int) -> list[Bucket]:
    """Every bucket of a base size, from the widest to the tallest; SigmaError for an unknown base."""
    return [_bucket(size, base) for size in _table(base).values()]


def by_ratio(ratio: str | float, base: int) -> Bucket:
    """The bucket nearest to a ratio: "16:9" as width:height, or width / height as a number.

    SigmaError when it is not a ratio or lies outside 1:4 to 4:1, where no checkpoint was trained.
    """
    width_to_height = _parse_ratio(ratio)
    if not 0.25 <= width_to_height <= 4:
        raise SigmaError(
            f"The aspect ratio {ratio} is outside the trained range. Use width:height between 1:4 and 4:1."
        )
    return _bucket(_closest(1 / width_to_height, _table(base)), base)


def nearest(width: int, height: int, base: int, binning: bool = False) -> Bucket:
    """The bucket of `base` whose ratio is nearest to that of width x height pixels.

    The rule is the authors': the smallest |height / width - key|. `binning` restricts the choice to the
    ratios of the reference pipeline's `use_resolution_binning`, which exist for bases 256 to 2048.
    SigmaError for an unknown base or a size that `check_size` refuses.
    """
    check_size(width, height)
    table = _table(base)
    if binning:
        if base // 8 not in BINNING:
            raise SigmaError(f"There is no resolution binning for base {base}. Use 256, 512, 1024 or 2048.")
        table = BINNING[base // 8]
    return _bucket(_closest(height / width, table), base)


pick_size = nearest


def check_size(width: int, height: int) -> None:
    """SettingError unless both are whole numbers of pixels from 16 to 8192."""
    check_side("width", width)
    check_side("height", height)


def check_side(name: str, value: Any) -> int:
    """The pixels of a width or height; SettingError unless it is a whole number from 16 to 8192."""
    try:
        pixels = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        pixels = None
    if pixels is None:
        raise SettingError(name, repr(value), "give a whole number of pixels")
    if not MIN_SIZE <= pixels <= MAX_SIZE:
        raise SettingError(name, pixels, f"give {MIN_SIZE} to {MAX_SIZE} pixels")
    return pixels


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "1024x768"; SigmaError for other text and for sizes `check_size` refuses."""
    parts = text.strip().lower().replace("×", "x").split("x")
    try:
        width, height = (int(part) for part in parts)
    except ValueError:
        raise SigmaError(f"The size {text!r} is not WIDTHxHEIGHT. Write it like 1024x768.") from None
    check_size(width, height)
    return width, height


def crop_back(images: "torch.Tensor", width: int, height: int) -> "torch.Tensor":
    """Images (B, 3, H, W) scaled to cover width x height, bilinear, and cut to it around the centre.

    The arithmetic is that of diffusers' `PixArtImageProcessor.resize_and_crop_tensor`, with one difference:
    where its rounding leaves the scaled image a pixel short (such as 480 -> 965), this one still covers.
    """
    import torch.nn.functional as F

    check_size(width, height)
    from_height, from_width = images.shape[-2:]
    if (from_height, from_width) == (height, width):
        return images
    scale = max(height / from_height, width / from_width)
    cover = (max(int(from_height * scale), height), max(int(from_width * scale), width))
    images = F.interpolate(images, size=cover, mode="bilinear", align_corners=False)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def _table(base: int) -> dict[str, tuple[int, int]]:
    if base not in TABLES:
        raise SigmaError(
            f"There is no size table for base {base!r}. Use one of {', '.join(map(str, TABLES))}."
        )
    return TABLES[base]


def _closest(height_to_width: float, table: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return table[min(table, key=lambda key: abs(float(key) - height_to_width))]


def _bucket(size: tuple[int, int], base: int) -> Bucket:
    height, width = size
    shared = math.gcd(width, height)
    return Bucket(width, height, f"{width // shared}:{height // shared}", base)


def _parse_ratio(ratio: str | float) -> float:
    """Width / height, positive and finite."""
    try:
        if isinstance(ratio, str):
            width, height = (float(part) for part in ratio.split(":"))
        else:
            width, height = float(ratio), 1.0
        value = width / height
    except (TypeError, ValueError, ZeroDivisionError):
        value = math.nan
    else:
        if width <= 0 or height <= 0:
            value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise SigmaError(f"The aspect ratio {ratio!r} is not WIDTH:HEIGHT. Write it like 16:9.")
    return value
