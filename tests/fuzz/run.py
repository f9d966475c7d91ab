"""Damaged files of every format that the pack reads, by the thousand: a failure is whatever a user would not
be told in a sentence.

    python tests/fuzz/run.py --seconds 60 --seed 0 [--format NAME] [--case N]

Each case is made of the seed, the format's name and its number, so that it can be made again. The cases run
in a process of their own: when one ends it, hangs or takes much memory, the next goes on in a new one.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import formats  # noqa: E402

LONGEST = 5.0  # seconds of one case
MOST_GROWTH = 500 * 2**20  # bytes
PATIENCE = 12.0  # times as long, for what waits and does no work; others may have the processor


@dataclass(frozen=True)
class Failure:
    """A case that did not end as it should, and how."""

    format: str
    number: int
    how: str


def run(cases: Iterable[tuple[str, int]], seed: int) -> Iterator[Failure | None]:
    """Run the cases one after the other; for each None, or how it failed."""
    left, folder = iter(cases), Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bases = formats.make_bases(folder / "bases")
            case = next(left, None)
            while case is not None:
                child = _Child(seed, folder, bases)
                while case is not None and child.is_alive:
                    yield child.run(*case)
                    case = next(left, None)
                child.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Child:
    """A process that runs cases until one of them ends it."""

    def __init__(self, seed: int, folder: Path, bases):
        self.pipe, other = multiprocessing.Pipe()
        started = multiprocessing.get_context("fork").Process(
            target=_serve, args=(other, self.pipe, seed, folder, bases), daemon=True
        )
        started.start()
        other.close()
        self.process, self.is_alive = started, True

    def run(self, name: str, number: int) -> Failure | None:
        self.pipe.send((name, number))
        begin, before, process = time.monotonic(), None, psutil.Process(self.process.pid)
        busy = sum(process.cpu_times()[:2])
        try:
            while not self.pipe.poll(0.05):
                memory = process.memory_info().rss
                before = memory if before is None else before
                if memory - before > MOST_GROWTH:
                    return self._failed(name, number, f"took {(memory - before) >> 20} MB")
                # Seconds of work, so that a busy machine is not taken for a hang; waiting has an end too.
                worked = sum(process.cpu_times()[:2]) - busy
                if worked > LONGEST or time.monotonic() - begin > PATIENCE * LONGEST:
                    return self._failed(name, number, f"went on for {time.monotonic() - begin:.0f} s")
            how = self.pipe.recv()
        except (EOFError, psutil.Error, ConnectionError):
            self.process.join(5)
            return self._failed(name, number, f"ended the process: {self.process.exitcode}")
        return Failure(name, number, how) if how else None

    def _failed(self, name: str, number: int, how: str) -> Failure:
        self.is_alive = False
        self.process.kill()
        return Failure(name, number, how)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe, asking, seed: int, folder: Path, bases) -> None:
    """Run each case that is asked for, and answer with how it failed, or "", until nobody asks any more."""
    import torch

    asking.close()  # the other end, so that this one is told when that process is gone
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    while True:
        try:
            name, number = pipe.recv()
        except EOFError:
            return
        where = folder / "case"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        pipe.send(attempt(name, number, seed, where, bases))


def attempt(name: str, number: int, seed: int, folder: Path, bases) -> str:
    """Make a case in the folder and read it; how that failed, or ""."""
    from pixart_sigma.errors import SigmaError

    random = Random(f"{seed}/{name}/{number}")
    read = formats.FORMATS[name](random, folder, bases)
    try:
        read()
    except (SigmaError, OSError):
        return ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        places = traceback.extract_tb(error.__traceback__)
        ours = [place for place in places if "pixart_sigma" in place.filename] or places
        return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {error!s:.200}"
    return ""


def main() -> int:
    """The status: 1 where anything failed."""
    parser = argparse.ArgumentParser(description="Damaged files of every format that the pack reads.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=formats.FORMATS, action="append")
    parser.add_argument("--case", type=int, help="this one alone, of each format")
    options = parser.parse_args()
    names = options.format or list(formats.FORMATS)
    numbers = count() if options.case is None else [options.case]
    end, done, failures = time.monotonic() + options.seconds, 0, []
    for failure in run(((name, number) for number in numbers for name in names), options.seed):
        done += 1
        if failure is not None:
            failures.append(failure)
            print(f"{failure.format} {failure.number}: {failure.how}", flush=True)
        if time.monotonic() > end:
            break
    print(f"{done} cases of {len(names)} formats with seed {options.seed}, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
