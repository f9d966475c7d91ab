"""What was measured of all savings, as a picture: the error over what a run costs, and what was chosen."""

import math

from PIL import Image, ImageDraw, ImageFont

from ..transformer.calibration import Calibration, Point

WIDTH, HEIGHT = 860, 470
LEFT, TOP, RIGHT, BOTTOM = 70, 84, 250, 54
BACKGROUND, TEXT, FAINT, CHOSEN = "#ffffff", "#222222", "#b0b0b0", "#1b7f3b"
# What was looked for, in words, its colour, and whether it is a line: the best of each cost.
KINDS = {
    "steps": ("fewer steps: the line to beat", "#555555", True),
    "spacing": ("other spacings of the steps", "#b06fc4", False),
    "kv": ("KV compression alone", "#d98a00", True),
    "guidance": ("guidance forecast", "#c0392b", True),
    "forecast": ("steps forecast", "#2471a3", True),
    "together": ("all together", CHOSEN, True),
}
DOT = 4


def draw_speed(calibration: Calibration) -> Image.Image:
    """A dot for each way that whole runs were made; left is cheaper, down is nearer to the reference."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    large, normal, small = (ImageFont.load_default(size) for size in (22, 15, 12))
    pen.text((20, 12), "Speed: error of the finished latents over multiply-adds", TEXT, large)
    pen.text((20, 44), _summary(calibration), TEXT, normal)
    chart = _Chart(pen, _most_error(calibration), small)
    chart.axes(calibration.budget)
    for row, (kind, (words, colour, is_line)) in enumerate(KINDS.items()):
        points = [point for point in calibration.points if point.kind == kind]
        if is_line:
            chart.line(frontier(points), colour)
        for point in points:
            chart.dot(point, colour)
        y = TOP + 24 * row
        pen.ellipse((WIDTH - RIGHT + 20, y, WIDTH - RIGHT + 20 + 2 * DOT, y + 2 * DOT), colour)
        pen.text((WIDTH - RIGHT + 38, y - 4), words, TEXT, small)
    if calibration.speed:
        chart.ring(calibration.speed)
        y = TOP + 24 * len(KINDS)
        pen.ellipse((WIDTH - RIGHT + 15, y - 5, WIDTH - RIGHT + 33, y + 13), outline=CHOSEN, width=3)
        pen.text((WIDTH - RIGHT + 40, y - 4), "chosen", TEXT, small)
    return picture


def frontier(points: list[Point]) -> list[Point]:
    """The points that no other one beats in both error and cost, the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.multiply_adds, point.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


class _Chart:
    def __init__(self, pen: ImageDraw.ImageDraw, most: float, font):
        self.pen, self.most, self.font = pen, most, font

    def place(self, multiply_adds: float, error: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * min(multiply_adds, 1.0)
        height = HEIGHT - TOP - BOTTOM
        return x, TOP + height * (1 - min(error / self.most, 1.0))

    def axes(self, budget: float) -> None:
        corner = self.place(0, 0)
        for tenth in range(0, 11, 2):
            x, y = self.place(tenth / 10, 0)
            self.pen.line((x, TOP, x, y), "#eeeeee")
            self.pen.text((x, y + 6), f"{tenth / 10:g}", FAINT, self.font, anchor="ma")
        self.pen.text(
            (corner[0], corner[1] + 26), "multiply-adds, of the run without savings", TEXT, self.font
        )
        for quarter in range(5):
            error = self.most * quarter / 4
            x, y = self.place(0, error)
            self.pen.line((x, y, self.place(1, 0)[0], y), "#eeeeee")
            self.pen.text((x - 6, y), f"{error:.1%}", FAINT, self.font, anchor="rm")
        x, y = self.place(0, budget)
        self.pen.line((x, y, self.place(1, 0)[0], y), CHOSEN)
        self.pen.text((self.place(1, 0)[0], y - 4), f"allowed: {budget:.1%}", CHOSEN, self.font, anchor="rs")

    def line(self, points: list[Point], colour: str) -> None:
        places = [self.place(point.multiply_adds, point.error) for point in points]
        if len(places) > 1:
            self.pen.line(places, colour, 2)

    def dot(self, point: Point, colour: str) -> None:
        x, y = self.place(point.multiply_adds, point.error)
        self.pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), colour)

    def ring(self, point: Point) -> None:
        x, y = self.place(point.multiply_adds, point.error)
        self.pen.ellipse((x - 9, y - 9, x + 9, y + 9), outline=CHOSEN, width=3)


def _most_error(calibration: Calibration) -> float:
    """Up to where errors are drawn: what is far beyond the budget would press all else together."""
    largest = max((point.error for point in calibration.points), default=0.0)
    return max(min(largest, 4 * calibration.budget), 1.2 * calibration.budget, 1e-6)


def _summary(calibration: Calibration) -> str:
    reference = "the run without savings" if calibration.reference == "own" else "a run of many steps"
    point = calibration.speed
    if point is None or not math.isfinite(point.error):
        return f"Nothing saves anything within {calibration.budget:.1%} of {reference}."
    return (
        f"Chosen: {point.multiply_adds:.2f} of the multiply-adds, {point.error:.1%} from {reference}, at "
        f"{calibration.width}x{calibration.height}, {calibration.steps} steps."
    )
