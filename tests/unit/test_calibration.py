import itertools
import math
import shutil
from dataclasses import replace

import pytest
import torch

from pixart_sigma import cli
from pixart_sigma.calibration import (
    RATIOS,
    WINDOWS,
    Calibration,
    Calibrator,
    calibrate,
    calibration_path,
    find_calibrated,
    fingerprint_of,
)
from pixart_sigma.calibration_picture import draw
from pixart_sigma.checkpoint import KVWeights, TransformerConfig
from pixart_sigma.errors import SigmaError
from pixart_sigma.kv_compression import LAST_TIMESTEP, KVCompression, acting, multiply_adds, parse
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.sampling import guide, predict_clean
from pixart_sigma.schedulers import make_scheduler
from pixart_sigma.transformer import load_transformer

LAYERS = 3
SIZE = 1024
CONFIG = TransformerConfig(
    sample_size=128,
    interpolation_scale=2,
    num_layers=LAYERS,
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    patch_size=2,
    caption_channels=12,
    cross_attention_dim=16,
)
MIDDLES = [LAST_TIMESTEP * (1 - (window + 0.5) / WINDOWS) for window in range(WINDOWS)]
# Of each layer, at ratio 2 and 4, in the first window; later windows have more.
ALONE = {2: [0.010, 0.030, 0.002], 4: [0.040, 0.035, 0.030]}


def true_error(ratios, window):
    """Errors of different layers are at right angles here."""
    return (1 + window) * math.hypot(*(ALONE[ratio][layer] for layer, ratio in ratios.items()), 0)


def calibrator_with_known_errors(budget):
    noise = torch.zeros(1, LAYERS + 1)
    noise[0, -1] = 1
    calibrator = Calibrator(CONFIG, SIZE, SIZE, budget)
    for window, timestep in enumerate(MIDDLES):

        def predict(rules, timestep=timestep, window=window):
            changed = noise.clone()
            for layer in range(LAYERS):
                rule = acting(rules, layer, timestep)
                if rule is not None:
                    changed[0, layer] = (1 + window) * ALONE[rule.ratio][layer]
            return changed

        calibrator.see(timestep, noise, predict)
    return calibrator


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.02, 0.045, 0.06, 0.5])
def test_the_choice_saves_the_most_for_its_error(budget):
    rules, error, errors = calibrator_with_known_errors(budget).measure()
    assert error <= budget
    for window, timestep in enumerate(MIDDLES):
        ratios = {
            layer: acting(rules, layer, timestep).ratio
            for layer in range(LAYERS)
            if acting(rules, layer, timestep)
        }
        assert true_error(ratios, window) <= budget * (1 + 1e-6)

        def saved(ratios, timestep=timestep):
            chosen = tuple(KVCompression("mean", ratio, (layer,)) for layer, ratio in ratios.items())
            return -multiply_adds(CONFIG, SIZE, SIZE, 300, chosen, timestep)

        for options in itertools.product((None, *RATIOS), repeat=LAYERS):
            other = {layer: ratio for layer, ratio in enumerate(options) if ratio}
            if true_error(other, window) < true_error(ratios, window) * (1 - 1e-6):
                assert saved(other) <= saved(ratios)
        for ratio, layer in itertools.product(RATIOS, range(LAYERS)):
            assert errors[ratio][layer][window] == pytest.approx((1 + window) * ALONE[ratio][layer])


def test_a_large_budget_takes_everything_and_a_tiny_one_nothing():
    rules, _, _ = calibrator_with_known_errors(0.9).measure()
    assert rules == parse("mean:4:all", LAYERS)
    assert calibrator_with_known_errors(0.0001).measure()[:2] == ((), 0.0)


def test_of_each_run_the_step_nearest_to_the_middle_is_measured():
    calibrator = Calibrator(CONFIG, SIZE, SIZE, 0.05)
    seen = []
    for _ in range(2):
        calibrator.start()
        for timestep in (999, 900, 880, 880, 760, 630):
            calibrator.see(
                timestep, torch.ones(1), lambda rules, at=timestep: seen.append(at) or torch.ones(1)
            )
    progress = []
    calibrator.measure(lambda done, total: progress.append((done, total)))
    assert set(seen) == {880, 630} and seen.count(880) == 2 * seen.count(630)
    assert progress[-1][0] == progress[-1][1]
    assert all(earlier[0] <= later[0] for earlier, later in itertools.pairwise(progress))


def test_nonsense_is_refused():
    for budget in (0, 1, -0.1, math.nan):
        with pytest.raises(SigmaError, match="budget"):
            Calibrator(CONFIG, SIZE, SIZE, budget)
    with pytest.raises(SigmaError, match="trained with KV compression"):
        Calibrator(replace(CONFIG, kv_compression=KVWeights(2, (1,))), SIZE, SIZE, 0.05)
    with pytest.raises(SigmaError, match="No step"):
        Calibrator(CONFIG, SIZE, SIZE, 0.05).measure()


@pytest.fixture(scope="module")
def measured(transformer_folder):
    transformer = load_transformer(transformer_folder)
    random = torch.Generator().manual_seed(0)
    runs = [
        (
            torch.randn(1, 4, 16, 24, generator=random),
            torch.randn(1, 6, 64, generator=random),
            torch.randn(1, 1, 64, generator=random),
        )
        for _ in range(2)
    ]
    return calibrate(transformer, runs, ("one", "two"), budget=0.02, steps=8)


def test_what_is_measured_is_saved_and_read(measured, tmp_path):
    assert (measured.width, measured.height) == (192, 128)
    assert 0 < measured.error <= measured.budget and 0 < measured.saved < 1
    measured.save(tmp_path / "kv.json")
    read = Calibration.read(tmp_path / "kv.json")
    assert (read.rules, read.prompts, read.fingerprint) == (
        measured.rules,
        measured.prompts,
        measured.fingerprint,
    )
    assert read.error == pytest.approx(measured.error, abs=1e-5)
    assert draw(read).size[1] > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kv.json"]


def test_the_rules_are_as_good_as_promised(measured, transformer_folder):
    """Run again by hand, at the measured steps."""
    transformer, scheduler = load_transformer(transformer_folder), make_scheduler("dpmpp_2m")
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5))
    embeds = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(6))
    for timestep in (874, 624, 375, 125):

        def guided_picture(rules, timestep=timestep):
            both = transformer(latents.expand(2, -1, -1, -1), timestep, embeds, kv_compression=rules)
            return predict_clean(scheduler, latents, guide(both, 4.5), timestep)

        plain, changed = guided_picture(()), guided_picture(measured.rules)
        assert (changed - plain).norm() / plain.norm() < 3 * measured.budget


class WrongByAConstant:
    """Predicts no noise, and compressed a little with the prompt alone."""

    sigma_config = CONFIG

    def __call__(self, latents, timestep, embeds, mask, kv_compression):
        noise = torch.zeros_like(latents)
        if kv_compression:
            noise[len(noise) // 2 :] = 0.01
        return noise

    def state_dict(self):
        return {f"transformer_blocks.{n}.attn1.to_k.weight": torch.ones(1, 8) for n in range(LAYERS)}


def test_an_error_counts_as_the_guided_picture_shows_it():
    latents, embeds = torch.randn(1, 4, 8, 8), torch.zeros(1, 1, 12)
    scheduler = make_scheduler("dpmpp_2m")
    scheduler.set_timesteps(20)
    table = scheduler.alphas_cumprod
    # Without noise, each step predicts what the first one sees.
    picture = latents / table[999].sqrt()
    for guidance_scale in (4.5, 9.0):
        measured = calibrate(
            WrongByAConstant(), [(latents, embeds, embeds)], ("",), guidance_scale=guidance_scale
        )
        for window, middle in enumerate(MIDDLES):
            timestep = min(scheduler.timesteps.tolist(), key=lambda timestep: abs(timestep - middle))
            sigma = ((1 - table[timestep]) / table[timestep]).sqrt()
            shown = sigma * guidance_scale * 0.01 * latents.numel() ** 0.5 / picture.norm()
            assert measured.errors[2][0][window] == pytest.approx(float(shown), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_known_again_in_another_precision(measured, transformer_folder, dtype):
    state_dict = load_transformer(transformer_folder).state_dict()
    stored = {name: weight.to(dtype) for name, weight in state_dict.items()}
    assert measured.fits(fingerprint_of(stored))
    others = {
        name: weight + 0.1 * weight.std() * torch.randn_like(weight) for name, weight in state_dict.items()
    }
    assert not measured.fits(fingerprint_of(others))


def test_it_lies_with_its_checkpoint_and_serves_no_other(measured, tmp_path, caplog):
    folder, file = tmp_path, tmp_path / "sigma.safetensors"
    file.touch()
    assert calibration_path(folder).parent == folder and calibration_path(file).parent == folder
    assert find_calibrated(file, lambda: measured.fingerprint) is None
    measured.save(calibration_path(file))
    assert find_calibrated(file, lambda: measured.fingerprint) == measured.rules
    assert find_calibrated(file, lambda: tuple(-weight for weight in measured.fingerprint)) is None
    assert "another checkpoint" in caplog.text


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"format": "x"}', "\x00\xff", '{"format": "pixart-sigma kv calibration 1"}']
)
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "kv.json"
    path.write_text(content)
    with pytest.raises(SigmaError, match=r"kv\.json is not a calibration"):
        Calibration.read(path)


def test_a_file_with_a_layer_too_many_is_refused(measured, tmp_path):
    path = tmp_path / "kv.json"
    replace(measured, rules=parse("mean:2:0-8", 9)).save(path)
    with pytest.raises(SigmaError, match="out of range"):
        Calibration.read(path)


def test_in_the_terminal(pipeline_folder, tmp_path, capsys):
    out, plot, prompts = tmp_path / "kv.json", tmp_path / "kv.png", tmp_path / "prompts.txt"
    prompts.write_text("a boat\n\n a house \n", encoding="utf-8")
    options = ["--model", str(pipeline_folder), "--t5-precision", "fp32", "--size", "128x192", "--steps", "4"]
    status = cli.main(
        ["calibrate", *options, "--prompts", str(prompts), "--out", str(out), "--plot", str(plot)]
    )
    assert status == 0, capsys.readouterr().err
    calibration = Calibration.read(out)
    assert calibration.prompts == ("a boat", "a house") and calibration.height == 192
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out

    picture = tmp_path / "picture.png"
    drawn = [
        "generate", "a boat", *options, "--no-binning", "--out", str(picture), "--kv-compression", str(out)
    ]  # fmt: skip
    assert cli.main(drawn) == 0 and picture.is_file()
    replace(calibration, fingerprint=tuple(-weight for weight in calibration.fingerprint)).save(out)
    assert cli.main(drawn) == 2
    assert "another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "0"], "--budget"),
        (["--budget", "150%"], "--budget"),
        (["--budget", "much"], "--budget"),
        (["--steps", "0"], "--steps"),
        (["--prompts", "no-such-file.txt"], "no-such-file.txt"),
        (["--out", "no-such-folder/kv.json"], "no-such-folder"),
    ],
)
def test_mistakes_in_the_terminal(options, words, capsys):
    assert cli.main(["calibrate", *options]) == 2
    assert words in capsys.readouterr().err


def test_auto_uses_what_lies_with_the_checkpoint(pipeline_folder, measured, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    pipeline = SigmaPipeline.from_path(folder)
    assert pipeline.transformer.kv_compression("auto", 2048, 2048) == parse("mean:2:deep", 2)
    measured.save(calibration_path(folder))
    assert pipeline.transformer.kv_compression("auto", 2048, 2048) == measured.rules
    assert pipeline.transformer.kv_compression("auto", 512, 512) == ()
