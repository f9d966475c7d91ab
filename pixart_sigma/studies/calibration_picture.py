"""A calibration as a picture: all savings, and of KV compression the error of each layer in each part of the
run."""

import math

from PIL import Image, ImageDraw, ImageFont

from ..setting_checks import LAST_TIMESTEP
from ..transformer.calibration import WINDOWS, Calibration
from ..transformer.kv_rules import acting
from .speed_picture import draw_speed

LEFT, TOP, RIGHT = 120, 120, 30
CELL, ROW, GAP = 30, 34, 66
BACKGROUND, TEXT, FAINT, CHOSEN = "#ffffff", "#222222", "#8a8a8a", "#1b7f3b"
LOW, HIGH = (255, 246, 224), (200, 40, 40)


def draw(calibration: Calibration) -> Image.Image:
    """All savings, where they were measured, above KV compression by itself, where it was."""
    pictures = []
    if calibration.points:
        pictures.append(draw_speed(calibration))
    if calibration.errors:
        pictures.append(draw_compression(calibration))
    width = max(picture.width for picture in pictures)
    whole = Image.new("RGB", (width, sum(picture.height for picture in pictures)), BACKGROUND)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def draw_compression(calibration: Calibration) -> Image.Image:
    """One grid per ratio: a column is a layer, a row a part of the run; the frames are the choice."""
    layers = len(next(iter(calibration.errors.values())))
    width = max(760, LEFT + layers * CELL + RIGHT)
    grid = WINDOWS * ROW + GAP
    picture = Image.new("RGB", (width, TOP + len(calibration.errors) * grid), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    large, normal, small = (ImageFont.load_default(size) for size in (22, 15, 11))
    pen.text((20, 14), "KV compression: error of each layer by itself, in what a step predicts", TEXT, large)
    pen.text(
        (20, 48),
        f"Chosen: finished latents {calibration.error:.1%} off, of {calibration.budget:.1%} allowed; saves "
        f"{calibration.saved:.1%} of the multiply-adds at {calibration.width}x{calibration.height}.",
        TEXT,
        normal,
    )
    _draw_scale(pen, calibration, normal)

    most = _largest(calibration)
    for index, (ratio, errors) in enumerate(calibration.errors.items()):
        top = TOP + index * grid
        pen.text((20, top), f"ratio {ratio}", TEXT, normal)
        top += 22
        for window in range(WINDOWS):
            y = top + window * ROW
            share = f"{100 * window // WINDOWS}-{100 * (window + 1) // WINDOWS}%"
            pen.text((20, y + 8), share, FAINT, normal)
            timestep = LAST_TIMESTEP * (1 - (window + 0.5) / WINDOWS)
            for layer in range(layers):
                x = LEFT + layer * CELL
                error = errors[layer][window]
                box = (x + 1, y + 1, x + CELL - 2, y + ROW - 2)
                if error == math.inf:
                    pen.rectangle(box, outline=FAINT)
                    continue
                pen.rectangle(box, _shade(error / most))
                pen.text((x + CELL / 2, y + ROW / 2), _percent(error), TEXT, small, anchor="mm")
                rule = acting(calibration.rules, layer, timestep)
                if rule is not None and rule.ratio == ratio:
                    pen.rectangle(box, outline=CHOSEN, width=3)
        for layer in range(layers):
            pen.text((LEFT + (layer + 0.5) * CELL, top + WINDOWS * ROW + 2), str(layer), FAINT, small, "ma")
    return picture


def _draw_scale(pen, calibration, font):
    pen.rectangle((20, 82, 35, 97), _shade(0))
    pen.text((42, 80), "no error", TEXT, font)
    pen.rectangle((140, 82, 155, 97), _shade(1))
    pen.text((162, 80), f"{_largest(calibration):.1%}", TEXT, font)
    pen.rectangle((240, 82, 255, 97), outline=CHOSEN, width=3)
    pen.text((262, 80), "chosen; columns are layers, rows parts of the run from noise to picture", TEXT, font)


def _largest(calibration) -> float:
    seen = [error for layers in calibration.errors.values() for windows in layers for error in windows]
    return max((error for error in seen if error < math.inf), default=0.0) or 1.0


def _shade(share: float) -> tuple[int, ...]:
    """From pale to red, by the root, so that small errors can be told apart."""
    return tuple(round(low + (high - low) * math.sqrt(share)) for low, high in zip(LOW, HIGH, strict=True))


def _percent(error: float) -> str:
    return f"{100 * error:.1f}" if error < 0.0995 else f"{100 * error:.0f}"
