"""The words of `speed`: read, written, refused."""

import pytest

from pixart_sigma.errors import SigmaError
from pixart_sigma.schedule_part import SchedulePart
from pixart_sigma.settings import Settings
from pixart_sigma.speed import CAUTIOUS, Saving, acting, for_steps, parse, spell


@pytest.mark.parametrize(
    "text",
    [
        "off",
        "forecast:1:1",
        "forecast:0:20:10-95%",
        "guidance:1:3:25-100%",
        "unguided",
        "unguided:70-100%",
        "forecast:1:1:0-50%+forecast:2:3:50-97.5%+guidance:0:1",
    ],
)
def test_what_is_spelled_is_read(text):
    assert spell(parse(text)) == text


def test_spaces_and_capitals_do_not_matter():
    assert parse(" Forecast:1:2 + GUIDANCE:0:1:20-80% ") == (
        Saving("forecast", 1, 2),
        Saving("guidance", 0, 1, SchedulePart(0.2, 0.8)),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not understood"),
        ("fast", "'fast' is not understood"),
        ("auto", "'auto' is not understood"),
        ("forecast", "is not understood"),
        ("forecast:1", "is not understood"),
        ("forecast:1:1:2:3", "is not understood"),
        ("forecast:one:1", "whole numbers"),
        ("forecast:-1:1", "whole numbers"),
        ("forecast:3:1", "order of a forecast is 0, 1 or 2, not 3"),
        ("forecast:1:0", "1 to 20 steps in a row, not 0"),
        ("forecast:1:21", "1 to 20 steps in a row, not 21"),
        ("guidance:1:1:80-20%", "'80-20%' of the schedule"),
        ("unguided:50-101%", "'50-101%' of the schedule"),
        ("forecast:1:1+", "is not understood"),
    ],
)
def test_what_is_not_understood_is_named(text, words):
    with pytest.raises(SigmaError, match=words):
        parse(text)


def test_of_one_kind_the_first_that_acts_counts():
    savings = parse("forecast:0:3:0-50%+forecast:1:1+guidance:1:2:50-100%")
    assert acting(savings, "forecast", 999) == savings[0]
    assert acting(savings, "forecast", 400) == savings[1]
    assert acting(savings, "guidance", 999) is None
    assert acting(savings, "guidance", 0) == savings[2]
    assert acting(savings, "unguided", 0) is None


def test_in_a_run_of_other_steps_forecasts_reach_as_far():
    savings = parse("forecast:1:3+guidance:0:1+unguided:90-100%")
    assert spell(for_steps(savings, 20, 40)) == "forecast:1:6+guidance:0:2+unguided:90-100%"
    assert spell(for_steps(savings, 20, 10)) == "forecast:1:1+unguided:90-100%"
    assert spell(for_steps(savings, 20, 5)) == "unguided:90-100%"
    assert for_steps(savings, 20, 20) == savings
    assert spell(for_steps(parse("forecast:1:3"), 1, 999)) == "forecast:1:20"
    assert for_steps(savings, 20, 4) == ()


def test_the_last_step_stays_computed_in_a_shorter_run():
    (shorter,) = for_steps(parse("forecast:1:3:75-94.9%"), 20, 14)
    assert shorter.part.end == 0.928 and parse(spell([shorter])) == (shorter,)
    assert for_steps(parse("forecast:1:3:75-94.9%"), 20, 40)[0].part.end == 0.949
    assert for_steps(parse("forecast:1:3:90-94.9%"), 20, 8) == ()
    assert for_steps(parse("forecast:1:3:75-100%"), 20, 14)[0].part.end == 1


def test_the_cautious_pattern_begins_late_and_ends_early():
    (saving,) = CAUTIOUS
    assert (saving.order, saving.skipped) == (1, 1)
    assert not saving.part.holds(999) and not saving.part.holds(0)


def test_settings_name_what_is_wrong_when_they_are_made():
    with pytest.raises(SigmaError, match="order of a forecast"):
        Settings(speed="forecast:7:1")
    with pytest.raises(SigmaError, match="spacing"):
        Settings(spacing="wide")
    for later in ("auto", "measured.json"):
        settings = Settings(speed=later)
        assert settings.speed_is_open
        with pytest.raises(SigmaError, match="is not understood"):
            settings.savings  # noqa: B018
    assert Settings(speed="off").savings == () == Settings().savings
