import functools
import itertools
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch

from pixart_sigma.cli import commands as cli
from pixart_sigma.errors import SigmaError
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.sampling.schedulers import make_scheduler
from pixart_sigma.setting_checks import LAST_TIMESTEP
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.studies import calibration as studies
from pixart_sigma.studies.calibration import DEMO_PROMPTS, calibrate
from pixart_sigma.studies.calibration_picture import draw
from pixart_sigma.studies.calibrator import SEARCHES, Calibrator
from pixart_sigma.studies.runs import EngineRuns
from pixart_sigma.transformer.calibration import (
    RATIOS,
    WINDOWS,
    Calibration,
    Choice,
    calibration_path,
    find_calibration,
    fingerprint_of,
)
from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
from pixart_sigma.transformer.config import TransformerConfig
from pixart_sigma.transformer.converting import convert
from pixart_sigma.transformer.cost import multiply_adds
from pixart_sigma.transformer.kv_rules import KVCompression, acting, parse, spell
from pixart_sigma.transformer.loading import load_transformer

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
# What is left of an error in each window at the end of the run: not in the order of the errors.
LEFT = [2.0, 0.5, 0.1, 1.0]


def step_error(ratio, layer, window):
    return (1 + window) * ALONE[ratio][layer]


def true_error(choice):
    """Of a whole run, its ratios as {(window, layer): ratio}: all errors are at right angles here."""
    return math.hypot(*(LEFT[at[0]] * step_error(ratio, at[1], at[0]) for at, ratio in choice.items()), 0)


def choice_of(rules):
    choice = {}
    for window, layer in itertools.product(range(WINDOWS), range(LAYERS)):
        rule = acting(rules, layer, MIDDLES[window])
        if rule is not None:
            choice[window, layer] = rule.ratio
    return choice


def calibrate_known_errors(budget):
    """(rules, error, errors, runs, calibrator) where a run ends at 1 plus its errors, each in a number of its
    own."""
    calibrator = Calibrator(CONFIG, SIZE, SIZE, budget)
    noise = torch.zeros(1, LAYERS + 1)
    noise[0, -1] = 1
    calibrator.start()
    for window, timestep in enumerate(MIDDLES):

        def predict(rules, timestep=timestep, window=window):
            changed = noise.clone()
            for layer in range(LAYERS):
                rule = acting(rules, layer, timestep)
                if rule is not None:
                    changed[0, layer] = step_error(rule.ratio, layer, window)
            return changed

        calibrator.see(timestep, noise, predict)
    dense = torch.zeros(WINDOWS * LAYERS + 1)
    dense[-1] = 1
    calibrator.finish(dense)
    runs = []

    def run(index, rules):
        assert index == 0
        runs.append(rules)
        ended = dense.clone()
        for (window, layer), ratio in choice_of(rules).items():
            ended[window * LAYERS + layer] = LEFT[window] * step_error(ratio, layer, window)
        return ended

    errors = calibrator.measure()
    return *calibrator.choose(errors, run), errors, runs, calibrator


@pytest.mark.parametrize("budget", [0.0005, 0.001, 0.01, 0.02, 0.045, 0.06, 0.5])
def test_the_choice_saves_the_most_for_its_error(budget):
    rules, error, errors, runs, _ = calibrate_known_errors(budget)
    chosen = choice_of(rules)
    assert error == pytest.approx(true_error(chosen), rel=1e-5) and error <= budget
    assert len(runs) <= WINDOWS + SEARCHES
    for ratio, layer, window in itertools.product(RATIOS, range(LAYERS), range(WINDOWS)):
        assert errors[ratio][layer][window] == pytest.approx(step_error(ratio, layer, window))

    def saved(choice):
        rules = {
            window: tuple(
                KVCompression("mean", ratio, (at[1],)) for at, ratio in choice.items() if at[0] == window
            )
            for window in range(WINDOWS)
        }
        return -sum(
            multiply_adds(CONFIG, SIZE, SIZE, 300, rules[window], timestep)
            for window, timestep in enumerate(MIDDLES)
        )

    picks = random.Random(0)
    places = list(itertools.product(range(WINDOWS), range(LAYERS)))
    others = [
        {at: picks.choice(RATIOS) for at in places if picks.random() < share}
        for share in (0.2, 0.5, 0.8) * 300
    ]
    others += [chosen | {at: ratio} for at in places for ratio in RATIOS]
    for gone, at, ratio in itertools.product(chosen, places, RATIOS):
        others.append({place: chosen[place] for place in chosen if place != gone} | {at: ratio})
    for other in others:
        if true_error(other) < true_error(chosen) * (1 - 1e-6):
            assert saved(other) <= saved(chosen)


def test_what_other_savings_take_of_the_budget_is_left_to_them():
    budget, already = 0.05, 0.04
    calibrator, tried = calibrate_known_errors(budget)[-1], []

    def error_of(rules):
        tried.append(rules)
        return math.hypot(already, true_error(choice_of(rules)))

    rules, error = calibrator.search(error_of, already)
    assert rules and math.hypot(already, true_error(choice_of(rules))) == pytest.approx(error)
    assert error <= budget
    # The first one is tried for what is left of it, by squares: 0.03.
    assert 0.02 < true_error(choice_of(tried[0])) <= 0.03


def test_a_large_budget_takes_everything_and_a_tiny_one_nothing():
    assert calibrate_known_errors(0.9)[0] == parse("mean:4:all", LAYERS)
    assert calibrate_known_errors(0.00001)[:2] == ((), 0.0)


def test_a_run_that_ends_worse_than_its_parts_say_has_less_compression():
    """Errors that add up, where squares were expected to."""

    def changed(rules, window):
        return torch.ones(1) + 0.01 + 0.001 * rules[0].layers[0] + 0.0001 * window

    calibrator = Calibrator(CONFIG, SIZE, SIZE, 0.05)
    calibrator.start()
    for window, timestep in enumerate(MIDDLES):
        calibrator.see(timestep, torch.ones(1), functools.partial(changed, window=window))
    calibrator.finish(torch.ones(1))
    errors = calibrator.measure()
    rules, error = calibrator.choose(
        errors, lambda index, rules: torch.ones(1) + 0.01 * len(choice_of(rules))
    )
    # The squares of the errors of 12 layers would add to less than 0.05.
    assert error == pytest.approx(0.01 * len(choice_of(rules)), rel=1e-3)
    assert 0.03 <= error <= 0.05


def test_the_worst_run_keeps_the_budget():
    """Of two prompts the second bears half of what the first does."""
    calibrator = Calibrator(CONFIG, SIZE, SIZE, 0.05)
    for _ in range(2):
        calibrator.start()
        for timestep in MIDDLES:
            calibrator.see(
                timestep, torch.ones(1), lambda rules: torch.ones(1) + 0.01 + 0.001 * rules[0].layers[0]
            )
        calibrator.finish(torch.ones(1))
    rules, error = calibrator.choose(
        calibrator.measure(),
        lambda index, rules: torch.ones(1) + 0.006 * (1 + index) * len(choice_of(rules)) ** 0.5,
    )
    assert error == pytest.approx(0.012 * len(choice_of(rules)) ** 0.5, rel=1e-3)
    assert 0.025 < error <= 0.05


def test_of_each_run_the_step_nearest_to_the_middle_is_measured():
    calibrator = Calibrator(CONFIG, SIZE, SIZE, 0.05)
    seen = []
    for _ in range(2):
        calibrator.start()
        for timestep in (999, 900, 880, 880, 760, 630):
            calibrator.see(
                timestep, torch.ones(1), lambda rules, at=timestep: seen.append(at) or torch.ones(1)
            )
        calibrator.finish(torch.ones(1))
    progress = []

    def on_progress(done, total):
        progress.append((done, total))

    errors = calibrator.measure(on_progress)
    calibrator.choose(errors, lambda index, rules: torch.ones(1), on_progress)
    assert set(seen) == {880, 630} and seen.count(880) == 2 * seen.count(630)
    assert progress[-1][0] == progress[-1][1] and len({total for _, total in progress}) == 1
    assert all(earlier[0] <= later[0] for earlier, later in itertools.pairwise(progress))


def test_nonsense_is_refused():
    for budget in (0, 1, -0.1, math.nan):
        with pytest.raises(SigmaError, match="budget"):
            Calibrator(CONFIG, SIZE, SIZE, budget)
    with pytest.raises(SigmaError, match="No step"):
        Calibrator(CONFIG, SIZE, SIZE, 0.05).measure()


@pytest.fixture(scope="module")
def measured(transformer_folder):
    transformer = load_transformer(transformer_folder)
    generator = torch.Generator().manual_seed(0)
    starts = [
        (
            torch.randn(1, 4, 16, 24, generator=generator),
            Prompts(
                torch.randn(1, 6, 64, generator=generator),
                negative_embeds=torch.randn(1, 1, 64, generator=generator),
            ),
        )
        for _ in range(2)
    ]
    settings = Settings(width=192, height=128, steps=8)
    return calibrate(EngineRuns(transformer, starts, settings), ("one", "two"), settings, budget=0.02)


def test_steps_that_are_repeated_after_a_run_do_not_count(transformer_folder):
    prompts = Prompts(torch.randn(1, 6, 64), negative_embeds=torch.randn(1, 1, 64))
    settings, seen = Settings(width=128, height=128, steps=3), []
    runs = EngineRuns(load_transformer(transformer_folder), [(torch.randn(1, 4, 16, 16), prompts)], settings)
    ran = runs.run(0, Choice(), lambda timestep, predicted, repeat: seen.append(repeat))
    asked = list(ran.asked)
    assert [rows for _, rows in asked] == [2, 2, 2] and len(seen) == 3
    seen[0](())
    assert ran.asked == asked


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
    """In a run of another noise and another prompt."""
    transformer, generator = load_transformer(transformer_folder), torch.Generator().manual_seed(5)
    shapes = (1, 4, 16, 24), (1, 6, 64), (1, 1, 64)
    latents, embeds, negative = (torch.randn(shape, generator=generator) for shape in shapes)
    plain, changed = (
        denoise(guide(transformer, Prompts(embeds, negative_embeds=negative), settings), latents, settings)
        for settings in (Settings(steps=8, kv_compression=spell(rules)) for rules in ((), measured.rules))
    )
    assert 0 < (changed - plain).norm() / plain.norm() < 2 * measured.budget


class WrongByAConstant:
    """Predicts no noise, and compressed a little with the prompt alone."""

    sigma_config = CONFIG

    def __call__(self, latents, timestep, embeds, mask, kv_compression):
        noise = torch.zeros_like(latents)
        if kv_compression != spell(()):
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
        settings = Settings(width=64, height=64, guidance_scale=guidance_scale)
        starts = [(latents, Prompts(embeds, negative_embeds=embeds))]
        measured = calibrate(EngineRuns(WrongByAConstant(), starts, settings), ("",), settings, 0.05)
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


def test_a_quantised_transformer_is_known_by_its_file(pipeline_folder, tmp_path, monkeypatch):
    file = tmp_path / "int8.safetensors"
    convert(inspect(pipeline_folder), "int8", file)
    pipeline = SigmaPipeline.from_path(
        pipeline_folder, Ways(device="cpu", t5_precision="fp32"), transformer=file
    )
    monkeypatch.setattr(studies, "calibrate", lambda runs, *_, **__: runs.fingerprint)
    found = studies.calibrate_pipeline(pipeline, ("a boat",), Settings(width=64, height=64, steps=1))
    assert found == fingerprint_of(load_transformer_state_dict(inspect(file)))


def test_it_lies_with_its_checkpoint_and_serves_no_other(measured, tmp_path, caplog):
    folder, file = tmp_path, tmp_path / "sigma.safetensors"
    file.touch()
    assert calibration_path(folder).parent == folder and calibration_path(file).parent == folder
    assert find_calibration(file, lambda: measured.fingerprint) is None
    measured.save(calibration_path(file))
    assert find_calibration(file, lambda: measured.fingerprint).rules == measured.rules
    assert find_calibration(file, lambda: tuple(-weight for weight in measured.fingerprint)) is None
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


def test_the_demo_is_calibrated_with_words_that_it_knows(tmp_path):
    out = tmp_path / "kv.json"
    assert cli.main(["calibrate", "--size", "64x64", "--steps", "4", "--out", str(out)]) == 0
    assert Calibration.read(out).prompts == DEMO_PROMPTS


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
