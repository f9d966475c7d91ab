"""The tools that train the demo: every fine-tuning stage runs, and redrawn pictures are what was asked."""

import math
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file

if not hasattr(torch.optim, "Muon"):
    pytest.skip("the demo is trained with Muon, which torch has from 2.9 on", allow_module_level=True)

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools" / "demo"))

import batches  # noqa: E402
import checkpoints  # noqa: E402
import drawings  # noqa: E402
import evaluate  # noqa: E402
import fine_tune  # noqa: E402
import losses  # noqa: E402
import networks  # noqa: E402
import own_pictures  # noqa: E402
import phases  # noqa: E402

from pixart_sigma.transformer.checkpoint import inspect  # noqa: E402

pytestmark = pytest.mark.slow

SIZES = [(256, 256), (336, 192), (192, 336)]


@pytest.mark.parametrize("size", SIZES)
def test_what_was_drawn_is_measured(size):
    rng = random.Random(3)
    scenes = [drawings.random_scene(rng) for _ in range(20)]
    placed = [drawings.layout(scene, *size, rng) for scene in scenes]
    pictures = drawings.paint(scenes, placed, *size)
    pictures = pictures + 0.03 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    for scene, drawn, picture in zip(scenes, placed, pictures, strict=True):
        for expected, measured in zip(drawn, drawings.measure(scene, picture), strict=True):
            assert measured == pytest.approx(expected, abs=0.5), scene


def new_runs():
    return own_pictures.Runs(None, None, None, random.Random(0), None)


@pytest.mark.parametrize("size", SIZES)
def test_a_wrong_picture_is_redrawn_as_it_was_asked(size):
    rng = random.Random(5)
    scenes = [drawings.random_scene(rng) for _ in range(20)]
    width, height = size
    # Nothing of it is right: other shapes, elsewhere, in other colours.
    pictures = drawings.render([drawings.random_scene(rng) for _ in scenes], *size, rng)
    pixels = evaluate.as_pixels(new_runs().redraw(scenes, pictures))
    assert pixels.shape == (len(scenes), height, width, 3)
    for scene, picture in zip(scenes, pixels, strict=True):
        assert all(evaluate.judge(scene, picture).values()), scene


def test_a_redrawn_circle_has_no_tail_and_stays_in_its_place():
    circle = drawings.Scene((drawings.Object("circle", "red", "small", "left"),), "blue")
    clean = drawings.paint([circle], [[(65.0, 126.0, 36.0)]], 256, 256)
    tail = clean.clone()
    tail[:, :, 160:178, 56:74] = clean[:, :, 126:127, 65:66]
    assert not evaluate.judge(circle, evaluate.as_pixels(tail)[0])["shape"]
    redrawn = new_runs().redraw([circle], tail)
    assert evaluate.judge(circle, evaluate.as_pixels(redrawn)[0])["shape"]
    assert (redrawn - clean).square().mean() < (tail - clean).square().mean()


def test_runs_that_draw_too_small_are_redrawn_larger():
    square = drawings.Scene((drawings.Object("square", "red", "large", "center"),), "blue")
    least, most = (256 * share for share in drawings.SIZES["large"])
    runs = new_runs()
    radii = [least + 0.2 * (most - least) * (index % 2) for index in range(2 * own_pictures.SIZES_KEPT)]
    small = drawings.paint([square] * len(radii), [[(128.0, 128.0, radius)] for radius in radii], 256, 256)
    redrawn = runs.redraw([square] * len(small), small)
    sizes = [drawings.measure(square, picture)[0][2] for picture in redrawn]
    assert sizes[0] == pytest.approx(radii[0], abs=0.5)
    assert sum(sizes[-20:]) / 20 == pytest.approx((least + most) / 2, abs=0.5)
    assert sizes[-1] - sizes[-2] == pytest.approx(radii[-1] - radii[-2], abs=0.5)


def correction(timestep, captioned, empty, taught):
    """The correction's loss on one state of zeros, whose redrawn picture is known, for constant predictions.

    Constants are in units of the noise that leads to the redrawn picture.
    """
    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    signal = schedule.alphas_cumprod[timestep]
    wanted = torch.full((1, 4, 8, 8), -1.0)
    noise = (signal / (1 - signal)).sqrt()
    values = torch.tensor([captioned, empty]).view(2, 1, 1, 1) * noise

    def student(states, *_):
        return values.expand_as(states)

    teacher = torch.nn.Module()
    teacher.forward = lambda states, *_: torch.full_like(states, float(taught * noise))
    batch = torch.zeros_like(wanted), torch.tensor([timestep]), wanted
    encode = lambda texts: (torch.zeros(len(texts), 1), torch.ones(len(texts), 1))  # noqa: E731
    loss = losses.correction_loss(student, teacher, torch.eye(4))
    return float(loss(schedule, batch, ["a star"], encode))


def test_the_correction_wants_the_redrawn_picture_late_and_the_teachers_early():
    assert correction(200, 1.0, 1.0, taught=5.0) == pytest.approx(0, abs=1e-6)
    assert correction(200, 5.0, 5.0, taught=5.0) > 1
    assert correction(700, 5.0, 5.0, taught=5.0) == pytest.approx(0, abs=1e-6)
    assert correction(700, 1.0, 1.0, taught=5.0) > 1
    half = losses.UNDECIDED - 75
    assert correction(half, 3.0, 3.0, taught=5.0) == pytest.approx(0, abs=1e-6)


def test_the_correction_minds_what_guidance_makes_of_two_errors():
    together, apart = correction(200, 1.1, 1.1, taught=1.0), correction(200, 1.1, 0.9, taught=1.0)
    assert apart > 3 * together


def test_the_correction_minds_a_crooked_outline_on_gray_as_on_black():
    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    teacher = torch.nn.Module()
    teacher.forward = lambda states, *_: states
    outline = torch.where(torch.arange(8) < 4, 1.0, -1.0).expand(1, 4, 8, 8)
    encode = lambda texts: (torch.zeros(len(texts), 1), torch.ones(len(texts), 1))  # noqa: E731

    def error(contrast):
        loss = losses.correction_loss(lambda states, *_: states, teacher, torch.eye(4))
        batch = torch.zeros_like(outline), torch.tensor([200]), contrast * outline
        return float(loss(schedule, batch, ["a star"], encode))

    assert error(0.5) == pytest.approx(error(0.7))
    # What is nearly the background is learned too, but not at any price.
    assert 0 < error(0.1) < 0.5 * error(0.5)


def test_what_the_correction_minds_is_what_the_picture_shows():
    vae = AutoencoderKL.from_pretrained(ROOT / "pixart_sigma" / "demo" / "vae", torch_dtype=torch.float32)
    visible = losses.visibility(vae)
    generator, rng = torch.Generator().manual_seed(1), random.Random(1)
    # Errors of the same size in the latents, from the least to the most visible.
    directions = torch.linalg.svd(visible).Vh.flip(0)
    errors = 0.1 * directions[:, :, None, None] * torch.randn(4, 1, 16, 16, generator=generator)
    counted = torch.einsum("ij,bjhw->bihw", visible, errors).square().mean((1, 2, 3))
    least = 0.1 * errors.square().mean((1, 2, 3))
    with torch.no_grad():
        scenes = [drawings.random_scene(rng) for _ in range(8)]
        latents = vae.encode(drawings.render(scenes, 128, 128, rng)).latent_dist.mean
        drawn, errors = vae.decode(latents).sample, errors / networks.SCALING_FACTOR
        changes = [vae.decode(latents + error).sample - drawn for error in errors]
    shown = torch.stack([change.square().mean() for change in changes])
    assert shown[3] > 20 * shown[0]
    ratio = (counted - least) / shown
    assert ratio.max() < 2 * ratio.min(), ratio


def test_a_small_star_is_still_a_star_after_the_vae():
    vae = AutoencoderKL.from_pretrained(ROOT / "pixart_sigma" / "demo" / "vae", torch_dtype=torch.float32)
    rng = random.Random(4)
    scenes = [
        drawings.Scene((drawings.Object("star", rng.choice(("red", "black", "white"))),), ground)
        for ground in ("blue", "green", "cyan", "purple") * 4
    ]
    least, most = (256 * share for share in drawings.SIZES["small"])
    placed = [
        [(rng.uniform(50, 78), rng.uniform(50, 78), rng.uniform(least, most))] for _ in range(len(scenes))
    ]
    pictures = drawings.paint(scenes, placed, 128, 128)
    with torch.no_grad():
        seen = evaluate.as_pixels(vae.decode(vae.encode(pictures).latent_dist.mean).sample)
    shapes = [evaluate.judge(scene, picture)["shape"] for scene, picture in zip(scenes, seen, strict=True)]
    assert sum(shapes) >= 15, shapes


def test_the_decoder_minds_an_outline_more_than_a_shade():
    wanted = torch.where(torch.arange(64) < 30, 1.0, -1.0).expand(1, 3, 64, 64)
    outline = torch.where(torch.arange(64) < 31, 1.0, -1.0).expand(1, 3, 64, 64)
    shade = wanted + (outline - wanted).abs().mean()
    costs = [float(losses.decoding_loss(picture, wanted)) for picture in (outline, shade)]
    assert costs[0] > 5 * costs[1] > 0


def test_the_decoders_windows_have_the_latents_of_their_pictures():
    pictures = own_pictures.OwnPictures(None, None, None, random.Random(0), None)
    wanted = torch.rand(3, 192, 336, generator=torch.Generator().manual_seed(0))
    latents = torch.nn.functional.avg_pool2d(wanted, 8)
    windows = [pictures.window(latents, wanted) for _ in range(20)]
    for part, picture in windows:
        assert part.shape[1:] == (16, 16)
        assert torch.equal(torch.nn.functional.avg_pool2d(picture, 8), part)
    assert len({float(part[0, 0, 0]) for part, _ in windows}) > 10


def test_each_parameter_has_one_optimizer():
    transformer = fine_tune.new_kv_transformer(ROOT / "pixart_sigma" / "demo" / "transformer")
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    adamw, muon = fine_tune.optimizers(transformer)
    groups = adamw.param_groups + muon.param_groups
    trained = [parameter for group in groups for parameter in group["params"]]
    assert len(trained) == len(names) and set(trained) == set(names)
    faster = {names[one] for group in groups if group["times"] > 1 for one in group["params"]}
    assert faster == {name for name in names.values() if ".attn1.sr." in name or ".attn1.norm." in name}
    assert all(one.ndim == 2 for group in muon.param_groups for one in group["params"])


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    path, network = tmp_path / "correct.pt", torch.nn.Linear(2, 2)
    checkpoints.save(path, 7, network=network)
    optimizer = torch.optim.AdamW(network.parameters())
    assert checkpoints.resume(path, network=network, optimizer=optimizer) == 7
    with pytest.raises(SystemExit, match=r"correct.pt has no average, muon: .* Move it away"):
        checkpoints.resume(path, network=network, average=network, muon=optimizer)


@pytest.fixture
def demo(tmp_path):
    """Copies of the demo's folders, small pictures and short runs."""
    for name in ("demo", "demo_kv"):
        shutil.copytree(ROOT / "pixart_sigma" / name, tmp_path / name)
    return tmp_path / "demo"


@pytest.mark.parametrize("stage", ["refine", "guidance", "correct", "decoder", "kv", "correct-kv", "phased"])
def test_a_fine_tuning_stage_changes_its_own_weights_and_resumes(stage, demo, monkeypatch, capsys):
    monkeypatch.setattr(fine_tune, "LARGE", ((64, 64), (64, 64), (80, 48)))
    monkeypatch.setattr(own_pictures, "RUN_STEPS", 8)
    monkeypatch.setattr(own_pictures, "STEPS_PER_RUN", 2)
    monkeypatch.setattr(batches, "PATCHES_PER_STEP", 64)
    # One of its iterations is enough here, and most of what a step costs.
    monkeypatch.setattr(torch.optim, "Muon", partial(torch.optim.Muon, ns_steps=1))
    folders = {"dense": demo / "transformer", "kv": demo.with_name("demo_kv"), "vae": demo / "vae"}
    changes = "kv" if stage.endswith("kv") else "vae" if stage == "decoder" else "dense"
    if stage == "phased":  # which leaves the demo as it is
        folders["phased"] = shutil.copytree(folders["dense"], demo.with_name("work") / "phased")
        changes = "phased"

    def weights(which):
        return load_file(folders[which] / "diffusion_pytorch_model.safetensors")

    def train(steps):
        command = [stage, "--out", str(demo), "--work", str(demo.with_name("work")), "--steps", str(steps)]
        # Large, as it has no time to grow.
        monkeypatch.setattr(sys, "argv", ["fine_tune.py", *command, "--rate", "1e-2"])
        fine_tune.main()
        return torch.load(demo.with_name("work") / f"{stage}.pt", weights_only=True)

    before = {which: weights(which) for which in folders}
    state = train(2)
    assert state["step"] == 2
    first = weights(changes)
    assert first.keys() == before[changes].keys()
    changed = {name for name in first if not torch.equal(first[name], before[changes][name])}
    assert changed and (stage != "decoder" or all(name.startswith("decoder.") for name in changed))
    if stage.startswith("correct"):  # half way from the weights before
        name = "transformer_blocks.0.attn1.to_q.weight"
        middle = torch.lerp(before[changes][name].float(), state["average"][f"module.{name}"], 0.5)
        torch.testing.assert_close(first[name].float(), middle, atol=1e-6, rtol=1e-3)
    assert all(math.isfinite(float(tensor.float().sum())) for tensor in first.values())
    assert bool(inspect(folders["kv"]).config.kv_compression)
    assert not inspect(folders["dense"]).config.kv_compression
    assert train(3)["step"] == 3
    for which in folders.keys() - {changes}:
        assert all(torch.equal(tensor, before[which][name]) for name, tensor in weights(which).items())
    assert "exported to" in capsys.readouterr().out


@torch.no_grad()
def test_the_distilled_transformer_is_to_land_where_the_teacher_does():
    scheduler = DPMSolverMultistepScheduler.from_pretrained(ROOT / "pixart_sigma" / "demo" / "scheduler")
    latents, goal = torch.randn(
        2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    taught = phases.Phases(None, lambda both, *_: both, scheduler, None, None, None)
    for begin, end in ((999, 749), (500, 250), (250, None)):
        noise = taught.noise_to(goal, latents, begin, end)
        torch.testing.assert_close(taught.land(noise, latents, begin, end), goal, rtol=1e-3, atol=1e-4)
    # A teacher that predicts the latents as noise: what is left of them is known step by step.
    last = taught.teach(latents, 250, None, None, None)
    assert torch.equal(scheduler.timesteps, torch.tensor([250, 200, 150, 100, 50]))
    assert last.norm() < latents.norm()
    taught.teach(latents, 999, 749, None, None)
    assert scheduler.timesteps[[0, -1]].tolist() == [999, 749]


def test_fine_tuning_runs_as_a_command():
    tool = ROOT / "tools" / "demo" / "fine_tune.py"
    result = subprocess.run([sys.executable, tool, "-h"], capture_output=True, text=True)
    assert result.returncode == 0 and "usage: fine_tune.py" in result.stdout
