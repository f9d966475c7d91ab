"""The pictures the demo model learns from: drawn here, captioned here, nothing downloaded.

A scene is one or two flat shapes on a flat background. `random_scene` draws one by chance,
`caption` says it in words, `render` paints it with anti-aliased edges at any size, and `measure` finds
where a picture has its objects.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

COLORS = {
    "red": (220, 40, 45),
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
SHAPES = ("circle", "square", "triangle", "star")
# Radius as a share of the shorter side.
SIZES = {"small": (0.13, 0.16), "medium": (0.22, 0.26), "large": (0.32, 0.36)}
# Centre as (x, y) shares of the canvas.
POSITIONS = {
    "center": (0.5, 0.5),
    "left": (0.24, 0.5),
    "right": (0.76, 0.5),
    "top": (0.5, 0.24),
    "bottom": (0.5, 0.76),
    "top left": (0.24, 0.24),
    "top right": (0.76, 0.24),
    "bottom left": (0.24, 0.76),
    "bottom right": (0.76, 0.76),
}
# Relation of the first object to the second, with their centres.
RELATIONS = {
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}
PAIR_RADIUS = (0.17, 0.2)
# From an object to the canvas' edge, at least, as a share of the shorter side.
MARGIN = 0.015


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str | None
    relation: str | None = None

    @property
    def held_out(self) -> bool:
        """One scene in twelve is never trained on, chosen by a hash so that every run agrees."""
        first = hashlib.sha256(repr(self).encode()).digest()[0]
        return first % 12 == 0


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A scene from the training set, or from the held-out set."""
    while True:
        scene = _any_scene(rng)
        if scene.held_out == held_out:
            return scene


def _any_scene(rng: random.Random) -> Scene:
    colors = list(COLORS)
    background = rng.choice(colors)
    foreground = [color for color in colors if color != background]
    said = background if rng.random() < 0.85 else None
    if said is None:
        foreground = [color for color in colors if color != "white"]
    if rng.random() < 0.45:
        first, second = (Object(rng.choice(SHAPES), rng.choice(foreground)) for _ in range(2))
        return Scene((first, second), said, rng.choice(list(RELATIONS)))
    size = rng.choice(list(SIZES)) if rng.random() < 0.5 else None
    position = rng.choice(list(POSITIONS)) if rng.random() < 0.6 else None
    return Scene((Object(rng.choice(SHAPES), rng.choice(foreground), size, position),), said)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say the scene, in lower case."""
    if len(scene.objects) == 1:
        thing = scene.objects[0]
        text = _name(thing, rng)
        if thing.position:
            text += " " + _place(thing.position, rng)
    else:
        first, second = (_name(thing, rng) for thing in scene.objects)
        if scene.relation == "left of" and rng.random() < 0.35:
            text = f"{first} and {second}"
        else:
            to_the = rng.choice(("to the ", "to the ", ""))
            relation = f"{to_the}{scene.relation}" if scene.relation.endswith("of") else scene.relation
            text = f"{first} {relation} {second}"
    if scene.background:
        comma = rng.choice(("", "", ","))
        a = "an" if scene.background[0] in "aeiou" else "a"
        text += comma + rng.choice(
            (f" on {a} {{}} background", f" on {a} {{}} background", " on {}", f" with {a} {{}} background")
        ).format(scene.background)
    opening = rng.random()
    if opening < 0.08:
        text = rng.choice(("a picture of ", "a drawing of ", "a photo of ", "an image of ")) + text
    elif opening < 0.16:
        text = text.removeprefix("a ").removeprefix("an ")
    return text


def _name(thing: Object, rng: random.Random) -> str:
    size = {
        None: "",
        "small": rng.choice(("small ", "small ", "little ", "tiny ")),
        "medium": rng.choice(("medium ", "medium-sized ")),
        "large": rng.choice(("large ", "large ", "big ", "huge ")),
    }[thing.size]
    color = "grey" if thing.color == "gray" and rng.random() < 0.4 else thing.color
    words = f"{size}{color} {thing.shape}"
    return ("an " if words[0] in "aeiou" else "a ") + words


def _place(position: str, rng: random.Random) -> str:
    if position == "center":
        return rng.choice(("in the center", "in the middle", "at the center", "in the centre"))
    if " " in position:
        return rng.choice(("in the {} corner", "in the {}", "at the {}")).format(position)
    return rng.choice(("on the {}", "at the {}", "on the {} side")).format(position)


def layout(scene: Scene, width: int, height: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre x, centre y and radius of each object in pixels; what was not said is left to chance."""
    short = min(width, height)
    placed = []
    for _, (x, y), radii in expected(scene):
        radius = rng.uniform(*radii)
        x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
        margin = (radius + MARGIN) * short
        x = min(max(x * width, margin), width - margin)
        y = min(max(y * height, margin), height - margin)
        placed.append((x, y, radius * short))
    return placed


def render(scenes: list[Scene], width: int, height: int, rng: random.Random) -> torch.Tensor:
    """Pictures (B, 3, height, width) in [-1, 1]."""
    return paint(scenes, [layout(scene, width, height, rng) for scene in scenes], width, height)


def measure(scene: Scene, picture: torch.Tensor) -> list[tuple[float, float, float]]:
    """Centre x, centre y and radius of each object in a picture (3, height, width), as `layout` gives them.

    Those whose outline agrees best with what has the object's colour, of all that `layout` draws.
    """
    height, width = picture.shape[-2:]
    short, sides = min(width, height), torch.tensor([width, height])
    ground = _color([scene.background or "white"])[0]
    # The first one stays where it is, so that of equals it is chosen.
    moves = torch.cartesian_prod(*[torch.tensor([0.0, -1.0, 1.0])] * 3)
    placed = []
    for thing, center, radii in expected(scene):
        color = _color([thing.color])[0] - ground
        share = ((picture - ground[:, None, None]) * color[:, None, None]).sum(0) / color.square().sum()
        # Half-way values are edges; what is nearly the background is the VAE's noise.
        seen = (1.5 * share - 0.25).clamp(0, 1)
        center = torch.tensor(center) * sides
        # Beyond the middle is the other object.
        reach = ((center - sides / 2).abs() if scene.relation else center).clone()
        reach[reach == 0] = short / 2
        reach = reach.clamp(max=(radii[1] + 0.1) * short)
        left, top = (center - reach).clamp(min=0).int().tolist()
        right, bottom = (center + reach).minimum(sides).int().tolist()
        seen = seen[top:bottom, left:right]
        low = torch.cat([center - 0.025 * sides, torch.tensor([radii[0] * short])])
        high = torch.cat([center + 0.025 * sides, torch.tensor([radii[1] * short])])
        best = (low + high) / 2
        for step in (4.0, 1.0, 0.25):
            for _ in range(5):
                around = (best + step * moves).clamp(low, high)
                margin = around[:, 2:] + MARGIN * short
                around[:, :2] = around[:, :2].maximum(margin).minimum(sides - margin)
                inside = around - torch.tensor([left, top, 0])
                outlines = coverage([thing.shape] * len(around), inside, right - left, bottom - top)
                chosen = around[(outlines[:, 0] - seen).abs().sum((1, 2)).argmin()]
                if torch.equal(chosen, best):
                    break
                best = chosen
        placed.append(tuple(best.tolist()))
    return placed


def expected(scene: Scene) -> Iterator[tuple[Object, tuple[float, float], tuple[float, float]]]:
    """Of each object: itself, its centre as shares of the canvas, and the bounds of its radius."""
    for index, thing in enumerate(scene.objects):
        if scene.relation:
            yield thing, RELATIONS[scene.relation][index], PAIR_RADIUS
        else:
            yield thing, POSITIONS[thing.position or "center"], SIZES[thing.size or "medium"]


def paint(
    scenes: list[Scene], placed: list[list[tuple[float, float, float]]], width: int, height: int
) -> torch.Tensor:
    """Pictures (B, 3, height, width) in [-1, 1] of scenes whose objects are placed as `layout` gives it."""
    count = len(scenes)
    pictures = _color([scene.background or "white" for scene in scenes])[:, :, None, None]
    pictures = pictures.expand(count, 3, height, width)
    for index in range(2):
        shown = [position for position in range(count) if len(scenes[position].objects) > index]
        if not shown:
            continue
        geometry = torch.tensor([placed[position][index] for position in shown])
        things = [scenes[position].objects[index] for position in shown]
        mask = coverage([thing.shape for thing in things], geometry, width, height)
        color = _color([thing.color for thing in things])[:, :, None, None]
        pictures = pictures.clone()
        pictures[shown] = torch.lerp(pictures[shown], color.expand(-1, 3, height, width), mask)
    return pictures


def coverage(shapes: list[str], geometry: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Share of each pixel inside the shape, (B, 1, height, width); geometry is (x, y, radius)."""
    return (0.5 - _distances(shapes, geometry, width, height)).clamp(0, 1)


def trace(
    scene: Scene, placed: list[tuple[float, float, float]], width: int, height: int, line: float
) -> torch.Tensor:
    """The objects' outlines, white on black, `line` pixels wide: (3, height, width) in [-1, 1]."""
    shapes = [thing.shape for thing in scene.objects]
    distances = _distances(shapes, torch.tensor(placed), width, height)
    drawn = (0.5 + line / 2 - distances.abs()).clamp(0, 1).amax(0)
    return drawn.expand(3, height, width) * 2 - 1


def _distances(shapes: list[str], geometry: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Signed distance in pixels from each shape's outline, negative inside, (B, 1, height, width)."""
    x = torch.arange(width)[None, None, :] + 0.5 - geometry[:, 0, None, None]
    y = torch.arange(height)[None, :, None] + 0.5 - geometry[:, 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    distances = torch.empty(len(shapes), height, width)
    for shape in set(shapes):
        rows = [row for row, name in enumerate(shapes) if name == shape]
        radius = geometry[rows, 2, None, None]
        distances[rows] = _polygon_distance(shape, x[rows], y[rows], radius)
    return distances[:, None]


def _polygon_distance(shape, x, y, radius):
    """Signed distance in pixels from the outline, negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        half = 0.86 * radius
        return torch.maximum(x.abs(), y.abs()) - half
    if shape == "triangle":
        y = y - 0.2 * radius
        inner = 0.56 * radius
        slope = (x.abs() * math.cos(math.pi / 6) - y * 0.5) - inner
        return torch.maximum(slope, y - inner)
    # A five-pointed star: fold the plane to one half point, then measure to its edge. It is the regular one,
    # whose edges go on straight across the notches: the VAE blunts the tips of a thicker one too much.
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    length = torch.hypot(x, y)
    fx, fy = length * torch.sin(folded), length * torch.cos(folded)
    outer = 1.08 * radius
    inner = outer * math.sin(math.pi / 10) / math.cos(math.pi / 5)
    notch_x, notch_y = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
    edge_x, edge_y = notch_x, notch_y - outer
    return ((fy - outer) * edge_x - fx * edge_y) / torch.hypot(edge_x, edge_y)


def _color(names: list[str]) -> torch.Tensor:
    return torch.tensor([COLORS[name] for name in names]) / 127.5 - 1.0
