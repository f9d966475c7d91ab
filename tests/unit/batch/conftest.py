import json

import pytest

from pixart_sigma.batch.folder import BatchFolder
from pixart_sigma.batch.local import LocalBatch
from pixart_sigma.batch.pictures import make_pictures
from pixart_sigma.batch.rows import Row
from pixart_sigma.batch.work import PictureWork, Settled
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways

BASE = Settings(width=64, height=64, steps=2, binning=False)
MADE_WITH = {"dtype": "fp32"}


class Batches:
    """Runs batches of rows with a pipeline that counts what it loads."""

    def __init__(self, folder, out):
        self.folder, self.out, self.loads = folder, out, []
        self.made_with = MADE_WITH

    def pipeline(self, **ways):
        found = SigmaPipeline.from_path(
            self.folder, Ways(**{"device": "cpu", "t5_precision": "fp32", "release": "keep"} | ways)
        )
        for name in ("text", "transformer", "vae"):
            stage = getattr(found, name)
            stage.load = self._counted(name, stage.load)
        return found

    def run(self, *rows, pipeline=None, base=BASE, **named):
        """Draws rows, each a dict or a prompt, and gives the finished `LocalBatch`."""
        pipeline = pipeline or self.pipeline()
        settled = Settled(pipeline)
        given = [Row(n, {"prompt": row} if isinstance(row, str) else row) for n, row in enumerate(rows, 1)]
        pictures, bad = make_pictures(given, lambda one: settled.settle(self._settings(base, one)))
        assert not bad, bad
        folder = BatchFolder(self.out)
        batch = LocalBatch(PictureWork(pipeline, settled), folder, **named)
        with folder.held(self.made_with):
            batch.run(folder.todo(pictures))
        return batch

    def files(self):
        """The bytes of each picture by its name."""
        return {path.stem: path.read_bytes() for path in self.out.glob("*.png")}

    def lines(self):
        return list(map(json.loads, (self.out / "manifest.jsonl").read_text().splitlines()))

    def _settings(self, base, given):
        return Settings.from_dict(base.as_dict() | given)

    def _counted(self, name, load):
        def counting(*arguments, **named):
            self.loads.append(name)
            return load(*arguments, **named)

        return counting


@pytest.fixture
def batches(small_pipeline_folder, tmp_path):
    return Batches(small_pipeline_folder, tmp_path / "out")
