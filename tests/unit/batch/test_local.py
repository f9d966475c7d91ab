import errno
import io
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from pixart_sigma.batch.folder import BatchFolder
from pixart_sigma.batch.local import most_together
from pixart_sigma.batch.work import Settled
from pixart_sigma.errors import SigmaError
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.files.writing import write_beside
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text.streaming import StreamedT5

from .conftest import BASE, Batches

ROWS = (
    "a boat",
    {"prompt": "a red house by the lake", "width": 96},
    {"prompt": "a boat", "seed": 3, "negative": "fog"},
    {"prompt": "two cats", "scheduler": "euler_ancestral", "steps": 3},
)
THREE_STAGES = ["text", "transformer", "vae"]


def test_each_model_is_loaded_once_and_released(batches):
    pipeline = batches.pipeline()
    batch = batches.run(*ROWS, pipeline=pipeline)
    assert batches.loads == THREE_STAGES and not batch.failed
    assert not pipeline.stages._held
    assert len(batches.files()) == len(batches.lines()) == len(ROWS)
    assert not any((batches.out / ".batch").glob("*/*"))  # nothing is left between the stages

    batches.loads.clear()
    batches.run(*ROWS)
    assert batches.loads == [] and len(batches.lines()) == len(ROWS)


def test_a_picture_is_what_generate_makes_of_its_settings(batches, small_pipeline_folder):
    batches.run(*ROWS)
    single = SigmaPipeline.from_path(small_pipeline_folder, Ways(device="cpu", t5_precision="fp32"))
    for line in batches.lines():
        path = batches.out / line["file"]
        result = single.generate(Settings.from_dict(line["settings"]))
        assert np.array_equal(np.asarray(result.images[0]), np.asarray(Image.open(path)))
        assert Metadata.read(path) == result.metadata


def test_pictures_do_not_depend_on_their_neighbours(batches, small_pipeline_folder, tmp_path):
    batches.run(*ROWS)
    other = Batches(small_pipeline_folder, tmp_path / "other")
    other.run(*reversed(ROWS), disk=1)  # a part for each picture
    # The last one's texts are those of others before it.
    assert other.loads == THREE_STAGES * 3 + ["transformer", "vae"]
    mine = {line["digest"]: line["sha256"] for line in batches.lines()}
    assert mine == {line["digest"]: line["sha256"] for line in other.lines()}


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral"])
def test_several_at_once_are_the_same_but_for_rounding(batches, small_pipeline_folder, tmp_path, scheduler):
    base = Settings.from_dict(BASE.as_dict() | {"scheduler": scheduler})
    rows = ("a boat", {"prompt": "two cats sleep on a warm window", "seed": 4}, "a boat", "a house")
    batches.run(*rows, base=base)
    together = Batches(small_pipeline_folder, tmp_path / "together")
    pipeline = together.pipeline()
    groups, draw = [], pipeline.denoise
    pipeline.denoise = lambda runs, *rest: groups.append(len(runs)) or draw(runs, *rest)
    together.run(*rows, base=base, pipeline=pipeline, together=3)
    assert groups == [3, 1] and len(batches.files()) == len(rows)
    for name in batches.files():
        one, other = (np.asarray(Image.open(at / f"{name}.png"), int) for at in (batches.out, together.out))
        assert abs(one - other).max() <= 1


def test_negative_prompts_may_differ_within_a_group(batches, small_pipeline_folder, tmp_path):
    rows = ({"prompt": "a boat", "negative": "fog"}, {"prompt": "a house", "negative": "low quality, blurry"})
    batches.run(*rows)
    together = Batches(small_pipeline_folder, tmp_path / "together")
    together.run(*rows, together=2)
    for name in batches.files():
        one, other = (np.asarray(Image.open(at / f"{name}.png"), int) for at in (batches.out, together.out))
        assert abs(one - other).max() <= 1


def test_two_rows_may_ask_for_the_same_picture(batches):
    batch = batches.run("a boat", "a boat", together=2)
    one, other = batches.files().values()
    assert one == other and not batch.failed


def test_what_did_not_fit_once_is_not_tried_for_each_picture(batches, monkeypatch):
    tried = []

    def guided(transformer, prompts, settings, in_turn, schedule):
        tried.append(in_turn)
        if not in_turn:
            raise torch.OutOfMemoryError
        return guide(transformer, prompts, settings, in_turn, schedule)

    monkeypatch.setattr("pixart_sigma.runs.guide", guided)
    assert not batches.run("a boat", "a house", "a cat").failed
    assert tried == [False, True, True, True]


def test_a_streamed_t5_is_read_once_for_all_texts(batches, small_pipeline_folder, tmp_path, monkeypatch):
    read = []
    together = StreamedT5.together

    def counting(self, *arguments, **named):
        read.append(len(arguments[0]))
        return together(self, *arguments, **named)

    batches.run("a boat", "a house", {"prompt": "two cats", "negative": "fog"})
    monkeypatch.setattr(StreamedT5, "together", counting)
    streamed = Batches(small_pipeline_folder, tmp_path / "streamed")
    counted = []
    batch = streamed.run(
        *("a boat", "a house", {"prompt": "two cats", "negative": "fog"}),
        pipeline=streamed.pipeline(t5_device="stream"),
        on_count=lambda *count: counted.append(count),
    )
    assert read == [5] and not batch.failed and counted[0] == (0, 3)
    assert streamed.loads == THREE_STAGES
    settled = [line["settings"] for line in streamed.lines()]
    assert settled == [line["settings"] for line in batches.lines()]
    for name, content in batches.files().items():
        one, other = Image.open(io.BytesIO(content)), Image.open(io.BytesIO(streamed.files()[name]))
        assert np.array_equal(np.asarray(one), np.asarray(other))


class Killed(BaseException):
    """In place of a kill: nobody catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after it"])
def test_a_batch_that_is_killed_goes_on(small_pipeline_folder, tmp_path, monkeypatch, after):
    rows = "a boat", {"prompt": "a house", "seed": 2}
    whole = Batches(small_pipeline_folder, tmp_path / "whole")
    whole.run(*rows)
    writes, limit = count(1), 0

    def killed(path, write):
        number = next(writes)
        if number == limit and not after:
            raise Killed
        write_beside(path, write)
        if number == limit:
            raise Killed

    for place in ("batch.folder", "text.embeddings", "batch.storage"):
        monkeypatch.setattr(f"pixart_sigma.{place}.write_beside", killed)
    for limit in range(1, 9):  # what all is made with, three texts, two latents, two pictures
        writes, batches = count(1), Batches(small_pipeline_folder, tmp_path / f"{limit}")
        with pytest.raises(Killed):
            batches.run(*rows)
        batches.run(*rows)
        assert batches.files() == whole.files()
        assert sorted(line["row"] for line in batches.lines()) == [1, 2]  # none twice


@pytest.mark.parametrize("place", ["text.embeddings", "batch.folder", "batch.storage"])
def test_a_full_disk_ends_the_batch_and_no_row(batches, monkeypatch, place):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    batches.run("a boat")
    with monkeypatch.context() as patched:
        patched.setattr(f"pixart_sigma.{place}.write_beside", full)
        with pytest.raises(OSError, match="No space left"):
            batches.run("a boat", "a house", "a cat")
    assert [line["row"] for line in batches.lines()] == [1]
    batches.run("a boat", "a house", "a cat")
    assert [line["row"] for line in batches.lines()] == [1, 2, 3]


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
@pytest.mark.parametrize("together", [1, 3])
def test_a_picture_that_fails_stops_no_other(batches, stage, together):
    pipeline = batches.pipeline()
    work = getattr(pipeline, stage)

    def failing(*arguments):
        seen = repr(arguments)
        if "bad" in seen or stage == "decode" and arguments[1].prompt == "bad":
            raise SigmaError("it is bad")
        return work(*arguments)

    setattr(pipeline, stage, failing)
    batch = batches.run("a boat", "bad", "a house", pipeline=pipeline, together=together)
    assert [picture.row for picture in batch.failed] == [2]
    assert {line["row"]: line.get("error", "") for line in batches.lines()} == {1: "", 2: "it is bad", 3: ""}
    assert not batches.run("a boat", "bad", "a house").failed  # tried again
    assert len(batches.files()) == 3


def test_pictures_that_were_removed_or_changed_are_made_again(batches):
    batches.run("a boat", "a house", "a cat")
    before = batches.files()
    first, second, _ = sorted(batches.out.glob("*.png"))
    first.unlink()
    second.write_bytes(b"something else")
    batches.loads.clear()
    batches.run("a boat", "a house", "a cat")
    assert batches.files() == before and len(batches.lines()) == 5


def test_damaged_latents_are_drawn_again(batches, monkeypatch):
    pipeline = batches.pipeline()
    pipeline.decode = None  # the batch ends there
    with pytest.raises(TypeError):
        batches.run("a boat", "a house", pipeline=pipeline)
    latents = sorted((batches.out / ".batch" / "latents").iterdir())
    latents[0].write_bytes(latents[0].read_bytes()[:-9])
    assert len(batches.run("a boat", "a house").failed) == 1
    assert not batches.run("a boat", "a house").failed
    assert len(batches.files()) == 2


def test_a_folder_of_another_batch_is_left_alone(batches):
    batches.run("a boat", "a house")
    before = batches.files()
    with pytest.raises(SigmaError, match="has another batch: its row 2 was drawn as 00002_a_house.png"):
        batches.run("a boat", "a castle", "a cat")
    assert batches.files() == before
    batches.run("a boat", "a house", "a cat")  # more rows are welcome
    assert len(batches.files()) == 3


def test_models_that_changed_are_refused(batches):
    batches.run("a boat")
    batches.made_with = {"dtype": "bf16"}
    with pytest.raises(SigmaError, match=r"made with another dtype \(fp32; now bf16\)"):
        batches.run("a boat", "a house")


def test_two_batches_in_one_folder(batches):
    (batches.out / ".batch").mkdir(parents=True)
    with FileLock(batches.out / ".batch" / "lock"), pytest.raises(SigmaError, match="Another batch works"):
        batches.run("a boat")
    batches.run("a boat")


@pytest.mark.parametrize("line", ["[]", "{}", "nothing", '{"row": "x", "seed": 1}'])
def test_another_manifest_is_left_alone(batches, line):
    batches.out.mkdir()
    manifest = batches.out / "manifest.jsonl"
    manifest.write_text(line + "\n")
    with pytest.raises(SigmaError, match="Line 1 .* is not of a batch"):
        batches.run("a boat")
    assert manifest.read_text() == line + "\n"


def test_an_unfinished_line_is_dropped(batches):
    batches.run("a boat", "a house")
    manifest = batches.out / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    batches.run("a boat", "a house")
    assert [line["row"] for line in batches.lines()] == [1, 2]
    manifest.write_text('{"row": 1, "se')
    assert BatchFolder(batches.out).manifest.read() == {} and manifest.read_bytes() == b""


def test_settings_that_cannot_run_are_known_beforehand(batches):
    settled = Settled(batches.pipeline())
    for _ in range(2):  # the second time from memory
        with pytest.raises(SigmaError, match="layer"):
            settled.settle(Settings("a boat", kv_compression="mean:2:99"))
    settings = settled.settle(Settings("a boat", seed=5))
    assert (settings.width, settings.height, settings.prompt, settings.seed) == (256, 256, "a boat", 5)


def test_how_many_go_together_is_what_a_budget_holds(batches):
    settings = Settings("a boat", width=256, height=256, binning=False)
    eight = batches.pipeline(budget=10e9).plan(replace(settings, count=8)).stages["transformer"].peak
    for budget, expected in ((eight, 8), (eight - 1, 4), (10e9, 32)):
        assert most_together(batches.pipeline(budget=budget), settings) == expected
