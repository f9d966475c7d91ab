"""How often the demo follows an outline by its ControlNet: held-out prompts that do not say where.

    python tools/demo/evaluate_control.py demo_training/control --count 100

The prompt says shapes and colours, the outline where they are and how large. A picture follows it if it has
as many objects as the outline, each of the outline's shape, and each lies where the outline is: the boxes
around both share at least half of what they cover together.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from drawings import Scene, caption, coverage, trace
from judge import Seen, look
from outlines import place, scene_without_places
from PIL import Image

# Of two boxes: the area of both over that of either.
LEAST_OVERLAP = 0.5
LINE = 1.5  # pixels

Box = tuple[int, int, int, int]


def held_out_cases(
    count: int, side: int, seed: int = 0
) -> Iterator[tuple[Scene, str, np.ndarray, list[Box]]]:
    """Scenes that training never sees, with a prompt, the outline (side, side, 3) and its objects' boxes."""
    rng = random.Random(seed)
    for _ in range(count):
        scene = scene_without_places(rng, held_out=True)
        placed = place(scene, side, side, rng)
        outline = ((trace(scene, placed, side, side, LINE) + 1) * 127.5).round().byte()
        boxes = [box_of(thing.shape, where, side) for thing, where in zip(scene.objects, placed, strict=True)]
        yield scene, caption(scene, rng), outline.permute(1, 2, 0).numpy(), boxes


def box_of(shape: str, placed: tuple[float, float, float], side: int) -> Box:
    """What a shape takes up of a square."""
    ys, xs = np.nonzero((coverage([shape], torch.tensor([placed]), side, side) > 0.5)[0, 0].numpy())
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def overlap(one: Box, other: Box) -> float:
    """The area of both boxes over that of either."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both
    return both / either


def judge(scene: Scene, boxes: list[Box], seen: list[Seen]) -> dict[str, bool]:
    """What is right in a picture: the place of every object, place and shape, and both with the colour."""
    where = len(seen) == len(boxes)
    pairs = []
    for thing, box in zip(scene.objects, boxes, strict=True):
        nearest = max(seen, key=lambda one: overlap(one.box, box), default=None)
        where = where and overlap(nearest.box, box) >= LEAST_OVERLAP
        pairs.append((thing, nearest))
    follows = where and all(thing.shape == found.shape for thing, found in pairs)
    colored = follows and all(thing.color == found.color for thing, found in pairs)
    return {"place": where, "follows": follows, "colour too": colored}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("control", type=Path, help="the ControlNet's folder")
    parser.add_argument("--model", default="demo", help="a pipeline folder (default: the demo model)")
    parser.add_argument("--count", type=int, default=100, help="how many cases (default: 100)")
    parser.add_argument("--side", type=int, default=256, help="pixels (default: 256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strength", type=float, default=1.0, help="0 is without the ControlNet")
    parser.add_argument("--seed", type=int, default=0, help="which cases")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures, each beside its outline")
    asked = parser.parse_args()

    from pixart_sigma import ControlPicture, Settings, SigmaPipeline, Ways

    pipeline = SigmaPipeline.from_path(asked.model, Ways(release="keep"))
    if asked.pictures:
        asked.pictures.mkdir(parents=True, exist_ok=True)
    verdicts = {1: [], 2: []}
    for number, case in enumerate(held_out_cases(asked.count, asked.side, asked.seed)):
        scene, prompt, outline, boxes = case
        settings = Settings(prompt, width=asked.side, height=asked.side, steps=asked.steps, seed=number)
        control = ControlPicture(asked.control, Image.fromarray(outline), asked.strength)
        made = np.asarray(pipeline.generate(settings, controls=[control]).images[0])
        verdict = judge(scene, boxes, look(made)[1])
        verdicts[len(boxes)].append(verdict)
        wrong = [row for row, right in verdict.items() if not right]
        print(f"{number:4}  {prompt}" + (f"  WRONG: {', '.join(wrong)}" if wrong else ""), file=sys.stderr)
        if asked.pictures:
            Image.fromarray(np.concatenate([outline, made], 1)).save(asked.pictures / f"{number:04}.png")
    print("| objects | pictures | in their places | and of the outline's shape | and in their colours |")
    print("|---|---|---|---|---|")
    for name, rows in (("one", verdicts[1]), ("two", verdicts[2]), ("all", verdicts[1] + verdicts[2])):
        if rows:
            shares = (sum(row[key] for row in rows) / len(rows) for key in rows[0])
            print(f"| {name} | {len(rows)} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
