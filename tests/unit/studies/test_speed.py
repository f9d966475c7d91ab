"""All savings chosen together, for models whose errors are known."""

import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

from pixart_sigma.errors import SigmaError
from pixart_sigma.noise_schedule import PUBLISHED, NoiseSchedule
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.sampling.forecast import ForecastRun
from pixart_sigma.settings import Settings
from pixart_sigma.speed import CAUTIOUS, parse, spell
from pixart_sigma.studies.calibration import calibrate
from pixart_sigma.studies.runs import Ran
from pixart_sigma.studies.speed_picture import draw_speed, frontier
from pixart_sigma.transformer.calibrated_speed import choose, follow
from pixart_sigma.transformer.calibration import (
    Calibration,
    Choice,
    Point,
    calibration_path,
    fingerprint_of,
)
from pixart_sigma.transformer.checkpoint import load_transformer_state_dict
from pixart_sigma.transformer.config import KVWeights, TransformerConfig
from pixart_sigma.transformer.kv_rules import acting

CONFIG = TransformerConfig(
    sample_size=128,
    interpolation_scale=2,
    num_layers=3,
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    patch_size=2,
    caption_channels=12,
    cross_attention_dim=1152,
)
SETTINGS = Settings(width=1024, height=1024, steps=20)


@dataclass
class KnownRuns:
    """A model whose clean latents swing by `curve` over the schedule, whose runs end at what the last step
    predicts plus the errors of its forecasts and of its compressed layers, each at right angles."""

    curve: float = 0.02
    layer_error: float = 0.003
    config: TransformerConfig = CONFIG
    noise_schedule: NoiseSchedule = PUBLISHED
    fingerprint: tuple[float, ...] = (1.0,) * 24
    choices: list[Choice] = field(default_factory=list)

    def step(self, timestep):
        progress = 1 - timestep / 999
        positive = torch.tensor([1.0, self.curve * math.sin(12 * progress)])
        sigma = math.exp(5 - 8 * progress)
        return sigma, [positive, positive - torch.tensor([0.0, 0.003 * sigma * (1 - progress**3)])]

    def guided(self, values):
        positive, negative = values
        return negative + SETTINGS.guidance * (positive - negative)

    def run(self, index, choice, see=None):
        self.choices.append(choice)
        steps = choice.steps or SETTINGS.steps
        run, error = ForecastRun(choice.savings), 0.0
        for timestep in [999 - 999 * step / steps for step in range(steps)]:
            sigma, values = self.step(timestep)
            run.step(timestep, sigma)
            found = run.ask(lambda alone, values=values: values[:1] if alone else values, 2)
            error += float((self.guided(found) - self.guided(values)).norm() ** 2)
            for layer in range(CONFIG.num_layers):
                rule = acting(choice.rules, layer, timestep)
                error += 0.0 if rule is None else (rule.ratio * self.layer_error) ** 2 / SETTINGS.steps
            if see:
                guided = self.guided(values)

                def repeat(rules, guided=guided, timestep=timestep):
                    chosen = [acting(rules, layer, timestep) for layer in range(CONFIG.num_layers)]
                    errors = [rule.ratio * self.layer_error if rule else 0.0 for rule in chosen]
                    return guided + torch.tensor([0.0, math.hypot(*errors)])

                see(timestep, guided, repeat)
        coarse = 2 * (1 / steps - 1 / SETTINGS.steps)
        ended = torch.tensor([[1.0, math.sqrt(error), coarse, 0.02 if choice.spacing else 0.0]])
        return Ran(ended, 0.01 * len(run.computed), run.computed)

    def repeating(self):
        return nullcontext()


def calibrated(budget=0.05, **named):
    runs = KnownRuns(
        **{name: named.pop(name) for name in ("curve", "layer_error", "config") if name in named}
    )
    return calibrate(runs, ("one", "two"), SETTINGS, budget, **named), runs


@pytest.fixture(scope="module")
def known():
    return calibrated()


def points_of(calibration, *kinds):
    return [point for point in calibration.points if point.kind in kinds]


def test_the_choice_is_the_cheapest_that_was_measured_within_the_budget(known):
    calibration, _ = known
    within = [point for point in calibration.points if point.error <= 0.05]
    assert calibration.speed in within
    assert calibration.speed.multiply_adds == min(point.multiply_adds for point in within)
    in_place = [point for point in within if point.choice.keeps_steps]
    assert calibration.speed_in_place in in_place
    assert calibration.speed_in_place.multiply_adds == min(point.multiply_adds for point in in_place)


def test_together_is_cheaper_than_each_alone(known):
    calibration, _ = known
    together = min(point.multiply_adds for point in points_of(calibration, "together") if point.error <= 0.05)
    for kind in ("forecast", "guidance", "kv", "steps", "spacing"):
        alone = [point.multiply_adds for point in points_of(calibration, kind) if point.error <= 0.05]
        assert together < min(alone, default=1.0), kind
    best = calibration.speed.choice
    assert best.rules and {saving.kind for saving in best.savings} >= {"forecast"}


def test_the_best_savings_are_tried_on_other_steps_too():
    _, runs = calibrated(0.1)
    on_top = [choice for choice in runs.choices if not choice.keeps_steps and choice.savings]
    assert {"leading", "trailing"} & {choice.spacing for choice in on_top}


def test_savings_that_err_more_are_left_out():
    straight, bent = (calibrated(curve=curve)[0] for curve in (0.0, 0.5))
    cheapest = [
        min([point.multiply_adds for point in points_of(one, "forecast") if point.error <= 0.05], default=1)
        for one in (straight, bent)
    ]
    assert cheapest[0] < cheapest[1]
    clumsy, _ = calibrated(layer_error=5.0)
    assert not clumsy.speed.choice.rules


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.1])
def test_a_larger_budget_saves_more(budget, known):
    calibration, _ = calibrated(budget)
    assert all(point.error <= budget for point in (calibration.speed, calibration.speed_in_place))
    ordered = budget <= known[0].budget
    assert (calibration.speed.multiply_adds >= known[0].speed.multiply_adds) == ordered


def test_multiply_adds_are_those_that_were_asked_for(known):
    calibration, _ = known
    (alternate,) = [
        point
        for point in points_of(calibration, "forecast")
        if spell(point.choice.savings).startswith("forecast:1:1:10-")
    ]
    assert alternate.multiply_adds == pytest.approx(0.575, abs=0.03)  # 11 or 12 of 20 steps
    half = next(point for point in points_of(calibration, "steps") if point.choice.steps == 10)
    assert half.multiply_adds == pytest.approx(0.5) and half.seconds == pytest.approx(0.5)


def test_a_converged_run_is_the_reference_when_asked(known):
    calibration, runs = calibrated(0.1, reference="converged")
    assert calibration.reference == "converged" and Choice(steps=80) in runs.choices
    assert all(Choice(steps=80) != choice for choice in known[1].choices)
    # The user's own run is off by 2 (1/20 - 1/80) itself, which no saving on top of it takes away.
    assert calibration.speed_in_place.error > 0.07


def test_seconds_choose_when_asked():
    calibration, _ = calibrated(cost="seconds")
    within = [point for point in calibration.points if point.error <= 0.05]
    assert calibration.speed.seconds == min(point.seconds for point in within)


def test_a_checkpoint_that_was_trained_with_compression_keeps_it():
    trained = replace(CONFIG, kv_compression=KVWeights(2, (1,)))
    calibration, runs = calibrated(config=trained)
    assert calibration.errors == {} and not points_of(calibration, "kv")
    assert {choice.rules for choice in runs.choices} == {calibration.rules} and calibration.rules
    assert calibration.speed.multiply_adds < 0.7


def test_progress_goes_up_to_its_total():
    counts = []
    calibrated(on_step=lambda *count: counts.append(count), on_run=lambda *count: counts.append(count))
    assert counts[-1][0] == counts[-1][1] and len({total for _, total in counts}) == 1
    assert all(before[0] <= after[0] for before, after in zip(counts, counts[1:], strict=False))


@pytest.mark.parametrize("named", [{"reference": "best"}, {"cost": "watts"}])
def test_other_words_are_refused(named):
    with pytest.raises(SigmaError, match="choose one of"):
        calibrated(**named)


def test_what_is_measured_is_saved_and_read(known, tmp_path):
    calibration, _ = known
    calibration.save(tmp_path / "speed.json")
    read = Calibration.read(tmp_path / "speed.json")
    assert len(read.points) == len(calibration.points)
    for before, after in zip(calibration.points, read.points, strict=True):
        assert (before.kind, before.choice) == (after.kind, after.choice)
        assert after.error == pytest.approx(before.error, abs=1e-5)
    assert read.speed.choice == calibration.speed.choice
    assert "all savings:" in read.describe() and "20 steps as they are" in read.describe()


def test_the_picture_shows_what_was_chosen(known):
    picture = draw_speed(known[0])
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert (27, 127, 59) in colours and (36, 113, 163) in colours
    points = [
        Point("x", Choice(), error, cost, cost) for error, cost in ((0.1, 0.5), (0.2, 0.6), (0.05, 0.7))
    ]
    assert [point.multiply_adds for point in frontier(points)] == [0.5, 0.7]


def test_a_run_as_it_was_measured_takes_other_steps_and_another_run_keeps_its_own(known):
    other = Point("together", Choice((), parse("forecast:1:2"), 12, "karras"), 0.01, 0.2, 0.2)
    in_place = Point("together", Choice((), parse("forecast:1:3")), 0.02, 0.3, 0.3)
    calibration = replace(known[0], speed=other, speed_in_place=in_place)
    as_measured = follow(calibration, replace(SETTINGS, speed="auto"))
    assert (as_measured.steps, as_measured.spacing, as_measured.speed) == (12, "karras", "forecast:1:2")
    longer = follow(calibration, replace(SETTINGS, speed="auto", steps=40))
    assert (longer.steps, longer.spacing, longer.speed) == (40, None, "forecast:1:6")
    assert follow(calibration, replace(SETTINGS, speed="auto", strength=0.5)).steps == 20
    assert follow(calibration, replace(SETTINGS, speed="auto", scheduler="euler")).steps == 20
    assert follow(calibration, replace(SETTINGS, speed="auto", spacing="trailing")).spacing == "trailing"
    compressed = replace(known[0], speed=None, speed_in_place=None)
    assert follow(compressed, replace(SETTINGS, speed="auto")).speed == "off"


def test_compression_of_ones_own_stays(known):
    assert follow(known[0], replace(SETTINGS, speed="auto")).kv_compression not in (None, "off")
    assert follow(known[0], replace(SETTINGS, speed="auto", kv_compression="off")).kv_compression == "off"


def test_without_a_calibration_it_is_said_that_nothing_was_measured(known, caplog):
    old = replace(known[0], points=(), speed=None, speed_in_place=None)
    for calibration in (None, old):
        assert choose(calibration, 20).savings == CAUTIOUS
    assert "not measured" in caplog.text


def test_a_pipeline_finds_it_and_writes_into_the_picture_what_it_was(pipeline_folder, known, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    pipeline = SigmaPipeline.from_path(folder)
    settings = Settings("a boat", width=64, height=64, steps=6, speed="auto", binning=False)
    result = pipeline.generate(settings)
    assert result.metadata.settings.speed == spell(CAUTIOUS)
    measured = replace(
        known[0],
        rules=(),
        speed=None,
        points=(Point("together", Choice(savings=parse("forecast:1:6")), 0.01, 0.5, 0.5),),
        fingerprint=fingerprint_of(load_transformer_state_dict(pipeline.checkpoint)),
        speed_in_place=Point("together", Choice(savings=parse("forecast:1:6")), 0.01, 0.5, 0.5),
    )
    measured.save(calibration_path(pipeline.checkpoint.path))
    assert pipeline.generate(settings).metadata.settings.speed == "forecast:1:1"
