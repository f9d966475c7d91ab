"""The judge of the demo model: right on drawn pictures, and not fooled by wrong ones."""

import ast
import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[3] / "tools" / "demo"
sys.path.insert(0, str(TOOLS))

import drawings  # noqa: E402
import evaluate  # noqa: E402
import judge  # noqa: E402

pytestmark = pytest.mark.slow
COUNT = 300


def drawn(count: int, width: int = 256, height: int = 256):
    rng = random.Random(7)
    scenes = [scene for scene, _ in evaluate.held_out_prompts(count, seed=3)]
    for scene in scenes:
        yield scene, evaluate.as_pixels(drawings.render([scene], width, height, rng))[0]


@pytest.fixture(scope="module")
def pictures():
    return list(drawn(COUNT))


def test_the_judge_is_right_on_drawn_pictures(pictures):
    table = evaluate.tally([evaluate.judge(scene, picture) for scene, picture in pictures])
    assert set(table) == set(evaluate.ROWS)
    for row, figures in table.items():
        assert figures["judged"] > 40, row
        assert figures["share"] >= 0.995, row


@pytest.mark.parametrize("size", [(352, 176), (176, 352), (128, 128)])
def test_the_judge_is_right_at_other_sizes(size):
    table = evaluate.tally([evaluate.judge(*one) for one in drawn(100, *size)])
    assert all(figures["share"] >= 0.98 for figures in table.values()), table


def test_the_judge_survives_soft_noisy_edges(pictures):
    rng = np.random.default_rng(0)
    verdicts = []
    for scene, picture in pictures[:100]:
        soft = picture.astype(np.float32)
        for axis in (0, 1):
            soft = (np.roll(soft, 1, axis) + soft + np.roll(soft, -1, axis)) / 3
        soft = (soft + rng.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)
        verdicts.append(evaluate.judge(scene, soft))
    assert all(figures["share"] >= 0.97 for figures in evaluate.tally(verdicts).values())


def other(value: str, values) -> str:
    return next(candidate for candidate in values if candidate != value)


def test_the_judge_sees_what_is_wrong(pictures):
    for scene, picture in pictures[:150]:
        if len(scene.objects) == 1:
            thing = scene.objects[0]
            changed = dataclasses.replace(
                thing,
                shape=other(thing.shape, drawings.SHAPES),
                color=other(thing.color, drawings.COLORS),
                position=thing.position and other(thing.position, drawings.POSITIONS),
                size=thing.size and other(thing.size, drawings.SIZES),
            )
            background = scene.background and other(scene.background, drawings.COLORS)
            asked = dataclasses.replace(scene, objects=(changed,), background=background)
            verdict = evaluate.judge(asked, picture)
            assert not any(verdict.values()), (scene, verdict)
        else:
            first, second = scene.objects
            changed = dataclasses.replace(second, color=other(second.color, drawings.COLORS))
            asked = dataclasses.replace(scene, objects=(first, changed))
            assert not evaluate.judge(asked, picture)["two objects"]
            if first != second:
                swapped = dataclasses.replace(scene, objects=(second, first))
                assert not evaluate.judge(swapped, picture)["two objects"]
            turned = {"left of": "above", "right of": "above", "above": "left of", "below": "left of"}
            asked = dataclasses.replace(scene, relation=turned[scene.relation])
            assert not evaluate.judge(asked, picture)["relation"]


def test_a_missing_or_an_extra_object_is_wrong(pictures):
    for scene, picture in pictures[:60]:
        empty = np.full_like(picture, picture[0, 0])
        verdict = evaluate.judge(scene, empty)
        assert not any(right for row, right in verdict.items() if row != "background")
    one = next((scene, picture) for scene, picture in pictures if scene.objects[0].size == "small")
    crowded = one[1].copy()
    crowded[4:40, 4:40] = 255 - crowded[0, 0]
    assert not evaluate.judge(one[0], crowded)["shape"]


@pytest.mark.parametrize("kind", ["noise", "blob", "ring", "half circle"])
def test_what_is_no_shape_is_not_recognised(kind):
    y, x = np.mgrid[:256, :256] - 127.5
    if kind == "noise":
        # One connected mess of pixels.
        mask = (np.random.default_rng(0).random((256, 256)) < 0.7) & (np.hypot(x, y) < 80)
    elif kind == "blob":
        angle = np.arctan2(y, x)
        mask = np.hypot(x, y) < 60 * (1 + 0.25 * np.sin(2 * angle) + 0.1 * np.sin(3 * angle))
    elif kind == "ring":
        mask = (np.hypot(x, y) < 70) & (np.hypot(x, y) > 50)
    else:
        mask = (np.hypot(x, y) < 70) & (y > 0)
    picture = np.where(mask[..., None], (220, 40, 40), (245, 245, 245)).astype(np.uint8)
    background, seen = judge.look(picture)
    assert background == "white" and seen and seen[0].shape == "unclear"


def test_regions_are_found_whatever_their_form():
    mask = np.zeros((9, 12), bool)
    mask[1:8, 1] = mask[7, 1:6] = mask[1:8, 5] = True  # a U, whose arms meet in its last row only
    mask[2, 8] = mask[3, 9] = True  # neighbours by a corner only
    regions = judge.connected(mask)
    assert sorted(int(region.sum()) for region in regions) == [1, 1, 17]
    assert np.array_equal(sum(region.astype(int) for region in regions), mask.astype(int))


def test_prompts_are_held_out_and_repeatable():
    prompts = evaluate.held_out_prompts(200)
    assert prompts == evaluate.held_out_prompts(200)
    assert len({scene for scene, _ in prompts}) == 200
    assert all(scene.held_out for scene, _ in prompts)
    assert 60 < sum(len(scene.objects) == 2 for scene, _ in prompts) < 140


def test_the_judge_shares_no_code_with_the_drawing():
    tree = ast.parse((TOOLS / "judge.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names == {"dataclasses", "numpy"}
