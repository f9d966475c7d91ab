"""Says what is in a picture of flat shapes, from its pixels alone.

It shares nothing with the code that draws the training pictures: its colours, its thresholds and its way to
recognise a shape are its own. A shape is recognised by two measures that must agree: how often its outline
swings outwards in one turn (3, 4 or 5 times, or not at all) and how much of its bounding box it fills.
"""

from dataclasses import dataclass

import numpy as np

# What people call by these names, in RGB.
PALETTE = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "cyan": (70, 210, 225),
    "blue": (40, 80, 220),
    "purple": (130, 50, 180),
    "pink": (250, 150, 195),
    "brown": (120, 75, 40),
    "gray": (140, 140, 140),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
# Euclidean RGB distance from the background at which a pixel may belong to an object.
STANDS_OUT = 40.0
# Objects smaller than this share of the canvas, or of the largest object, are specks.
SPECK_OF_CANVAS, SPECK_OF_LARGEST = 0.002, 0.08
# Outward swings of the outline per turn -> shape, and the share of its bounding box that each shape fills.
SWINGS = {3: "triangle", 4: "square", 5: "star"}
FILLS = {"circle": (0.72, 0.85), "square": (0.88, 1.01), "triangle": (0.42, 0.62), "star": (0.28, 0.46)}
# Half of the longer side of the bounding box, in units of the radius that a size word is about.
HALF_SIDE = {"circle": 1.0, "square": 0.86, "triangle": 0.97, "star": 1.03}


@dataclass(frozen=True)
class Seen:
    """One object: `x` and `y` are shares of the canvas, `radius` a share of its shorter side; `box` is its
    (left, top, right, bottom) in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    box: tuple[int, int, int, int]

    @property
    def position(self) -> str:
        """One of nine places, such as "center", "left" or "bottom right"."""
        across = "left" if self.x < 0.42 else "right" if self.x > 0.58 else ""
        down = "top" if self.y < 0.42 else "bottom" if self.y > 0.58 else ""
        return f"{down} {across}".strip() or "center"

    @property
    def size(self) -> str:
        return "small" if self.radius < 0.19 else "medium" if self.radius < 0.29 else "large"


def look(picture: np.ndarray) -> tuple[str, list[Seen]]:
    """Background colour and the objects, largest first, of a picture (H, W, 3) in 0..255."""
    pixels = np.asarray(picture)[..., :3].astype(np.float32)
    ground = background(pixels)
    stands_out = np.linalg.norm(pixels - ground, axis=-1) > STANDS_OUT
    regions = connected(stands_out)
    largest = max((region.sum() for region in regions), default=0)
    least = max(SPECK_OF_CANVAS * stands_out.size, SPECK_OF_LARGEST * largest)
    regions = sorted(
        (region for region in regions if region.sum() >= least), key=lambda region: -region.sum()
    )
    return nearest_color(ground), [describe(pixels, region, ground) for region in regions]


def background(pixels: np.ndarray) -> np.ndarray:
    """The most frequent colour of the border, (3,)."""
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)])
    nearest = _distances(border).argmin(axis=1)
    return np.median(border[nearest == np.bincount(nearest).argmax()], axis=0)


def nearest_color(color: np.ndarray) -> str:
    return list(PALETTE)[_distances(color[None]).argmin()]


def _distances(colors: np.ndarray) -> np.ndarray:
    """Squared RGB distance of colours (N, 3) to each of the palette's, (N, names)."""
    return ((colors[:, None] - np.array(list(PALETTE.values()), np.float32)) ** 2).sum(axis=-1)


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask (H, W), each as a mask: runs of each row are joined downwards."""
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    above: list[int] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        here = []
        for start, stop in edges.reshape(-1, 2).tolist():
            index = len(runs)
            runs.append((y, start, stop))
            parent.append(index)
            for other in above:
                if runs[other][1] < stop and start < runs[other][2]:
                    parent[root(index)] = root(other)
            here.append(index)
        above = here
    regions: dict[int, np.ndarray] = {}
    for index, (y, start, stop) in enumerate(runs):
        region = regions.setdefault(root(index), np.zeros(mask.shape, bool))
        region[y, start:stop] = True
    return list(regions.values())


def describe(pixels: np.ndarray, region: np.ndarray, ground: np.ndarray) -> Seen:
    color = np.median(pixels[region], axis=0)
    # A pixel on the edge belongs to the object when it is more of the object's colour than of the ground's.
    nearer = np.linalg.norm(pixels - color, axis=-1) < np.linalg.norm(pixels - ground, axis=-1)
    region = region & nearer
    ys, xs = np.nonzero(region)
    width, height = xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
    shape = recognise(xs + 0.5, ys + 0.5, len(xs) / (width * height))
    # Between the centre of mass and of the bounding box, as the eye places a triangle or a star.
    x = (xs.mean() + (xs.min() + xs.max()) / 2 + 1) / 2 / region.shape[1]
    y = (ys.mean() + (ys.min() + ys.max()) / 2 + 1) / 2 / region.shape[0]
    radius = max(width, height) / 2 / min(region.shape) / HALF_SIDE.get(shape, 1.0)
    box = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    return Seen(shape, nearest_color(color), float(x), float(y), float(radius), box)


def recognise(xs: np.ndarray, ys: np.ndarray, fill: float, turns: int = 72) -> str:
    """ "circle", "square", "triangle", "star" or "unclear", from the pixels of a region and its box fill."""
    x, y = xs - xs.mean(), ys - ys.mean()
    sector = ((np.arctan2(y, x) / (2 * np.pi) + 1) * turns).astype(int) % turns
    outline = np.zeros(turns)
    np.maximum.at(outline, sector, np.hypot(x, y))
    swing = np.abs(np.fft.rfft(outline / outline.mean()))[1:9] / turns * 2
    if swing.max() < 0.055:
        shape = "circle"
    else:
        shape = SWINGS.get(int(swing.argmax()) + 1, "unclear")
    low, high = FILLS.get(shape, (1.0, 0.0))
    return shape if low <= fill <= high else "unclear"
