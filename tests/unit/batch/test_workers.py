"""The workers of a batch on Ray, called in this process as Ray calls them in theirs."""

import json
from dataclasses import replace

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

pytest.importorskip("pyarrow", reason="pyarrow, which carries pictures between workers, is not installed")

from pixart_sigma.batch import ray_workers
from pixart_sigma.batch.folder import ENTRIES, BatchFolder
from pixart_sigma.batch.on_ray import RayBatch, in_order, rows_of_a_table
from pixart_sigma.batch.opening import Opening, made_with
from pixart_sigma.batch.pictures import Picture
from pixart_sigma.batch.ray_workers import SCHEMA, STAGES, EncodeWorker, Order, as_table
from pixart_sigma.batch.remote import RemoteFolder
from pixart_sigma.batch.work import Asked, PictureWork
from pixart_sigma.batch.workers import parse_pools
from pixart_sigma.errors import SigmaError
from pixart_sigma.prompt_embeds import Encoded
from pixart_sigma.run_inputs import Prompted
from pixart_sigma.settings import Settings, Ways

from .conftest import Batches

ROWS = ("a boat", "a house", {"prompt": "a boat", "seed": 3, "negative": "fog"})


@pytest.fixture
def opening(small_pipeline_folder):
    return Opening({"path": str(small_pipeline_folder)}, Ways(device="cpu", t5_precision="fp32"))


@pytest.fixture
def order(opening, tmp_path):
    return Order(opening, made_with(opening.open()), str(tmp_path / "out"), threads=torch.get_num_threads())


@pytest.fixture
def drawn(batches, small_pipeline_folder, tmp_path):
    """What the local driver makes of ROWS: its pictures, and their lines of the manifest."""
    local = Batches(small_pipeline_folder, tmp_path / "local")
    batch = local.run(*ROWS)
    lines = local.lines()
    found = [Picture(one["row"], Settings.from_dict(one["settings"]), one["file"][:-4]) for one in lines]
    assert not batch.failed
    return found, lines


def through(order, pictures, *stages):
    """The rows that come out of the last stage."""
    table = as_table(pictures)
    for stage in stages or STAGES:
        table = stage(order)(table)
        assert table.schema == SCHEMA
    return table.to_pylist()


def without_seconds(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_workers_make_the_same_files_and_lines_as_the_local_driver(order, drawn, tmp_path):
    pictures, lines = drawn
    rows = through(order, pictures)
    assert not any(row["error"] or row["fatal"] for row in rows)
    assert without_seconds(json.loads(row["carried"]) for row in rows) == without_seconds(lines)
    for line in lines:
        written = (tmp_path / "out" / line["file"]).read_bytes()
        assert written == (tmp_path / "local" / line["file"]).read_bytes()


def test_several_go_through_the_transformer_at_once(order, drawn, monkeypatch):
    groups = []

    def counting(self, group, asked):
        groups.append(len(group))
        return draw(self, group, asked)

    draw = PictureWork._draw
    monkeypatch.setattr(PictureWork, "_draw", counting)
    rows = through(replace(order, together=3), drawn[0])
    assert groups == [3] and not any(row["error"] for row in rows)


def test_what_is_between_the_stages_is_exact(order, drawn):
    """Embeddings travel trimmed, and no wider than the transformer reads them."""
    width = order.opening.open().checkpoint.config.caption_channels
    embeds = torch.randn(1, 5, width)
    asked = Asked(Prompted(Encoded(embeds, "words"), None, "sha", "mine"), {"t5_precision": "fp32"})
    back = Asked.from_bytes(asked.to_bytes(torch.float32))
    assert torch.equal(back.prompted.positive.prompt_embeds, embeds) and back.t5_ways == asked.t5_ways
    assert back.prompted.positive.truncated == "words" and back.prompted.tokenizer == "mine"
    half = asked.to_bytes(torch.bfloat16)
    assert torch.equal(Asked.from_bytes(half).prompted.positive.prompt_embeds, embeds.bfloat16())
    assert len(half) < 5 * width * 2 + 400
    narrow = Asked(Prompted(Encoded(embeds.half()), None, "sha"), {})
    assert (
        Asked.from_bytes(narrow.to_bytes(torch.float32)).prompted.positive.prompt_embeds.dtype == torch.half
    )


@pytest.mark.parametrize("content", [b"", b"nothing", 9 * b"\0"])
def test_what_is_damaged_between_the_stages_is_said(content):
    with pytest.raises(SigmaError, match="between two stages is damaged"):
        Asked.from_bytes(content)


def test_a_text_that_came_lately_is_not_encoded_again(order, drawn, monkeypatch):
    pictures, _ = drawn
    worker = EncodeWorker(order)
    table = as_table([replace(one, row=row) for row in range(3) for one in pictures])
    texts, stage = [], worker.work.pipeline.text
    load = stage.load

    def counting(*arguments):
        encoder = load(*arguments)
        encode_all = encoder.encode_all
        encoder.encode_all = lambda asked, *rest: texts.extend(asked) or encode_all(asked, *rest)
        return encoder

    stage.load = counting
    worker(table)
    worker(table)
    assert sorted(texts) == ["", "a boat", "a house", "fog"]


def test_a_worker_writes_no_picture_twice(order, drawn, monkeypatch):
    """As after the death of another one, whose table comes again."""
    pictures, _ = drawn
    first = through(order, pictures)
    monkeypatch.setattr(PictureWork, "finish", None)
    assert through(order, pictures) == first


def test_a_picture_that_fails_is_an_error_of_its_row(order, drawn, monkeypatch):
    pictures, _ = drawn
    bad = replace(pictures[1], settings=replace(pictures[1].settings, kv_compression="mean:2:99"))
    rows = through(order, [pictures[0], bad, pictures[2]])
    assert [bool(row["error"]) for row in rows] == [False, True, False] and "layer" in rows[1]["error"]
    assert rows[1]["carried"] == b"" and rows[0]["carried"]

    encode = PictureWork.encode

    def unforeseen(self, settings, cache):
        if settings.prompt == "a house":
            raise RuntimeError("nobody thought of it")
        return encode(self, settings, cache)

    monkeypatch.setattr(PictureWork, "encode", unforeseen)
    rows = through(order, pictures, EncodeWorker)
    done = [one.settings.prompt for one in pictures].index("a house")
    assert all(row["carried"] and not row["error"] for row in rows[:done])  # what was done is not lost
    assert {row["error"] for row in rows[done:]} == {"RuntimeError: nobody thought of it"}


def test_a_full_disk_is_no_error_of_a_row(order, drawn, monkeypatch):
    def full(self, name, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_workers.Storage, "write", full)
    rows = through(order, drawn[0])
    assert all("No space left on device" in row["fatal"] and not row["error"] for row in rows)


def test_a_machine_with_other_files_is_refused(order):
    other = replace(order, made_with=order.made_with | {"transformer (fingerprint)": "another"})
    with pytest.raises(SigmaError, match="has another transformer"):
        EncodeWorker(other)


def test_lines_that_nobody_took_are_collected(order, drawn, tmp_path):
    pictures, lines = drawn
    through(order, pictures[:2])
    entries = tmp_path / "out" / ENTRIES
    (entries / "9_9.json").write_text("{ half")
    folder = BatchFolder(tmp_path / "out")
    with folder.held({}):
        assert folder.todo(pictures) == pictures[2:]
    assert not list(entries.iterdir())
    assert without_seconds(map(json.loads, folder.manifest.path.read_text().splitlines())) == without_seconds(
        lines[:2]
    )


@pytest.fixture
def bucket():
    yield "memory://bucket/out"
    MemoryFileSystem.store.clear()


def test_a_batch_in_a_store_of_objects(order, drawn, bucket, monkeypatch):
    """The driver dies after one picture of three, and another goes on."""
    pictures, lines = drawn
    order = replace(order, out=bucket)
    with monkeypatch.context() as patched:
        patched.setattr(RemoteFolder, "_send", lambda self: None)  # killed before that
        with RemoteFolder(bucket).held({"dtype": "fp32"}):
            through(order, pictures[:1])
    with pytest.raises(SigmaError, match=r"memory://bucket/out were made with another dtype"):
        RemoteFolder(bucket).held({"dtype": "bf16"}).__enter__()

    folder = RemoteFolder(bucket)
    with folder.held({"dtype": "fp32"}):
        todo = folder.todo(pictures)
        assert todo == pictures[1:]
        for row in through(order, todo):
            folder.take(json.loads(row["carried"]))
    assert sorted(folder.storage.sizes()) == sorted([*(line["file"] for line in lines), "manifest.jsonl"])
    assert not folder.storage.sizes(ENTRIES)
    again = RemoteFolder(bucket)
    with again.held({"dtype": "fp32"}):
        assert again.todo(pictures) == []
    written = map(json.loads, again.storage.read("manifest.jsonl").splitlines())
    assert without_seconds(written) == without_seconds(lines)


@pytest.fixture
def driver(order, tmp_path, monkeypatch):
    """A `RayBatch` whose workers are in this process; `lost` are tables that Ray gives up."""
    lost = set()

    def rows(self, pictures):
        for picture in in_order(pictures):
            if picture.row not in lost:
                yield from through(order, [picture])

    monkeypatch.setattr(RayBatch, "_rows", rows)
    made = RayBatch(order, {}, BatchFolder(tmp_path / "out"))
    made.lost = lost
    return made


def test_what_a_dead_worker_took_along_is_an_error(driver, drawn):
    pictures, _ = drawn
    driver.lost.add(2)
    counted = []
    driver.on_count = lambda *count: counted.append(count)
    with driver.folder.held({}):
        driver.run(pictures)
        assert driver.failed == {pictures[1]} and counted == [(1, 3), (2, 3)]
        assert "its worker died, 4 times" in driver.folder.manifest.read()[2, 0].error
        driver.lost.clear()
        again = replace(driver)
        again.run(driver.folder.todo(pictures))
    assert not again.failed and not driver.folder.todo(pictures)


def test_a_full_disk_ends_the_batch(driver, drawn, monkeypatch):
    def full(self, name, content):
        raise OSError(28, "No space left on device")

    pictures, _ = drawn
    with driver.folder.held({}):
        with monkeypatch.context() as patched:
            patched.setattr(ray_workers.Storage, "write", full)
            with pytest.raises(SigmaError, match="No space left on device. The same command goes on"):
                driver.run(pictures)
        assert driver.folder.manifest.read() == {}
        driver.run(driver.folder.todo(pictures))
        assert not driver.folder.todo(pictures)


def test_pictures_alike_go_side_by_side():
    def picture(row, prompt, steps):
        return Picture(row, Settings(prompt, steps=steps), "")

    asked = ("a", 2), ("b", 3), ("a", 3), ("b", 2), ("a", 2)
    pictures = [picture(row, *one) for row, one in enumerate(asked)]
    assert [one.row for one in in_order(pictures)] == [0, 4, 3, 2, 1]


@pytest.mark.parametrize(
    "pictures, workers, together, rows", [(20, 4, 1, 2), (1, 4, 1, 1), (10**6, 64, 1, 16), (20, 4, 8, 8)]
)
def test_each_worker_gets_some_of_a_table(pictures, workers, together, rows):
    assert rows_of_a_table(pictures, workers, together) == rows


def test_pools_are_read():
    pools = parse_pools("transformer=2-8, vae=3", "t5=1,vae=0.25")
    assert {stage: (pool.least, pool.most, pool.gpus) for stage, pool in pools.items()} == {
        "t5": (1, 1, 1.0),
        "transformer": (2, 8, None),
        "vae": (3, 3, 0.25),
    }
    assert parse_pools(None, None)["t5"].most == 1


@pytest.mark.parametrize(
    "workers", ["", "t5", "dit=2", "t5=0", "t5=1,t5=2", "t5=5-2", "t5=-1", "t5=1.5", f"t5={10**8}"]
)
def test_pools_that_can_not_be_are_refused(workers):
    with pytest.raises(SigmaError, match="--workers"):
        parse_pools(workers, None)


def test_an_opening_holds_in_any_folder(small_pipeline_folder, monkeypatch):
    monkeypatch.chdir(small_pipeline_folder.parent)
    opening = Opening({"path": small_pipeline_folder.name, "transformer": "demo-kv", "vae": None}).absolute()
    assert opening.files == {"path": str(small_pipeline_folder), "transformer": "demo-kv", "vae": None}
