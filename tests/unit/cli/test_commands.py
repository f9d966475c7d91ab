import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
from PIL import Image

from pixart_sigma.cli import commands as cli
from pixart_sigma.cli.options import make_parser

QUICK = ["--steps", "1", "--device", "cpu", "--t5-precision", "fp32"]


@pytest.fixture
def generate(pipeline_folder, tmp_path, capsys):
    """Runs `pixart-sigma generate` on the tiny pipeline at 64 px -> (status, stdout, stderr)."""

    def run(*options, prompt="a boat"):
        status = cli.main(
            ["generate", prompt, "--model", str(pipeline_folder), "--size", "64x64", "--no-binning"]
            + QUICK
            + ["--out", str(tmp_path / "picture.png"), *map(str, options)]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def assert_mistake(result, *words):
    status, _, err = result
    assert status == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith("pixart-sigma: ") and "Traceback" not in err
    for word in words:
        assert word in line


def test_a_picture_carries_its_settings(generate, tmp_path):
    status, out, _ = generate("--seed", 5, "--negative", "blurry", "--kv-compression", "mean:2:all")
    assert status == 0 and out.strip() == str(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (64, 64)
        settings = json.loads(picture.text["pixart_sigma"])
    assert settings["prompt"] == "a boat" and settings["seed"] == 5 and settings["negative"] == "blurry"
    assert settings["kv_compression"] == "mean:2:all"


def test_the_same_seed_makes_the_same_file(generate, tmp_path):
    pictures = []
    for _ in range(2):
        generate("--seed", 5)
        pictures.append((tmp_path / "picture.png").read_bytes())
    generate("--seed", 6)
    assert pictures[0] == pictures[1] != (tmp_path / "picture.png").read_bytes()


def test_count_numbers_the_files(generate, tmp_path):
    assert generate("--count", 2)[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["picture_1.png", "picture_2.png"]


def test_image_to_image(generate, tmp_path):
    Image.new("RGB", (80, 50), "red").save(tmp_path / "from.png")
    assert generate("--image", tmp_path / "from.png", "--strength", "0.5", "--steps", "2")[0] == 0
    assert (tmp_path / "picture.png").exists()


def test_memory_report_as_a_table_and_as_json(generate, tmp_path):
    _, out, _ = generate("--memory-report")
    assert "text encoder" in out and "VAE decode" in out
    assert generate("--memory-report", tmp_path / "report.json", "--no-embedding-cache")[0] == 0
    stages = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert set(stages) == {"text encoder", "transformer", "VAE decode"}
    for stage in stages.values():
        assert set(stage) == {"before", "peak", "after", "weights", "loaded", "freed", "seconds"}
        assert stage["peak"] >= stage["weights"] > 0


@pytest.mark.parametrize(
    "options, words",
    [
        (("--size", "0x64"), ["width is 0"]),
        (("--size=-64x64",), ["width is -64"]),
        (("--size", "9000x64"), ["9000"]),
        (("--size", "big"), ["'big'"]),
        (("--steps", "0"), ["--steps is 0"]),
        (("--guidance", "nan"), ["--guidance is nan"]),
        (("--count", "0"), ["--count is 0"]),
        (("--seed", "-1"), ["--seed is -1"]),
        (("--timesteps", "a,b"), ["'a,b'"]),
        (("--aspect", "16:9"), ["--size", "--aspect"]),
        (("--scheduler", "magic"), ["magic"]),
        (("--recipe", "lcm-2"), ["--recipe is lcm-2", "leave --steps out"]),
        (("--kv-compression", "mean:0:all"), ["0"]),
        (("--device", "toaster"), ["toaster"]),
        (("--image", "nowhere.png", "--steps", "2"), ["nowhere.png"]),
        (("--model", "/nowhere"), ["/nowhere"]),
        (("--out", "/nowhere/picture.png"), ["/nowhere"]),
        (("--steps", "many"), ["--steps", "many"]),
        (("--colour", "red"), ["--colour"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(generate, tmp_path, options, words):
    assert_mistake(generate(*options), *words)
    assert not list(tmp_path.glob("*.png"))


def test_an_unreadable_picture_is_named(generate, tmp_path):
    (tmp_path / "from.png").write_text("no picture")
    assert_mistake(generate("--image", tmp_path / "from.png", "--steps", "2"), "from.png")


def test_a_folder_is_no_file_of_embeddings(encode, tmp_path):
    (tmp_path / "folder").mkdir()
    assert_mistake(encode("--out", tmp_path / "folder"), "folder")


def test_an_unwritable_folder_is_known_before_anything_is_loaded(generate, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    monkeypatch.setattr("pixart_sigma.pipeline.SigmaPipeline.from_path", lambda *a, **k: 1 / 0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        result = generate("--out", locked / "picture.png")
    finally:
        if user == 0:
            os.seteuid(0)
    assert_mistake(result, "locked")


def test_a_full_disk_leaves_no_half_picture_and_keeps_the_old_one(generate, tmp_path, monkeypatch):
    generate()
    old = (tmp_path / "picture.png").read_bytes()

    def full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert_mistake(generate("--seed", 9), "No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert (tmp_path / "picture.png").read_bytes() == old


def test_an_interrupt_is_status_130_and_writes_nothing(generate, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pixart_sigma.runs.denoise", interrupt)
    status, _, err = generate()
    assert status == 130 and "Interrupted; nothing was written." in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_words_that_were_cut_are_reported(generate):
    status, _, err = generate(prompt="boat " * 400)
    assert status == 0
    assert "cut" in err and "boat" in err


@pytest.fixture
def encode(pipeline_folder, tmp_path, capsys):
    """Runs `pixart-sigma encode` on the tiny pipeline -> (status, stdout, stderr)."""

    def run(*options, prompt="A Boat"):
        status = cli.main(
            ["encode", prompt, "--model", str(pipeline_folder), "--device", "cpu", "--t5-precision", "fp32"]
            + ["--out", str(tmp_path / "prompt.safetensors"), *map(str, options)]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def draw_embeddings(pipeline_folder, tmp_path, capsys):
    """Runs `pixart-sigma generate --embeddings` -> (status, stdout, stderr)."""

    def run(file, *options):
        status = cli.main(
            ["generate", "--embeddings", str(file), "--model", str(pipeline_folder), "--size", "64x64"]
            + ["--no-binning", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "again.png")]
            + list(map(str, options))
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_encoded_prompts_draw_the_same_picture(generate, encode, draw_embeddings, tmp_path, monkeypatch):
    assert generate("--negative", "blurry", "--no-embedding-cache", prompt="A Boat")[0] == 0
    status, out, _ = encode("--negative", "blurry")
    assert status == 0 and out.strip() == str(tmp_path / "prompt.safetensors")
    monkeypatch.setattr("pixart_sigma.text.encoder.TextEncoder.load", lambda *_, **__: 1 / 0)
    assert draw_embeddings(tmp_path / "prompt.safetensors")[0] == 0
    with Image.open(tmp_path / "picture.png") as direct, Image.open(tmp_path / "again.png") as again:
        assert direct.tobytes() == again.tobytes()
        assert direct.text == again.text


def test_a_prompt_seen_before_needs_no_t5_and_the_cache_can_be_left_out(
    generate, encode, cache_home, monkeypatch
):
    kept = cache_home / "pixart_sigma" / "embeddings"
    assert generate("--no-embedding-cache")[0] == encode("--no-embedding-cache")[0] == 0
    assert not kept.exists()
    assert generate("--seed", 1)[0] == 0
    assert len(list(kept.iterdir())) == 2
    monkeypatch.setattr("pixart_sigma.text.encoder.TextEncoder.load", lambda *_, **__: 1 / 0)
    assert generate("--seed", 2)[0] == encode(prompt="a boat")[0] == 0
    with pytest.raises(ZeroDivisionError):
        generate("--seed", 3, "--no-embedding-cache")


def test_a_cache_that_cannot_be_written_is_one_line(encode, cache_home, tmp_path, caplog):
    (cache_home / "pixart_sigma").write_text("in the way")
    assert encode("--negative", "a house")[0] == 0 and (tmp_path / "prompt.safetensors").is_file()
    (told,) = (message for message in caplog.messages if "not cached" in message)
    assert str(cache_home) in told and "\n" not in told and "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "options, words",
    [
        (("--negative", "blurry"), ["--embeddings", "--negative"]),
        (("a boat",), ["--embeddings", "PROMPT"]),
        (("--t5-precision", "int8", "--clean-caption"), ["--clean-caption and --t5-precision"]),
        (("--max-sequence-length", 77), ["leave --max-sequence-length out"]),
        ((), ["nowhere.safetensors"]),
    ],
)
def test_a_mistake_with_embeddings_is_one_line(draw_embeddings, tmp_path, options, words):
    assert_mistake(draw_embeddings(tmp_path / "nowhere.safetensors", *options), *words)


def test_a_prompt_may_come_after_the_options(tmp_path):
    out = tmp_path / "nowhere" / "picture.png"
    arguments = make_parser().parse_args(["generate", "--steps", "3", "--out", str(out), "a boat"])
    assert (arguments.prompt, arguments.steps, arguments.embeddings) == ("a boat", 3, None)


def test_neither_a_prompt_nor_embeddings(tmp_path, capsys):
    assert cli.main(["generate", "--out", str(tmp_path / "picture.png")]) == 2
    assert "PROMPT" in capsys.readouterr().err


def test_a_damaged_file_and_one_of_another_model_are_named(encode, draw_embeddings, tmp_path):
    file = tmp_path / "prompt.safetensors"
    encode()
    assert_mistake(draw_embeddings(file, "--model", "demo"), "64 wide", "128")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert_mistake(draw_embeddings(file), "prompt.safetensors", "damaged")
    assert not list(tmp_path.glob("*.png"))


def test_the_demos_tokenizer_is_not_used_for_another_encoder(pipeline_folder, tmp_path, capsys):
    shutil.copytree(pipeline_folder / "text_encoder", tmp_path / "alone" / "t5")
    out = ["--device", "cpu", "--out", str(tmp_path / "prompt.safetensors")]
    assert cli.main(["encode", "a boat", "--text-encoder", str(tmp_path / "alone" / "t5"), *out]) == 2
    assert "No tokenizer for the 384 tokens" in (err := capsys.readouterr().err) and "--tokenizer" in err


def test_an_embedding_in_a_prompt_is_not_encoded_as_its_letters(generate, monkeypatch):
    monkeypatch.setattr("pixart_sigma.memory.stages.Stages.run", lambda *_: 1 / 0)
    for option in ((), ("--negative", "ugly embedding:Bad, (embedding:Worse:1.2)")):
        prompt = "a boat" if option else "a boat embedding:My-Style"
        assert_mistake(
            generate(*option, prompt=prompt), "'embedding:", "only in ComfyUI", "Save Σ Prompt Embeddings"
        )


def test_a_guessed_variant_is_told_on_stderr(generate, diffusers_file, capsys):
    status, out, err = generate("--transformer", diffusers_file)
    line = next(line for line in err.splitlines() if line.startswith("Nothing says"))
    assert status == 0 and "tiny_diffusers.safetensors" in line and "--variant" in line
    assert err.count("Nothing says") == 1 and "Nothing" not in out
    assert "Nothing says" not in generate("--transformer", diffusers_file, "--variant", "1024")[2]
    assert "Nothing says" not in generate()[2]
    plan = ["plan", "--model", str(diffusers_file.parent), "--budget", "2GB", "--variant", "512", "--json"]
    assert make_parser().parse_args(plan).variant == "512"


def test_a_transformer_that_is_called_as_few_step_weights_is_told_on_stderr(
    generate, diffusers_file, tmp_path
):
    named = shutil.copy(diffusers_file, tmp_path / "nitro-512.safetensors")
    status, _, err = generate("--transformer", named)
    assert status == 0 and "nitro-512.safetensors seems to be made for few steps: --recipe one-step" in err
    assert "--recipe" not in generate("--transformer", named, "--scheduler", "one_step")[2]
    assert "--recipe" not in generate()[2]


def test_inspect_says_what_it_is(pipeline_folder, capsys):
    assert cli.main(["inspect", str(pipeline_folder)]) == 0
    assert "1024" in capsys.readouterr().out


def test_inspect_names_what_cannot_be_read(tmp_path, capsys):
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    assert cli.main(["inspect", str(tmp_path / "page.safetensors")]) == 2
    assert "page.safetensors" in capsys.readouterr().err


def test_quantize_t5_makes_a_folder_that_generates(generate, pipeline_folder, tmp_path, capsys):
    assert cli.main(["quantize-t5", str(pipeline_folder / "text_encoder"), str(tmp_path / "t5")]) == 0
    status = cli.main(
        ["generate", "a boat", "--model", str(pipeline_folder), "--text-encoder", str(tmp_path / "t5")]
        + ["--size", "64x64", "--no-binning", "--steps", "1", "--device", "cpu"]
        + ["--out", str(tmp_path / "picture.png")]
    )
    assert status == 0
    with Image.open(tmp_path / "picture.png") as picture:
        assert json.loads(picture.text["pixart_sigma"])["ways"]["t5_precision"] == "int8"


def test_new_files_have_the_usual_permissions(generate, tmp_path):
    generate()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "picture.png").stat().st_mode) == 0o666 & ~mask


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for command in ("generate", "batch", "encode", "compare-t5", "inspect", "quantize-t5", "download"):
        assert command in out


@pytest.fixture
def unread():
    """A pipe to write to that nobody reads, as standard output after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("command, unbuffered", [("--help", ""), ("inspect", "1")])
def test_a_reader_who_leaves_early_is_no_error(pipeline_folder, unread, command, unbuffered):
    arguments = [pipeline_folder] if command == "inspect" else []
    done = subprocess.run(
        [sys.executable, "-m", "pixart_sigma", command, *arguments],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=unread,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(unread)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_who_leaves_early_does_not_stop_the_work(generate, tmp_path, monkeypatch, unread):
    with os.fdopen(unread, "w") as standard_output:
        monkeypatch.setattr(sys, "stdout", standard_output)
        assert generate("--count", 2)[0] == 0
    assert len(list(tmp_path.glob("*.png"))) == 2
