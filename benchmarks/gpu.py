"""What only a GPU can show, measured in one command at the published shapes, with random weights.

    python benchmarks/gpu.py [--device cuda] [--scale full] [--out gpu_figures] [--seconds 540] [--parts ...]
                             [--tests] [--folder FOLDER]

Each part runs in a process of its own with a time limit of its own; what it has measured by then stays, and a
part that fails is a row that says so. The most important come first, and all end within --seconds: made for
nine minutes on an H100 or H200. --tests runs tests/gpu before. Written to --out: figures.json, rows.md with
the rows of the README's memory table and a table for each part, and log.txt.

The models, 17 GB, are written to --folder, and read from there the next time; without it to a temporary one.
`--device cpu --scale tiny` tries all of it in a few minutes without a GPU. Exit status 1 if a part failed.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

PACK = Path(__file__).parents[1]
# In the order of importance, with the most seconds of each on an H200.
PARTS = {
    "models": 90,
    "limits": 170,
    "steps": 70,
    "stages": 100,
    "decodes": 40,
    "whole": 110,
    "in_host": 80,
    "forms": 80,
}
SLOWEST = 600  # of a busy machine's CPU, whatever the part
TEST_SECONDS = 200
LEAST = 10  # seconds that a part is begun with


def main() -> int:
    arguments = parse()
    if arguments.part:
        return run_part(arguments)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory(dir=roomy()) as temporary:
        folder = arguments.folder or Path(temporary)
        for name in ("rows.jsonl", "log.txt"):
            (out / name).unlink(missing_ok=True)
        if arguments.tests:
            run_tests(arguments, out, min(TEST_SECONDS, end - time.monotonic()))
        for part in arguments.parts:
            start_part(part, arguments, out, folder, end)
            write(arguments, out)
    failed = [row for row in read(out) if row.failed]
    print(f"{len(failed)} rows failed; the figures are in {out}")
    return 1 if failed else 0


def roomy() -> str | None:
    """RAM where there is plenty, as a folder: files of 17 GB are written and read there in seconds."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 60e9 else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, default=Path("gpu_figures"))
    parser.add_argument("--folder", type=Path, help="where the models are kept")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tests", action="store_true", help="run tests/gpu first")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # which this process is
    return parser.parse_args()


def start_part(part: str, arguments: argparse.Namespace, out: Path, folder: Path, end: float) -> None:
    """Run a part in a process of its own, and say so where it is stopped or ends in an error."""
    from gpu_parts.report import Report

    report, most = Report(part, out / "rows.jsonl"), PARTS[part] if arguments.scale == "full" else SLOWEST
    left = min(most, end - time.monotonic())
    if left < LEAST:
        report.add(part, None, failed="there was no time left")
        return
    print(f"== {part}, at most {left:.0f} s", flush=True)
    command = [sys.executable, __file__, "--part", part, "--device", arguments.device]
    command += ["--scale", arguments.scale, "--out", str(out), "--folder", str(folder)]
    start = time.monotonic()
    log = out / "log.txt"
    with log.open("a") as said:
        begun = said.tell()
        try:
            status = subprocess.run(command, cwd=PACK, stdout=said, stderr=said, timeout=left).returncode
        except subprocess.TimeoutExpired:
            status = None
    lines = log.read_bytes()[begun:].decode(errors="replace").strip().splitlines()
    print("\n".join(line for line in lines if line.startswith("|")), flush=True)
    if status is None:
        report.add(part, None, failed=f"it was stopped after {left:.0f} s")
    elif status:
        report.add(part, None, failed=f"it ended with {status}: {''.join(lines[-1:])[:300]}")
    report.add(f"{part}: all of it", time.monotonic() - start, "s")


def run_part(arguments: argparse.Namespace) -> int:
    import torch
    from gpu_parts.report import Report
    from gpu_parts.scale import SCALES, Job, write_models

    from pixart_sigma.devices import pick_device

    scale, report = SCALES[arguments.scale], Report(arguments.part, arguments.out / "rows.jsonl")
    if arguments.part == "models":
        write_models(scale, arguments.folder)
        return 0
    for name in ("diffusers", "transformers.models.t5.modeling_t5", "bitsandbytes"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # to count what is alive on a CPU, all objects are looked through: those of libraries never
    torch.manual_seed(0)
    job = Job(pick_device(arguments.device), scale, arguments.folder, report)
    importlib.import_module(f"gpu_parts.{arguments.part}").measure(job)
    return 0


def run_tests(arguments: argparse.Namespace, out: Path, seconds: float) -> None:
    """tests/gpu, in several processes; what they say goes to tests.log.txt as it comes."""
    from gpu_parts.report import Report

    report = Report("tests", out / "rows.jsonl")
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--device", arguments.device, "-v", "--tb=short"]
    command += ["-n", "4", "--dist", "loadfile", "-p", "no:cacheprovider", "--durations=15"]
    command += [f"--junit-xml={out / 'tests.xml'}"]
    with (out / "tests.log.txt").open("w") as said:
        try:
            status = subprocess.run(command, cwd=PACK, stdout=said, stderr=said, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
    lines = (out / "tests.log.txt").read_text(errors="replace").splitlines()
    print(
        "\n".join(line for line in lines if line.startswith(("FAILED", "ERROR", "E  ", "=")))[-6000:],
        flush=True,
    )
    passed = sum(" PASSED " in line for line in lines)
    report.add(
        "tests/gpu that passed", passed, "", failed="" if status == 0 else f"{passed} passed; {status}"
    )


def read(out: Path):
    from gpu_parts.report import read_rows

    return read_rows(out / "rows.jsonl")


def write(arguments: argparse.Namespace, out: Path) -> None:
    """All figures so far, as JSON and as tables."""
    import torch
    from gpu_parts.report import tables

    on_gpu = arguments.device.startswith("cuda") and torch.cuda.is_available()
    told = {"device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "a CPU"}
    told |= {"scale": arguments.scale, "torch": torch.__version__}
    for name in ("diffusers", "transformers", "bitsandbytes"):
        told[name] = importlib.metadata.version(name)
    rows = read(out)
    figures = {"measured": told, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    (out / "rows.md").write_text(tables(rows, told))


if __name__ == "__main__":
    sys.exit(main())
