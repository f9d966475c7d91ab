"""What the terminal reads and writes: prompts from files, pictures and masks to start from, and where its
pictures go."""

import io
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy
import pytest
from PIL import Image

from pixart_sigma import PromptEmbeddings, __version__
from pixart_sigma.cli import output
from pixart_sigma.cli.checks import take_prompt
from pixart_sigma.cli.commands import main
from pixart_sigma.cli.options import make_parser
from pixart_sigma.cli.progress import progress
from pixart_sigma.files.metadata import Metadata

FAST = ("--steps", 2, "--size", "64x64", "--no-binning")


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing may be loaded."""
    monkeypatch.setattr("pixart_sigma.pipeline.SigmaPipeline.from_path", lambda *_, **__: 1 / 0)


@pytest.fixture
def say_to(monkeypatch):
    """Gives bytes to standard input."""

    def say(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return say


def assert_mistake(result, *words):
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(r"pixart-sigma: [^\n]*\n", err), err
    for word in words:
        assert word in err


# Where pictures go


def test_the_names_ending_says_what_is_written(run, tmp_path):
    said = {}
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")):
        assert run("generate", "a yellow star, 雪", *FAST, "--seed", 3, "--out", name) == (0, f"{name}\n", "")
        with Image.open(name) as picture:
            assert (picture.format, picture.size) == (kind, (64, 64))
        said[name] = Metadata.read(name)
    assert len({repr(one) for one in said.values()}) == 1
    for name in ("a.jpg", "a.webp"):
        assert run("generate", "--like", name, "--out", "again.png")[0] == 0
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("name", ["picture.gif", "picture", "picture.safetensors", "folder.png/.hidden"])
def test_another_ending_is_known_before_anything_is_loaded(run, tmp_path, unloaded, name):
    (tmp_path / "folder.png").mkdir()
    assert_mistake(run("generate", "a star", "--out", name), name, ".png, .jpg or .webp")
    assert_mistake(run("compare-t5", "a star", "--out", name), name, ".png, .jpg or .webp")
    assert_mistake(run("calibrate", "--plot", name), name, ".png, .jpg or .webp")


def test_a_folder_gets_new_files_named_after_the_prompt(run, tmp_path):
    (tmp_path / "there").mkdir()
    for folder in ("there", "made/now/"):
        for count, names in ((1, ["0001"]), (2, ["0002", "0003"])):
            status, out, _ = run("generate", "A yellow star!", *FAST, "--count", count, "--out", folder)
            folder = folder.rstrip("/")
            assert status == 0
            assert out.split() == [f"{folder}/a_yellow_star_{name}.png" for name in names]
        counts = [Metadata.read(path).settings.count for path in sorted((tmp_path / folder).iterdir())]
        assert counts == [1, 2, 2]  # nothing was overwritten


def test_a_folder_that_cannot_be_is_known_before_anything_is_loaded(run, tmp_path, unloaded):
    (tmp_path / "file").write_text("in the way")
    assert_mistake(run("generate", "a star", "--out", "file/"), "file is not a folder")
    assert_mistake(run("generate", "a star", "--out", "file/sub/"), "file is not a folder")


def test_a_full_disk_leaves_no_empty_file_in_a_folder(run, tmp_path, monkeypatch):
    def full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert_mistake(run("generate", "a star", *FAST, "--out", "new/"), "No space left")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("A red circle, on blue!", "a_red_circle_on_blue"),
        ("../../etc/passwd", "etc_passwd"),
        ("", "picture"),
        ("🦊 ...", "picture"),
        ("雪の中の狐", "雪の中の狐"),
        ("word " * 100, "word_word_word_word_word_word_word_word_word"),
        ("x" * 300, "x" * 48),
        ("CON", "con"),
    ],
)
def test_names_are_of_the_prompts_first_words(prompt, name):
    assert output.name_of(prompt) == name


def test_what_is_too_long_for_a_jpeg_is_said(run, tmp_path):
    _, out, err = run("generate", "word " * 15_000, *FAST, "--out", "long.jpg")
    assert out == "long.jpg\n" and "long.jpg does not say how it was made" in err


# Prompts


@pytest.mark.parametrize("content", ["a yellow 雪", "\ufeffa yellow 雪\r\n", "a yellow 雪\n\n"])
def test_a_prompt_of_a_file_or_of_standard_input_is_its_text(tmp_path, say_to, content):
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    say_to(content.encode())
    for source in (str(tmp_path / "prompt.txt"), "-"):
        arguments = make_parser().parse_args(["encode", "--prompt-file", source])
        take_prompt(arguments)
        assert arguments.prompt == "a yellow 雪"


def test_a_prompt_from_a_file_is_drawn_and_encoded(run, tmp_path, say_to):
    (tmp_path / "prompt.txt").write_text("a yellow star\n")
    assert run("encode", "--prompt-file", "prompt.txt", "--out", "star.safetensors")[0] == 0
    assert PromptEmbeddings.load("star.safetensors").positive_text == "a yellow star"
    say_to(b"a yellow star\n")
    assert run("generate", *FAST, "--prompt-file", "-", "--out", "star.png")[0] == 0
    assert Metadata.read("star.png").settings.prompt == "a yellow star"
    (tmp_path / "prompt.txt").write_text("a red star")
    assert run("generate", "--like", "star.png", "--prompt-file", "prompt.txt", "--out", "red.png")[0] == 0
    assert Metadata.read("red.png").settings.prompt == "a red star"


def test_prompts_that_cannot_be_read_are_named(run, tmp_path, unloaded, say_to):
    (tmp_path / "utf16.txt").write_text("a star", encoding="utf-16")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "model.bin").write_bytes(b"\0" * 2_000_000)
    for command in ("generate", "encode"):
        for file, words in (
            ("utf16.txt", "utf16.txt is not text in UTF-8"),
            ("empty.txt", "empty.txt holds no prompt"),
            ("model.bin", "model.bin is longer than 1 MB"),
            ("gone.txt", "gone.txt"),
            (".", "."),
        ):
            assert_mistake(run(command, "--prompt-file", file), words)
        say_to(b"\xff")
        assert_mistake(run(command, "--prompt-file", "-"), "standard input is not text in UTF-8")
        assert_mistake(run(command, "a star", "--prompt-file", "empty.txt"), "PROMPT and --prompt-file")
        assert_mistake(run(command), "PROMPT", "--prompt-file")
    (tmp_path / "prompt.txt").write_text("a star")
    beside = ("--embeddings", "gone.safetensors")
    assert_mistake(run("generate", "--prompt-file", "prompt.txt", *beside), "leave --prompt-file out")
    assert_mistake(run("calibrate", "--prompts", "utf16.txt"), "utf16.txt is not text in UTF-8")
    assert_mistake(run("compare-t5", "--prompts", "empty.txt"), "empty.txt holds no prompt")
    assert_mistake(run("compare-t5", "a star", "--prompts", "prompt.txt"), "PROMPT and --prompts")


def test_prompts_to_compare_from_standard_input(run, say_to):
    say_to(b"a yellow star\n\na red circle\n")
    status, out, _ = run("compare-t5", "--prompts", "-", "--precisions", "fp32,bf16", "--no-pictures")
    assert status == 0 and "a yellow star" in out and "a red circle" in out


# What cannot be is one line


@pytest.mark.parametrize(
    "options, words",
    [
        (("--device", "meta"), ["'meta'", "cannot be used here"]),
        (("--device", "no\x1b[2J"), ["cannot be used here"]),
        (("--count", 10**12), ["--count is 1000000000000", "4096"]),
        (("--negative", "a st\udcffar"), ["--negative", "UTF-8"]),
    ],
)
def test_a_place_a_count_or_a_text_that_cannot_be(run, options, words):
    assert_mistake(run("generate", "a star", *options), *words)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_anywhere_is_one_line(run, monkeypatch, error):
    def no_memory(*_, **__):
        raise error

    monkeypatch.setattr("pixart_sigma.inspection.describe", no_memory)
    assert_mistake(run("inspect", "model.safetensors"), "Memory ran out")


def test_another_runtime_error_is_a_fault_of_ours_and_shown_whole(run, monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("pixart_sigma.inspection.describe", fault)
    with pytest.raises(RuntimeError):
        run("inspect", "model.safetensors")


def test_names_that_a_terminal_cannot_write_are_spelled_out(run, monkeypatch):
    monkeypatch.setattr("pixart_sigma.inspection.describe", lambda *_: "made in 雪")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert main(["inspect", "model.safetensors"]) == 0
    assert written.getvalue() == b"made in \\u96ea\n"


def test_what_inspect_says_of_a_file_commands_no_terminal(run, monkeypatch):
    monkeypatch.setattr("pixart_sigma.inspection.describe", lambda *_: "made by \x1b[2J\nin 雪")
    assert run("inspect", "model.safetensors")[1] == "made by \\x1b[2J\nin 雪\n"


# What is said


def test_quiet_says_errors_and_what_was_asked_for(run):
    long = "boat " * 400
    assert "was cut" in run("generate", long, *FAST)[2]
    assert run("generate", long, *FAST, "--quiet") == (0, "picture_2.png\n", "")
    assert_mistake(run("generate", "a star", "--steps", 0, "--quiet"), "--steps is 0")
    assert_mistake(run("generate", "a star", "--model", "/nowhere", "--quiet"), "/nowhere")


def test_version():
    done = subprocess.run([sys.executable, "-m", "pixart_sigma", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pixart-sigma {__version__}\n", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_says_the_time_that_is_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress() as bar:
        bar.stage("transformer")
        time.sleep(0.11)
        bar.count(1, 4)
        bar.stage("VAE decode")
    said = sys.stderr.getvalue()
    assert re.search(r"\rtransformer \[00:00\]", said)
    assert re.search(r"\rtransformer: +25%.* 1/4 \[00:00<00:00,", said)
    assert said.index("25%") < said.index("VAE decode [00:00]")


def test_every_stage_has_a_bar_on_a_terminal_and_nothing_is_drawn_elsewhere(run, monkeypatch):
    made = (
        "generate",
        "a star",
        *FAST,
        "--decode",
        "strips",
        "--decode-budget",
        "6MB",
        "--no-embedding-cache",
    )
    assert run(*made)[2] == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    assert main(list(map(str, made))) == 0
    said = sys.stderr.getvalue()
    for stage in ("text encoder", "transformer", "VAE decode"):
        assert f"\r{stage} [" in said
    assert "Loading weights" not in said


# Pictures and masks to start from


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (80, 50), "red").save(tmp_path / "photo.png")
    half = Image.new("L", (80, 50), 0)
    half.paste(255, (0, 0, 40, 50))
    half.save(tmp_path / "half.png")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--mask", "half.png"), ["--image"]),
        (("--image", "photo.png", "--mask", "gone.png"), ["gone.png"]),
        (("--image", "photo.png", "--mask", "square.png"), ["50x50", "80x50"]),
        (("--image", "photo.png", "--mask", "black.png"), ["black everywhere"]),
        (("--image", "photo.png", "--mask", "page.png"), ["page.png is not a picture"]),
        (("--image", "cut.png"), ["cut.png is a damaged picture"]),
        (("--image", "float.tiff"), ["float.tiff holds grey from 0 to 300"]),
        (("--image", "."), ["directory"]),
    ],
)
def test_a_wrong_picture_or_mask_is_known_before_anything_is_loaded(
    run, tmp_path, photo, unloaded, options, words
):
    Image.new("L", (50, 50), 255).save(tmp_path / "square.png")
    Image.new("L", (80, 50), 0).save(tmp_path / "black.png")
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:100])
    Image.fromarray(numpy.array([[0, 300]], numpy.float32)).save(tmp_path / "float.tiff")
    assert_mistake(run("generate", "a star", *options), *words)


def test_a_picture_with_a_mask_says_so_and_is_made_again(run, tmp_path, photo):
    made = ("--image", "photo.png", "--mask", "half.png")
    assert run("generate", "a star", *FAST, *made, "--out", "a.png")[0] == 0
    said = Metadata.read("a.png")
    assert said.settings.strength == 1 and len(said.mask_sha256) == len(said.image_sha256) == 64
    status, _, err = run("generate", "--like", "a.png", "--image", "photo.png")
    assert status == 2 and "made with a mask" in err and "--mask" in err
    assert run("generate", "--like", "a.png", *made, "--out", "b.png") == (0, "b.png\n", "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    Image.new("L", (80, 50), 255).save(tmp_path / "half.png")
    status, _, err = run("generate", "--like", "a.png", *made, "--out", "b.png")
    assert status == 0 and "half.png is another mask than a.png was made with" in err
    assert Metadata.read("b.png") == replace(said, mask_sha256=Metadata.read("b.png").mask_sha256)


def test_strength_and_a_mask_work_together(run, photo):
    made = ("--image", "photo.png", "--mask", "half.png", "--strength", 0.5)
    assert run("generate", "a star", *FAST, *made)[0] == 0
    assert Metadata.read("picture.png").settings.strength == 0.5
    assert run("generate", "a star", *FAST, *made[:2])[0] == 0
    assert Metadata.read("picture_2.png").settings.strength == 0.6
