"""A few of the cases of `tests/fuzz/run.py`, always the same."""

import importlib.util
import os
from collections import deque
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "fuzz" / "run.py"
EACH = 2  # cases of each format; `.ci/run` takes a minute's worth, and whoever changes a reader more


@pytest.fixture(scope="module")
def fuzzer():
    spec = importlib.util.spec_from_file_location("fuzz_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the cases run in a fork")
def test_damaged_files_are_read_or_named(fuzzer):
    cases = [(name, number) for number in range(EACH) for name in fuzzer.formats.FORMATS]
    failures = list(fuzzer.run(cases, seed=0))
    assert len(failures) == len(cases) and not list(filter(None, failures))


@pytest.mark.skipif(os.name == "nt", reason="the cases run in a fork")
def test_what_falls_is_found(fuzzer, monkeypatch):
    """A case that raises, hangs, takes memory or ends the process, and the next one goes on."""

    def make(random, folder, bases):
        return {
            "raises": lambda: {}["x"],
            "hangs": lambda: deque(iter(int, 1), maxlen=0),
            "ends": lambda: os._exit(3),
            "fine": lambda: (folder / "nothing").read_bytes(),
        }[kind.pop(0)]

    kind = []
    monkeypatch.setattr(fuzzer, "LONGEST", 0.5)
    monkeypatch.setattr(fuzzer.formats, "make_bases", lambda folder: None)
    found = {}
    for name in ("raises", "hangs", "ends", "fine"):
        kind[:] = [name]
        monkeypatch.setitem(fuzzer.formats.FORMATS, name, make)
        found[name] = next(iter(fuzzer.run([(name, 0)], seed=0)))
    assert "KeyError at test_fuzz.py" in found["raises"].how and "went on for" in found["hangs"].how
    assert "ended the process: 3" in found["ends"].how and found["fine"] is None
