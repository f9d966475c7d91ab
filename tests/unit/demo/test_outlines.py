"""The demo's ControlNet: outlines are of their pictures, its training runs, and who follows one is known."""

import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

if not hasattr(torch.optim, "Muon"):
    pytest.skip("the demo is trained with Muon, which torch has from 2.9 on", allow_module_level=True)

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools" / "demo"))

import drawings  # noqa: E402
import evaluate_control  # noqa: E402
import fine_tune  # noqa: E402
import judge  # noqa: E402
import outlines  # noqa: E402
from evaluate import as_pixels  # noqa: E402

from pixart_sigma.transformer.controlnet import Control, ControlHooks  # noqa: E402
from pixart_sigma.transformer.controlnet_file import load_controlnet  # noqa: E402

DEMO = ROOT / "pixart_sigma" / "demo"


@pytest.mark.parametrize("shape", drawings.SHAPES)
def test_an_outline_is_where_the_shape_ends(shape):
    scene, placed = drawings.Scene((drawings.Object(shape, "red"),), "white"), [(60.3, 70.8, 31.0)]
    inside = drawings.coverage([shape], torch.tensor(placed), 128, 128)[0, 0]
    line = drawings.trace(scene, placed, 128, 128, 1.5)
    assert line.shape == (3, 128, 128) and line.min() == -1 and line.max() == 1
    edge = (inside > 0) & (inside < 1)
    assert (line[0][edge] > -1).all()
    assert (line > -1).float().mean() < 0.1


def test_scenes_say_no_place_and_fit():
    rng = random.Random(0)
    for held_out in (True, False):
        for _ in range(50):
            scene = outlines.scene_without_places(rng, held_out)
            assert scene.held_out == held_out
            assert not any(thing.position or thing.size for thing in scene.objects)
            placed = outlines.place(scene, 160, 112, rng)
            shapes = [thing.shape for thing in scene.objects]
            drawn = drawings.coverage(shapes, torch.tensor(placed), 160, 112)[:, 0]
            assert max(drawn[:, [0, -1]].max(), drawn[..., [0, -1]].max()) < 0.5, scene
            assert drawn.sum(0).max() <= 1  # apart
    sides = [outlines.place(scene, 96, 96, rng)[0][0] for _ in range(20)]
    assert max(sides) - min(sides) > 5


def test_a_new_controlnet_adds_nothing_and_can_learn():
    transformer = fine_tune.load_network(DEMO / "transformer")
    controlnet = outlines.new_controlnet(transformer)
    latents, embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 128)
    hooks = ControlHooks((Control(controlnet, torch.randn(1, 4, 8, 8)),))
    made = transformer(latents, 500, embeds, hooks=hooks)
    assert torch.equal(made, transformer(latents, 500, embeds))
    made.square().mean().backward()
    assert controlnet.controlnet_blocks[0].after_proj.weight.grad.abs().max() > 0
    size = sum(weight.numel() for weight in controlnet.parameters()) * 2
    assert size < 6e6  # in half precision


@pytest.mark.slow
def test_the_training_resumes_and_leaves_the_demo_as_it_is(tmp_path, monkeypatch):
    for name, value in {"SMALL_OUTLINES": ((64, 64),), "LARGE_OUTLINES": ((80, 48),), "FIRST": 2}.items():
        monkeypatch.setattr(outlines, name, value)
    monkeypatch.setattr(outlines, "PATCHES", 32)
    demo = tmp_path / "demo"
    shutil.copytree(DEMO, demo)
    file = demo / "transformer" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    for steps in (2, 3):
        command = ["fine_tune.py", "control", "--out", str(demo), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", [*command, "--steps", str(steps), "--rate", "1e-2"])
        fine_tune.main()
        assert torch.load(tmp_path / "work" / "control.pt", weights_only=True)["step"] == steps
    controlnet = load_controlnet(tmp_path / "work" / "control")
    assert controlnet.sigma_config.num_layers == outlines.LAYERS
    added = controlnet.controlnet_blocks[0].after_proj.weight
    assert added.isfinite().all() and added.abs().max() > 0
    assert file.read_bytes() == before


def test_cases_are_held_out_with_their_boxes():
    for scene, prompt, outline, boxes in evaluate_control.held_out_cases(12, 96):
        assert scene.held_out and len(boxes) == len(scene.objects)
        assert all(thing.color in prompt or thing.color == "gray" for thing in scene.objects)
        ys, xs = outline[..., 0].nonzero()
        around = min(xs), min(ys), max(xs) + 1, max(ys) + 1
        left, top, right, bottom = zip(*boxes, strict=True)
        covered = min(left), min(top), max(right), max(bottom)
        assert max(abs(one - other) for one, other in zip(around, covered, strict=True)) <= 4  # at tips


def test_who_follows_an_outline_is_known():
    def scene(*names):
        return drawings.Scene(tuple(drawings.Object(*name.split()[::-1]) for name in names), "white")

    asked, where = scene("red circle"), (40.0, 50.0, 24.0)
    box = evaluate_control.box_of("circle", where, 128)
    assert box == (16, 26, 64, 74)

    def judged(found, *placed):
        picture = as_pixels(drawings.paint([found], [list(placed)], 128, 128))[0]
        return list(evaluate_control.judge(asked, [box], judge.look(picture)[1]).values())

    assert judged(asked, where) == [True, True, True]
    assert judged(asked, (46.0, 50.0, 20.0)) == [True, True, True]
    assert judged(scene("blue circle"), where) == [True, True, False]
    assert judged(scene("red square"), where) == [True, False, False]
    assert judged(asked, (80.0, 80.0, 24.0)) == [False, False, False]
    assert judged(asked, (40.0, 50.0, 14.0)) == [False, False, False]
    assert judged(scene("red circle", "red circle"), where, (100.0, 100.0, 20.0)) == [False, False, False]
    assert not any(evaluate_control.judge(asked, [box], []).values())
    assert evaluate_control.overlap((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(8 / 24)
