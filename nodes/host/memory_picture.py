"""The memory report as a picture and as text. Sizes are in GB of 10^9 bytes, or MB where all are small."""

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from .memory import Stage

WIDTH = 960
LEFT = 230  # where the bars start
RIGHT = 130  # room for the number behind the longest bar
BAR = 20
GAP = 22
TOP = 96
BACKGROUND, TEXT, FAINT = "#ffffff", "#222222", "#d8d8d8"
COLORS = {"before": "#9aa5b1", "peak": "#e4572e", "after": "#2e86ab"}
NOTHING = "No stage of PixArt-Sigma has run yet."


def table(title: str, stages: list[Stage]) -> str:
    """One line per stage, in columns."""
    if not stages:
        return NOTHING
    rows = [("stage", "before", "peak", "after", "seconds")]
    for stage in stages:
        sizes = [size_text(getattr(stage, moment), stages) for moment in COLORS]
        rows.append((stage.name, *sizes, f"{stage.seconds:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([title, *lines])


def draw(title: str, stages: list[Stage]) -> torch.Tensor:
    """The bars as an image (1, H, W, 3) in [0, 1]; all stages share one scale that starts at zero."""
    height = TOP + max(1, len(stages)) * (3 * BAR + GAP) + GAP
    picture = Image.new("RGB", (WIDTH, height), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    large, normal = ImageFont.load_default(22), ImageFont.load_default(15)
    pen.text((20, 16), title, TEXT, large)

    x = 20
    for moment, color in COLORS.items():
        pen.rectangle((x, 60, x + 15, 75), color)
        pen.text((x + 22, 59), moment, TEXT, normal)
        x += 100

    if not stages:
        pen.text((20, TOP + GAP), NOTHING, TEXT, normal)
    most = max((max(stage.before, stage.peak, stage.after) for stage in stages), default=1)
    for index, stage in enumerate(stages):
        y = TOP + GAP // 2 + index * (3 * BAR + GAP)
        pen.line((20, y - GAP // 2, WIDTH - 20, y - GAP // 2), FAINT)
        pen.text((20, y + BAR - 8), shorten(stage.name, normal), TEXT, normal)
        pen.text((20, y + BAR + 12), f"{stage.seconds:.1f} s", COLORS["before"], normal)
        for moment, color in COLORS.items():
            size = getattr(stage, moment)
            end = LEFT + (WIDTH - LEFT - RIGHT) * size / max(most, 1)
            pen.rectangle((LEFT, y + 2, end, y + BAR - 2), color)
            pen.text((end + 8, y + 1), size_text(size, stages), TEXT, normal)
            y += BAR
    return torch.from_numpy(numpy.asarray(picture).astype("float32") / 255)[None]


def size_text(size: int, stages: list[Stage]) -> str:
    if max(max(stage.before, stage.peak, stage.after) for stage in stages) < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.2f} GB"


def shorten(name: str, font) -> str:
    while len(name) > 4 and font.getlength(name) > LEFT - 40:
        name = name[:-4] + "..."
    return name
