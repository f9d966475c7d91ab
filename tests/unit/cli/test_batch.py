import json
import sys

import pytest
from PIL import Image

from pixart_sigma.batch.local import LocalBatch
from pixart_sigma.cli import commands as cli
from pixart_sigma.errors import SigmaError
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.pipeline import SigmaPipeline


@pytest.fixture
def batch(small_pipeline_folder, tmp_path, capsys):
    """Runs `pixart-sigma batch` on rows, written as text or as JSON lines, at 64 px
    -> (status, stdout, stderr)."""

    def run(*options, rows=("a boat", "a red house")):
        as_text = all(isinstance(row, str) for row in rows)
        path = tmp_path / ("rows.txt" if as_text else "rows.jsonl")
        path.write_text("\n".join(rows if as_text else map(json.dumps, rows)))
        status = cli.main(
            ["batch", str(path), "--model", str(small_pipeline_folder), "--out", str(tmp_path / "out")]
            + ["--size", "64x64", "--no-binning", "--steps", "1", "--device", "cpu", "--t5-precision", "fp32"]
            + list(map(str, options))
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_picture_for_each_row(batch, tmp_path):
    status, out, err = batch("--seeds", "3,4", "--format", "webp", "--contact-sheet")
    assert status == 0 and "4 pictures" in out and "4 pictures to draw" in err
    assert names(tmp_path / "out") == [
        "00001_a_boat_3.webp",
        "00001_a_boat_4.webp",
        "00002_a_red_house_3.webp",
        "00002_a_red_house_4.webp",
        "contact_sheet.jpg",
        "manifest.jsonl",
    ]
    made = Metadata.read(tmp_path / "out" / "00002_a_red_house_4.webp")
    assert (made.settings.prompt, made.settings.seed, made.settings.width) == ("a red house", 4, 64)
    with Image.open(tmp_path / "out" / "contact_sheet.jpg") as sheet:
        assert sheet.size == (2 * 192, 2 * 192)
    again = batch("--seeds", "3,4", "--format", "webp")
    assert again[0] == 0 and "4 of 4 pictures are there already" in again[2]


def test_a_row_goes_before_the_options(batch, tmp_path):
    rows = (
        {"prompt": "a", "size": "96x64", "seed": 1, "count": 2, "guidance": 1},
        {"prompt": "b", "aspect": "1:1"},
        {"prompt": "c", "recipe": "lcm-2"},
        {"prompt": "d", "steps": 2},
    )
    assert batch(rows=rows)[0] == 0
    lines = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    made = {line["file"]: line["settings"] for line in lines}
    first, second = made["00001_a_1.png"], made["00001_a_2.png"]
    assert first == second | {"seed": 1} and (first["width"], first["guidance_scale"]) == (96, 1)
    assert made["00002_b.png"]["width"] == made["00002_b.png"]["height"] == 256
    assert made["00003_c.png"]["recipe"] == "lcm-2" and made["00004_d.png"]["steps"] == 2


def test_all_bad_rows_are_told_before_a_model_is_loaded(batch, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("pixart_sigma.text.stage.TextStage.load", load)
    rows = ({"prompt": "a", "steps": 0}, {"prompt": "b"}, {"seed": 1}, {"prompt": "c", "kv_compression": "x"})
    status, _, err = batch(rows=rows)
    assert status == 2
    for words in ("row 1: steps is 0", "row 3: it has no prompt", "row 4: ", "--skip-bad"):
        assert words in err
    assert "row 2" not in err and not (tmp_path / "out").exists()


def test_bad_rows_are_set_aside_once(batch, tmp_path):
    rows = ({"prompt": "a", "steps": 0}, {"prompt": "b"})
    for _ in range(2):
        status, out, err = batch("--skip-bad", rows=rows)
        assert status == 1 and "1 pictures" in out and "1 failed" in err
    lines = list(map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()))
    assert [line["row"] for line in lines] == [1, 2] and "steps is 0" in lines[0]["error"]


def test_a_picture_that_fails_is_status_1(batch, monkeypatch):
    draw = SigmaPipeline.denoise

    def failing(self, runs, *rest):
        if runs[0].settings.prompt == "a boat":
            raise SigmaError("it is bad")
        return draw(self, runs, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(SigmaPipeline, "denoise", failing)
        status, out, err = batch()
    assert status == 1 and "1 pictures in" in out and "manifest.jsonl says why" in err
    assert batch()[0] == 0


def test_an_interrupt_says_how_to_go_on(batch, monkeypatch):
    def interrupted(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LocalBatch, "_decode", interrupted)
        status, _, err = batch()
    assert status == 130 and "0 of 2 pictures are there; the same command goes on." in err
    assert batch()[0] == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch-size", "auto"], "--budget"),
        (["--batch-size", "0"], "--batch-size is '0'"),
        (["--seeds", "4-2"], "--seeds is '4-2'"),
        (["--seeds", "1", "--count", "2"], "leave one of them out"),
        (["--name", "{nothing}"], "--name has the field {nothing}"),
        (["--name", "same"], "Rows 1 and 2"),
        (["--refiner", "x.safetensors", "--steps", "5", "--budget", "8GB"], "--budget"),
        (["--workers", "t5=2"], "--ray"),
        (["--ray", "local", "--workers", "dit=2"], "--workers is 'dit=2'"),
        (["--ray", "local", "--disk", "1GB"], "--disk"),
        (["--ray", "local", "--batch-size", "auto", "--budget", "8GB"], "--batch-size auto"),
    ],
)
def test_options_that_cannot_be(batch, tmp_path, options, words):
    status, _, err = batch(*options)
    assert status == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be(batch, tmp_path, capsys):
    assert cli.main(["batch", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "none.txt is no file" in capsys.readouterr().err
    (tmp_path / "out").write_text("a file")
    status, _, err = batch()
    assert status == 2 and "is a file; give a folder" in err


def test_a_store_of_objects_is_for_ray(batch):
    assert "only --ray writes there" in batch("--out", "memory://x")[2]
    assert "--contact-sheet" in batch("--out", "memory://x", "--ray", "local", "--contact-sheet")[2]


def test_without_ray_it_is_named(batch, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = batch("--ray", "local")
    assert status == 2 and "pip install 'pixart-sigma[ray]'" in err


def test_a_file_without_prompts(batch):
    status, _, err = batch(rows=("", " "))
    assert status == 2 and "has no row that can be drawn" in err


def test_a_budget_says_how_many_go_together(batch, monkeypatch):
    together = []
    run = LocalBatch.run
    monkeypatch.setattr(
        LocalBatch, "run", lambda self, todo: together.append(self.together) or run(self, todo)
    )
    assert batch("--budget", "4GB", "--batch-size", "auto")[0] == 0
    assert together == [32]
