"""Drive a real ComfyUI with mixed graphs, interrupts, deleted models and `/free`, and see what it keeps.

    python benchmarks/soak.py --runs 500

From run 50 to the end its memory grows by less than 1 %, it has no more threads and open files than then,
nothing is left in its folder for temporary files, and the first picture comes out again bit for bit.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from host import PACK
from host import folder as host_folder

sys.path[:0] = [str(PACK), str(PACK / "tests")]
from prompts import WORKFLOWS, node, number, quick, to_prompt  # noqa: E402
from server import Server, with_the_demo  # noqa: E402

from pixart_sigma.files.writing import UNFINISHED  # noqa: E402

SETTLED = 50
GATE = 0.01
MORE = 4  # threads and open files, which a connection of the moment may add
# Minutes each, and not what a person runs a hundred times.
LEFT_OUT = {"calibrate_kv_compression", "compare_t5_precisions"}
FIRST = "demo_text_to_image"
COPIED = "short-lived"
# glibc keeps freed memory, more or less of it from run to run; so it gives back what is large at once.
TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Held:
    """What a server holds that has nothing to do and was told to free its models."""

    memory: int
    threads: int
    files: int

    def __str__(self) -> str:
        return f"{self.memory / 1e6:.1f} MB, {self.threads} threads, {self.files} open files"


@dataclass
class Soak:
    """A server, the prompts of the example workflows with the demo for their models, and what was done."""

    server: Server
    prompts: dict[str, dict]
    numbers: random.Random
    done: Counter = field(default_factory=Counter)

    def one(self) -> None:
        """One run, of a kind that chance decides."""
        kind = self.numbers.choices((self.draw, self.interrupt, self.delete, self.free), (12, 4, 1, 3))[0]
        self.done[kind.__name__] += 1
        kind()

    def draw(self) -> None:
        name, prompt = self.pick()
        run = self.server.run(prompt)
        assert run.status == "success", f"{name}: {run.error}"

    def interrupt(self) -> None:
        """At any moment: of a run that is over by then it changes nothing."""
        name, prompt = self.pick(steps=20)
        prompt_id = self.server.submit(prompt)
        time.sleep(self.numbers.uniform(0, 4))
        self.server.post("/interrupt", {"prompt_id": prompt_id})
        run = self.server.wait(prompt_id)
        interrupted = any(kind == "execution_interrupted" for kind, _ in run.messages)
        assert interrupted or run.status == "success", f"{name}: {run.error}"
        self.done["interrupted in mid-run"] += interrupted

    def delete(self) -> None:
        """A model that is deleted while it is used: the picture, or an error that names it."""
        model = self.server.base / "models" / "diffusion_models" / COPIED
        shutil.copytree(PACK / "pixart_sigma" / "demo" / "transformer", model)
        prompt = self.varied(self.prompts[FIRST])
        node(prompt, "PixArtSigmaLoadTransformer")["transformer"] = COPIED
        try:
            prompt_id = self.server.submit(prompt)
            time.sleep(self.numbers.uniform(0, 1))
        finally:
            shutil.rmtree(model)
        run = self.server.wait(prompt_id)
        assert run.status == "success" or COPIED in run.error, run.error

    def free(self) -> None:
        self.server.post("/free", {"unload_models": True, "free_memory": self.numbers.random() < 0.5})
        self.draw()

    def pick(self, steps: int = 2) -> tuple[str, dict]:
        name = self.numbers.choice(sorted(self.prompts))
        return name, self.varied(self.prompts[name], steps)

    def varied(self, prompt: dict, steps: int = 2) -> dict:
        """With seeds that the host has not cached."""
        prompt = quick(prompt, steps)
        for entry in prompt.values():
            if "seed" in entry["inputs"]:
                entry["inputs"]["seed"] = self.numbers.randrange(2**32)
        return prompt

    def first_picture(self) -> np.ndarray:
        """Always of the same prompt and seed, and made anew."""
        prompt = quick(self.prompts[FIRST], steps=4)
        for _ in range(10):  # the host forgets what it made when it comes to it
            self.server.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(1)
            run = self.server.run(prompt)
            assert run.status == "success", run.error
            if not run.cached:
                return self.server.pictures(run, number(prompt, "SaveImage"))[0]
        raise AssertionError("the host keeps what it was told to free")

    def held(self) -> Held:
        self.first_picture()  # what was last run is not compared
        self.server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(3)
        process = psutil.Process(self.server.process.pid)
        return Held(process.memory_info().rss, process.num_threads(), process.num_fds())


def leavings(base: Path) -> list[str]:
    """What is in the folder for temporary files, and half written ones anywhere."""
    there = [*(base / "temporary").iterdir(), *base.rglob(f"*{UNFINISHED}")]
    return sorted(str(path.relative_to(base)) for path in there)


def read_prompts(server: Server) -> dict[str, dict]:
    object_info = server.get("/object_info")
    prompts = {path.stem: to_prompt(path, object_info) for path in WORKFLOWS if path.stem not in LEFT_OUT}
    for prompt in prompts.values():
        with_the_demo(prompt)
    return prompts


def run(server: Server, runs: int, seed: int) -> int:
    """The exit status: 0 where all gates hold."""
    soak = Soak(server, read_prompts(server), random.Random(seed))
    first = soak.first_picture()
    settled_at = min(SETTLED, runs // 3)
    for done in range(1, runs + 1):
        soak.one()
        if done == settled_at:
            settled = soak.held()
        if done % SETTLED == 0 or done == settled_at:
            print(f"after run {done}: {soak.held()}", flush=True)
    end, left = soak.held(), leavings(server.base)
    same = np.array_equal(first, soak.first_picture())
    growth = end.memory / settled.memory - 1
    print(f"{runs} runs: " + ", ".join(f"{count} {kind}" for kind, count in soak.done.most_common()))
    print(f"after run {settled_at}: {settled}")
    print(f"at the end:   {end}: memory {growth:+.2%} (gate {GATE:.0%})")
    print(f"temporary files: {', '.join(left) or 'none'}")
    print(f"the first picture again: {'equal' if same else 'another'}")
    more = max(end.threads - settled.threads, end.files - settled.files)
    return 0 if same and not left and growth < GATE and more <= MORE else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help="default: 500")
    parser.add_argument("--seed", type=int, default=0, help="of what is run in which order (default: 0)")
    arguments = parser.parse_args()
    if arguments.runs < 6:
        parser.error("give at least 6 runs")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "temporary").mkdir()
        os.environ |= TRIMMED | {"TMPDIR": str(base / "temporary")}  # of the server
        server = Server(host_folder(), base)
        try:
            return run(server, arguments.runs, arguments.seed)
        except Exception:
            print(server.log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
            raise
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
