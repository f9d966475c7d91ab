from dataclasses import replace

import pytest

from pixart_sigma.batch.pictures import make_pictures, say_bad
from pixart_sigma.batch.rows import Row
from pixart_sigma.errors import SigmaError
from pixart_sigma.settings import Settings

BASE = Settings(width=64, height=64)


def make(*rows, seeds=(), name=None):
    return make_pictures(
        [Row(number, given) for number, given in enumerate(rows, 1)],
        lambda given: replace(BASE, **given),
        seeds,
        name,
    )


def files(*rows, **named):
    pictures, bad = make(*rows, **named)
    assert not bad
    return [picture.file for picture in pictures]


def test_each_picture_is_a_run_of_one():
    pictures, bad = make({"prompt": "a boat"}, {"prompt": "a house", "seed": 5, "count": 2})
    assert not bad
    assert [(one.row, one.settings.seed, one.settings.count) for one in pictures] == [
        (1, 0, 1),
        (2, 5, 1),
        (2, 6, 1),
    ]
    assert [one.file for one in pictures] == ["00001_a_boat", "00002_a_house_5", "00002_a_house_6"]


def test_seeds_multiply_the_rows():
    assert files({"prompt": "a"}, {"prompt": "b"}, seeds=(3, 4)) == [
        "00001_a_3",
        "00001_a_4",
        "00002_b_3",
        "00002_b_4",
    ]


def test_names_follow_a_pattern_or_a_column():
    assert files({"prompt": "a boat", "steps": 7}, name="{steps}_{seed:03}-{row}") == ["7_000-1"]
    assert files({"prompt": "a", "file": "my boat"}, {"prompt": "b"}) == ["my boat", "00002_b"]
    assert files({"prompt": "a", "file": "x", "count": 2}) == ["x_0", "x_1"]
    assert files({"prompt": "a", "file": "x"}, name="{file}_{width}") == ["x_64"]


@pytest.mark.parametrize("name", ["{promt}", "{prompt.__class__}", "{}", "{row", "{seed:q}"])
def test_a_pattern_that_cannot_be_filled_in(name):
    with pytest.raises(SigmaError, match="--name"):
        _, bad = make({"prompt": "a"}, name=name)
        raise SigmaError(say_bad(bad))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"prompt": ""}, "no prompt"),
        ({"prompt": "a", "steps": 0}, "steps is 0"),
        ({"prompt": "a", "count": 0}, "count is 0"),
        ({"prompt": "a", "seed": 2**64 - 1, "count": 2}, "not so many seeds"),
        *(
            ({"prompt": "a", "file": file}, "file's name")
            for file in ("../a", "a/b", "a\\b", ".hidden", "a.", "x" * 201, "a\0")
        ),
    ],
)
def test_bad_rows_are_told_apart(given, words):
    pictures, bad = make({"prompt": "a boat"}, given, {"prompt": "a house"})
    assert [one.row for one in pictures] == [1, 3] and [one.row for one in bad] == [2]
    with pytest.raises(SigmaError, match=words):
        raise SigmaError(bad[0].error)


@pytest.mark.parametrize("given", [{"seed": 1}, {"count": 2}])
def test_seeds_for_all_and_seeds_of_a_row(given):
    _, bad = make({"prompt": "a", **given}, seeds=(1, 2))
    assert "--seeds chooses the seeds" in bad[0].error


def test_a_message_lists_bad_rows_up_to_a_number():
    _, bad = make(*[{"prompt": ""}] * 30)
    assert say_bad(bad).startswith("row 1: it has no prompt; row 2: ") and say_bad(bad).endswith(
        "and 10 more"
    )


@pytest.mark.parametrize("rows, name", [(2, "same"), (2, "{steps}")])
def test_two_pictures_of_one_name(rows, name):
    with pytest.raises(SigmaError, match="Rows 1 and 2 would both be written to"):
        make(*[{"prompt": "a"}] * rows, name=name)
    with pytest.raises(SigmaError, match="Rows 1 and 2"):  # on a file system that does not tell case apart
        make({"prompt": "a", "file": "X"}, {"prompt": "a", "file": "x"})


def test_a_digest_is_of_all_settings():
    one, two, other = (make({"prompt": "a", "seed": seed})[0][0] for seed in (1, 1, 2))
    assert one.digest == two.digest != other.digest
