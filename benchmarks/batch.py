"""A batch of the demo's pictures with the same pictures one after the other, and what a batch costs beside
drawing.

    python benchmarks/batch.py [--count 64] [--steps 20] [--together 8] [--rows 10000] [--processes 8]

First come a few of the prompts by commands: a `pixart-sigma generate` for each, against one `pixart-sigma
batch` for all, imports included. Then, within this process, what is loaded is counted and CPU time compared:
the batch; a loop of `generate` that releases each model after its stage; and the batch with several pictures
in the transformer at once, whose pictures are then compared with those of one at a time. Last come many rows
whose stages do nothing: the CPU time of a row beside its picture, and by how much the process grows from a
tenth of them to the end.
Gates: three loads, equal pictures, growth of at most 20 MB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from pixart_sigma import DEMO, Settings, SigmaPipeline, Ways
from pixart_sigma.batch.folder import BatchFolder
from pixart_sigma.batch.local import LocalBatch
from pixart_sigma.batch.pictures import make_pictures
from pixart_sigma.batch.rows import Row
from pixart_sigma.batch.work import PictureWork, Settled
from pixart_sigma.prompt_embeds import Encoded
from pixart_sigma.run_inputs import Prompted

WORDS = [
    f"a {colour} {shape} {place}"
    for place in ("in the middle", "at the top", "at the bottom left", "at the right")
    for shape in ("circle", "square", "triangle", "star")
    for colour in ("red", "green", "blue", "yellow")
]
MOST_GROWTH = 20e6  # bytes


def open_demo(release: str) -> tuple[SigmaPipeline, list[str]]:
    """The demo, and a list of what it loads."""
    pipeline = SigmaPipeline.from_path(DEMO, Ways(device="cpu", t5_precision="fp32", release=release))
    loaded: list[str] = []

    def counted(name, load):
        return lambda *arguments, **named: loaded.append(name) or load(*arguments, **named)

    for name in ("text", "transformer", "vae"):
        stage = getattr(pipeline, name)
        stage.load = counted(name, stage.load)
    return pipeline, loaded


def draw(rows: list[dict], out: Path, pipeline: SigmaPipeline, **named) -> float:
    """CPU seconds of a batch."""
    start, settled = time.process_time(), Settled(pipeline)
    pictures, bad = make_pictures(
        [Row(number, row) for number, row in enumerate(rows, 1)],
        lambda given: settled.settle(Settings(**given)),
    )
    assert not bad, bad
    folder = BatchFolder(out)
    with folder.held({}):
        LocalBatch(PictureWork(pipeline, settled), folder, **named).run(folder.todo(pictures))
    return time.process_time() - start


def by_commands(rows: list[dict], base: Path) -> tuple[float, float]:
    """CPU seconds of a `generate` for each row, and of one `batch` for all."""
    command = [sys.executable, "-m", "pixart_sigma"]
    options = ["--device", "cpu", "--t5-precision", "fp32", "--steps", str(rows[0]["steps"])]

    def seconds() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    start = seconds()
    for row in rows:
        single = ["generate", row["prompt"], "--seed", str(row["seed"]), "--no-embedding-cache"]
        out = base / f"single_{row['seed']}.png"
        subprocess.run([*command, *single, "--out", str(out), *options], check=True, capture_output=True)
    between = seconds()
    listed = base / "rows.jsonl"
    listed.write_text("\n".join(json.dumps(row) for row in rows))
    subprocess.run(
        [*command, "batch", str(listed), "--out", str(base / "rows"), *options],
        check=True,
        capture_output=True,
    )
    return between - start, seconds() - between


def difference(one: Path, other: Path) -> tuple[float, int]:
    """The mean and the largest difference of the pictures of two folders, of 255."""
    pairs = [
        (np.asarray(Image.open(path), int), np.asarray(Image.open(other / path.name), int))
        for path in sorted(one.glob("*.png"))
    ]
    found = [abs(first - second) for first, second in pairs]
    return float(np.mean([each.mean() for each in found])), int(max(each.max() for each in found))


def without_work(rows: int, base: Path) -> tuple[float, float]:
    """CPU seconds for each of many rows whose stages do nothing, and the bytes by which the process grows."""
    pipeline, _ = open_demo("keep")
    embeds = Encoded(torch.zeros(1, 1, pipeline.checkpoint.config.caption_channels))
    blank = Image.new("RGB", (8, 8))
    pipeline.encode = lambda settings, ways, cache=None: (Prompted(embeds, embeds, "none"), ways)
    pipeline.denoise = lambda runs, ways: (torch.zeros(len(runs), 4, 8, 8), ways)
    pipeline.decode = lambda latents, settings, ways: ([blank], ways)
    process, sizes = psutil.Process(), []

    def look(done: int, total: int) -> None:
        if done in (total // 10, total):
            sizes.append(process.memory_info().rss)

    prompts = [{"prompt": f"{WORDS[number % len(WORDS)]}, {number}", "steps": 1} for number in range(rows)]
    seconds = draw(prompts, base / "many", pipeline, on_count=look)
    return seconds / rows, sizes[-1] - sizes[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--together", type=int, default=8)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=8)
    arguments = parser.parse_args()
    rows = [
        {"prompt": WORDS[number % len(WORDS)], "seed": number, "steps": arguments.steps}
        for number in range(arguments.count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        singles, one = by_commands(rows[: arguments.processes], base)
        print(
            f"{arguments.processes} pictures: {singles:.1f} s by commands of generate, {one:.1f} s by one of "
            f"batch, {one / singles:.2f} of it"
        )
        pipeline, loaded = open_demo("keep")
        batch = draw(rows, base / "one", pipeline)
        print(f"batch: {len(loaded)} loads, {batch:.1f} s of CPU time")

        single, loads_of_loop = open_demo("free")
        start = time.process_time()
        (base / "loop").mkdir()
        for path, row in zip(sorted((base / "one").glob("*.png")), rows, strict=True):
            single.generate(Settings(**row)).images[0].save(base / "loop" / path.name)
        loop = time.process_time() - start
        print(f"loop: {len(loads_of_loop)} loads, {loop:.1f} s; the batch takes {batch / loop:.2f} of it")
        _, most = difference(base / "one", base / "loop")

        together = draw(rows, base / "together", open_demo("keep")[0], together=arguments.together)
        mean, largest = difference(base / "one", base / "together")
        print(
            f"{arguments.together} at once: {together:.1f} s; its pictures differ by {mean:.4f} of 255 in "
            f"the mean, by {largest} at most"
        )
        seconds, growth = without_work(arguments.rows, base)
        each = f"{1e3 * seconds:.2f} ms a row, {growth / 1e6:.1f} MB of growth"
        print(f"{arguments.rows} rows without work: {each}")
    kept = len(loaded) == 3 and most == 0 and growth <= MOST_GROWTH
    print("all gates hold" if kept else "a gate fails")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
