"""A comparison of two precisions as a picture: both pictures of each prompt, and their difference."""

import math
import textwrap

from PIL import Image, ImageChops, ImageDraw, ImageFont

from .precision_figures import PrecisionComparison, PromptComparison, decibels

AMPLIFIED = 10  # differences are small; fixed, so that two comparisons can be compared
FADED = 0.05  # the distance of a cosine from 1 at which a word is in full colour
SMALLEST, LARGEST = 256, 512  # of a picture's longer side, in pixels
MARGIN, GAP, TOP, LINE = 20, 12, 126, 20
MOST_LINES = 4  # of a prompt's words
BACKGROUND, TEXT, FAINT = "#ffffff", "#222222", "#6f6f6f"
EQUAL, FAR = (255, 255, 255), (235, 90, 70)


def draw(comparison: PrecisionComparison) -> Image.Image:
    """A row per prompt: the reference, the other one, their amplified difference, the words, the figures."""
    pairs = [tuple(_fit(picture) for picture in pair) for pair in comparison.pictures]
    cell = max((picture.width for pair in pairs for picture in pair), default=SMALLEST)
    width = 2 * MARGIN + 3 * cell + 2 * GAP
    normal, bold = ImageFont.load_default(15), ImageFont.load_default(22)
    texts = [_lay_out(prompt, width - 2 * MARGIN, normal) for prompt in comparison.prompts]
    heights = [pair[0].height + GAP for pair in pairs] or [0] * len(texts)
    rows = [height + LINE * (len(lines) + 1) + 2 * GAP for height, lines in zip(heights, texts, strict=True)]
    intro = textwrap.wrap(comparison.summary(), width=(width - 2 * MARGIN) // 8)
    top = TOP + LINE * (len(intro) - 1)

    picture = Image.new("RGB", (width, top + sum(rows)), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    reference, other = comparison.precisions
    pen.text((MARGIN, 14), f"T5 in {other}, compared with {reference}", TEXT, bold)
    for index, line in enumerate(intro):
        pen.text((MARGIN, 46 + LINE * index), line, TEXT, normal)
    _draw_scale(pen, top - 54, normal)
    names = (reference, other, f"difference x {AMPLIFIED}") if pairs else ()
    for column, name in enumerate(names):
        pen.text((MARGIN + column * (cell + GAP), top - 26), name, TEXT, normal)

    y = top
    for index, prompt in enumerate(comparison.prompts):
        if pairs:
            first, second = pairs[index]
            difference = _fit(amplified_difference(*comparison.pictures[index]))
            for column, part in enumerate((first, second, difference)):
                picture.paste(part, (MARGIN + column * (cell + GAP), y))
        _draw_words(pen, y + heights[index], texts[index], normal)
        word, least = prompt.least
        figures = f'cosine {prompt.cosine:.5f}, least {least:.5f} at "{word}"   SNR {decibels(prompt.snr)}'
        if prompt.psnr is not None:
            figures += f"   pictures: PSNR {decibels(prompt.psnr)}"
        pen.text((MARGIN, y + heights[index] + LINE * len(texts[index])), figures, FAINT, normal)
        y += rows[index]
    return picture


def amplified_difference(reference: Image.Image, other: Image.Image) -> Image.Image:
    """The absolute difference of two RGB pictures of one size, AMPLIFIED times and cut off at white."""
    return ImageChops.difference(reference, other).point(lambda value: min(255, AMPLIFIED * value))


def _fit(picture: Image.Image) -> Image.Image:
    """The picture at a size between SMALLEST and LARGEST."""
    longer = max(picture.size)
    scale = min(max(longer, SMALLEST), LARGEST) / longer
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BOX)


def _lay_out(prompt: PromptComparison, width: int, font) -> list[list[tuple[float, str, float]]]:
    """Lines of (x, word, cosine); of a long prompt the first ones."""
    lines: list[list[tuple[float, str, float]]] = [[]]
    x = 0.0
    for word, cosine in prompt.words():
        length = font.getlength(word) + 8
        if x + length > width and lines[-1]:
            if len(lines) == MOST_LINES:
                lines[-1][-1] = (lines[-1][-1][0], "...", 1.0)
                break
            lines.append([])
            x = 0.0
        lines[-1].append((x, word, cosine))
        x += length
    return lines


def _draw_words(pen, y: int, lines: list[list[tuple[float, str, float]]], font):
    for number, line in enumerate(lines):
        for x, word, cosine in line:
            left, top = MARGIN + x, y + LINE * number
            pen.rectangle((left, top, left + font.getlength(word) + 5, top + LINE - 2), _shade(cosine))
            pen.text((left + 3, top), word, TEXT, font)


def _draw_scale(pen, y: int, font):
    pen.text((MARGIN, y), "cosine of a word: 1", TEXT, font)
    x = MARGIN + font.getlength("cosine of a word: 1") + 10
    for index in range(24):
        box = (x + 5 * index, y + 1, x + 5 * index + 4, y + 16)
        pen.rectangle(box, _shade(1 - FADED * index / 23))
    pen.text((x + 130, y), f"{1 - FADED:.2f} or less", TEXT, font)


def _shade(cosine: float) -> tuple[int, ...]:
    """From white to red, by the root, so that small distances can be told apart."""
    share = math.sqrt(min(max(1 - cosine, 0.0), FADED) / FADED)
    return tuple(round(near + (far - near) * share) for near, far in zip(EQUAL, FAR, strict=True))
