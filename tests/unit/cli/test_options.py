"""What the terminal takes from a person: what is read, what is refused before anything is loaded, and what is
said of each option."""

import argparse
import io
import re
import sys

import numpy
import pytest
from PIL import Image

from pixart_sigma.cli.commands import main
from pixart_sigma.cli.option_groups import byte_count
from pixart_sigma.cli.options import make_parser
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.files.picture_files import write_picture

FAST = ("--steps", "2", "--size", "64x64", "--no-binning")


# What is read


@pytest.mark.parametrize(
    "text, size",
    [
        ("2GB", 2e9),
        ("2 gb", 2e9),
        ("8G", 8e9),
        ("1.5GiB", 1.5 * 2**30),
        ("500mb", 5e8),
        ("10KB", 1e4),
        ("1TB", 1e12),
    ],
)
def test_sizes_are_read_in_their_units(text, size):
    assert byte_count(text) == size


@pytest.mark.parametrize(
    "text", ["2048", "2e9", "GB", "0GB", "-1GB", "1B", "1GBB", "nan GB", "9" * 400 + "GB"]
)
def test_a_size_without_a_unit_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a number and its unit"):
        byte_count(text)


def test_a_random_seed_is_said_and_can_be_given_again(run):
    status, _, told = run("generate", "a star", *FAST, "--seed", "random", "--out", "a.png")
    seed = int(re.fullmatch(r"The seed is (\d+)\.\n", told)[1])
    assert status == 0 and Metadata.read("a.png").settings.seed == seed
    run("generate", "a star", *FAST, "--seed", "random", "--out", "b.png")
    assert Metadata.read("b.png").settings.seed != seed


@pytest.mark.parametrize(
    "options, words",
    [
        (["--seed", "x"], "'x' is no whole number; give one, or random"),
        (["--transformer", ""], "--transformer: it is empty"),
        (["--vae", " "], "--vae: it is empty"),
        (["--strength", "0.5"], "give that picture with --image"),
        (["--memory-report", "a star"], "put PROMPT before the option"),
        (["--out", "a.png", "--memory-report", "a.json", "--decode-budget", "50"], "'50' is no size"),
        (["--out", "-", "--count", "2"], "--out - is for one picture"),
        (["--out", "-", "--memory-report"], "--out - is for one picture"),
    ],
)
def test_a_mistake_is_known_before_anything_is_loaded(run, monkeypatch, options, words):
    monkeypatch.setattr("pixart_sigma.pipeline.SigmaPipeline.from_path", lambda *_, **__: 1 / 0)
    status, out, err = run("generate", "a star", *options)
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1


def test_two_files_of_one_name_are_refused(run, tmp_path):
    (tmp_path / "same.json").touch()
    (tmp_path / "plot.png").symlink_to("same.json")
    for options in (
        ("generate", "a star", "--out", "plot.png", "--memory-report", "same.json"),
        ("calibrate", "--out", "plot.png", "--plot", "./plot.png"),
    ):
        status, _, err = run(*options)
        assert status == 2 and "would both write" in err


def test_every_option_says_what_it_is_for():
    commands = next(
        action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"
    assert "random" in commands.choices["generate"].format_help()


# Where pictures go


def test_pictures_that_nobody_named_get_the_next_name(run, tmp_path):
    names = [run("generate", "a star", *FAST, "--seed", seed)[1].strip() for seed in range(3)]
    assert names == ["picture.png", "picture_2.png", "picture_3.png"]
    assert [Metadata.read(name).settings.seed for name in names] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_picture_goes_to_standard_output(run, monkeypatch):
    assert run("generate", "a star", *FAST, "--out", "a.png")[0] == 0
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["generate", "a star", *FAST, "--out", "-"]) == 0
    with open("a.png", "rb") as file:
        assert out.buffer.getvalue() == file.read()


def test_each_of_several_pictures_says_which_it_is(run):
    assert run("generate", "a star", *FAST, "--count", 2, "--out", "a.png")[0] == 0
    assert [Metadata.read(f"a_{number}.png").index for number in (1, 2)] == [1, 2]
    status, out, told = run("generate", "--like", "a_2.png", "--out", "b.png")
    assert status == 0 and out == "b_1.png\nb_2.png\n" and "picture 2 of 2, which are all made again" in told
    assert run("generate", "a star", *FAST, "--out", "c.png")[0] == 0
    assert Metadata.read("c.png").index == 0


def test_a_picture_that_cannot_be_written_keeps_no_other_from_it(run, tmp_path, monkeypatch):
    def failing(path, *rest, **named):
        if path.name == "a_1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return write_picture(path, *rest, **named)

    monkeypatch.setattr("pixart_sigma.cli.output.write_picture", failing)
    status, out, err = run("generate", "a star", *FAST, "--count", 3, "--out", "a.png")
    assert status == 2 and out == "a_2.png\na_3.png\n" and "a_1.png" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_2.png", "a_3.png"]


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "sa_solver", "dpmpp_2m"])
def test_the_first_of_several_is_the_one_alone(run, scheduler):
    """Each has its own noise in each step; several at once differ by rounding."""
    drawn = ("generate", "a star", *FAST, "--scheduler", scheduler, "--steps", 4)
    run(*drawn, "--count", 2, "--out", "two.png")
    run(*drawn, "--out", "one.png")
    one, first, second = (
        numpy.asarray(Image.open(name), int) for name in ("one.png", "two_1.png", "two_2.png")
    )
    assert abs(one - first).max() <= 1 and abs(first - second).max() > 20


def test_a_picture_that_is_enlarged_is_said_to_be(run, monkeypatch):
    status, _, told = run("plan", "--budget", "8GB", "--model", "demo", "--size", "1024x1024")
    assert status == 0 and "1024x1024 is made at 256x256" in told and "enlarged" in told
    assert run("plan", "--budget", "8GB", "--model", "demo", "--size", "300x300")[2] == ""
