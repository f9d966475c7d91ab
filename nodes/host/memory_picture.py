"""The memory report as a picture, text and JSON. Sizes are in GB of 10^9 bytes, or MB if all are small."""

import json
from dataclasses import asdict

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from ...pixart_sigma.table import align
from .memory import Held, Stage

WIDTH = 960
LEFT = 250  # where the bars start
RIGHT = 120  # room for the number behind the longest bar
BAR = 30
ROW = 62
TOP = 100
LINE = 22  # of the models below
BACKGROUND, TEXT, QUIET, FAINT = "#ffffff", "#222222", "#6b7783", "#d8d8d8"
BEFORE, DURING, OVER, BUDGET = "#9aa5b1", "#2e86ab", "#e4572e", "#b3261e"
FONTS = tuple(ImageFont.load_default(size) for size in (22, 15, 13))
NOTHING = "No stage of PixArt-Sigma has run yet."


def report(title: str, stages: list[Stage], held: list[Held], budget: int = 0) -> str:
    """The figures as JSON, in bytes and seconds; the budget is null where there is none."""
    return json.dumps(
        {
            "measured": title,
            "budget": budget or None,
            "stages": [asdict(stage) for stage in stages],
            "held": [asdict(model) for model in held],
        },
        indent=2,
    )


def table(title: str, stages: list[Stage], held: list[Held], budget: int = 0) -> str:
    """One line per stage, in columns, and one per model that the host holds."""
    lines = [title]
    if stages:
        rows = [("stage", "node", "before", "peak", "after", "loaded", "freed", "seconds")]
        for stage in stages:
            sizes = (stage.before, stage.peak, stage.after, stage.loaded, stage.freed)
            over = " over budget" if budget and stage.peak > budget else ""
            texts = (size_text(size, stages) for size in sizes)
            rows.append((stage.name, stage.node or "", *texts, f"{stage.seconds:.1f}{over}"))
        lines.append(align(rows, left=(0, 7)))
    else:
        lines.append(NOTHING)
    if budget:
        lines.append(f"budget: {size_text(budget, stages)}")
    return "\n".join([*lines, *(f"still held: {held_text(model)}" for model in held)])


def draw(title: str, stages: list[Stage], held: list[Held], budget: int = 0) -> torch.Tensor:
    """The image (1, H, W, 3) in [0, 1]: a bar up to each stage's peak, its part that was in use before in
    gray, against the budget's line; below, the models that the host holds. One scale, from zero."""
    bottom = TOP + max(1, len(stages)) * ROW
    picture = Image.new("RGB", (WIDTH, bottom + LINE * len(held) + 30), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    large, normal, small = FONTS
    pen.text((20, 12), title, TEXT, large)
    x = 20
    for color, words in ((BEFORE, "in use before"), (DURING, "at the peak"), (OVER, "over the budget")):
        if color != OVER or budget:
            pen.rectangle((x, 50, x + 15, 65), color)
            pen.text((x + 22, 49), words, TEXT, normal)
            x += 40 + int(normal.getlength(words))
    if not stages:
        pen.text((20, TOP + 20), NOTHING, TEXT, normal)

    most = max([budget, 1, *(stage.peak for stage in stages)])

    def place(size: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * size / most

    for index, stage in enumerate(stages):
        _draw_stage(pen, TOP + index * ROW, stage, stages, place, budget)
    if budget and stages:
        x = place(budget)
        words = f"budget {size_text(budget, stages)}"
        pen.text((x - small.getlength(words) / 2, TOP - 28), words, BUDGET, small)
    for index, model in enumerate(held):
        words = f"still held: {held_text(model)}"
        pen.text((20, bottom + 12 + index * LINE), words, QUIET, normal)
    return torch.from_numpy(numpy.asarray(picture).astype("float32") / 255)[None]


def _draw_stage(pen, y: int, stage: Stage, stages: list[Stage], place, budget: int):
    """A row: its name, its bar with the budget's line, its figures, of which the line crosses none."""
    _, normal, small = FONTS
    pen.line((20, y - 6, WIDTH - 20, y - 6), FAINT)
    pen.text((20, y + 4), shorten(stage.name, normal), TEXT, normal)
    node = "" if stage.node is None else f" · node {stage.node}"
    pen.text((20, y + 28), f"{stage.seconds:.1f} s{node}", QUIET, small)
    over = budget and stage.peak > budget
    pen.rectangle((LEFT, y, place(stage.peak), y + BAR), OVER if over else DURING)
    pen.rectangle((LEFT, y, place(min(stage.before, stage.peak)), y + BAR), BEFORE)
    x, peak = place(stage.peak) + 8, size_text(stage.peak, stages)
    if budget:
        line = place(budget)
        pen.line((line, y - 6, line, y + BAR), BUDGET, 2)
        if x - 6 < line < x + normal.getlength(peak) + 6:
            x = line + 8
    pen.text((x, y + 6), peak, BUDGET if over else TEXT, normal)
    moved = [
        f"{word} {size_text(size, stages)}"
        for word, size in (("loaded", stage.loaded), ("freed", stage.freed))
        if size
    ]
    words = " · ".join([*moved, f"{size_text(stage.after, stages)} in use after"])
    pen.text((LEFT, y + BAR + 3), words, QUIET, small)


def held_text(model: Held) -> str:
    size = f"{model.bytes / 1e9:.2f} GB" if model.bytes >= 1e8 else f"{model.bytes / 1e6:.0f} MB"
    return f"{model.model}, {size} on {model.device}"


def size_text(size: int, stages: list[Stage]) -> str:
    if max((max(stage.before, stage.peak, stage.after) for stage in stages), default=0) < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.2f} GB"


def shorten(name: str, font) -> str:
    while len(name) > 4 and font.getlength(name) > LEFT - 40:
        name = name[:-4] + "..."
    return name
