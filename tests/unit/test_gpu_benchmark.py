"""The benchmark for a GPU, which is seldom there, on the CPU: its parts run, what fails or lasts too long is
a row, and its figures are written."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The script, whose parts run in this process: each would take seconds to import what is here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # By its file: there is a folder of tests by the same name.
    found = spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
    gpu = module_from_spec(found)
    monkeypatch.setitem(sys.modules, found.name, gpu)
    found.loader.exec_module(gpu)

    def run(command, **_):
        monkeypatch.setattr(sys, "argv", command[1:])
        return SimpleNamespace(returncode=gpu.main())

    started = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu, "subprocess", started)  # in this script alone: others start programs too
    return gpu


def figures(gpu, monkeypatch, tmp_path, *parts) -> tuple[list[dict], str]:
    """The rows, and the tables, of a run of these parts."""
    given = ["--device", "cpu", "--scale", "tiny", "--out", tmp_path / "out", "--folder", tmp_path / "models"]
    monkeypatch.setattr(sys, "argv", [gpu.__file__, *map(str, given), "--parts", *parts])
    gpu.main()
    made = tmp_path / "out"
    return json.loads((made / "figures.json").read_text())["rows"], (made / "rows.md").read_text()


@pytest.mark.slow
def test_it_runs_and_writes_its_figures(gpu, monkeypatch, tmp_path):
    parts = ("models", "limits", "steps", "decodes")
    rows, tables = figures(gpu, monkeypatch, tmp_path, *parts)
    assert not [row for row in rows if row["failed"]]
    assert {row["part"] for row in rows} == set(parts)
    told = {row["what"]: row for row in rows}
    whole = told["64x64 within 0.03 GB: run"]
    assert 0 < whole["value"] and whole["ratio"] == whole["value"] / whole["predicted"]
    assert told["64x64, mean:2:all: a step"]["unit"] == "s"
    assert told["64x64, strips: most off the whole"]["value"] < 1e-4
    readme = next(line for line in tables.splitlines() if line.startswith("| 64x64 | 0.03 GB |"))
    assert "T5 in bf16: " in readme and "whole: " in readme


def test_what_fails_or_lasts_too_long_is_a_row(gpu, monkeypatch, tmp_path):
    """Without the models each figure fails; the parts after one that is stopped run all the same."""
    run = gpu.subprocess.run

    def stopped(command, **more):
        if "steps" in command:
            raise subprocess.TimeoutExpired(command, 1)
        return run(command, **more)

    monkeypatch.setattr(gpu.subprocess, "run", stopped)
    rows, tables = figures(gpu, monkeypatch, tmp_path, "steps", "stages")
    failed = {row["what"]: row["failed"] for row in rows if row["failed"]}
    assert "it was stopped after" in failed["steps"]
    assert len(failed) == 9 and all("T5 in" in what for what in failed.keys() - {"steps"})
    assert "**failed**: it was stopped" in tables
