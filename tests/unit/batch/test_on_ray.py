"""A batch on a Ray cluster of this machine, from the terminal."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed: pip install 'pixart-sigma[ray]'")

from pixart_sigma.batch.on_ray import cluster, fit
from pixart_sigma.batch.workers import parse_pools
from pixart_sigma.cli import commands as cli
from pixart_sigma.errors import SigmaError

PATIENCE = 240  # seconds


@pytest.fixture(autouse=True)
def no_network():
    """That of the other tests is left out: Ray's processes speak to each other."""


def command(folder, out, rows, *options):
    return [
        *("batch", str(rows), "--model", str(folder), "--out", str(out), "--size", "64x64", "--no-binning"),
        *("--steps", "2", "--device", "cpu", "--t5-precision", "fp32", *options),
    ]


def lines(out):
    """The manifest's lines by their row, without how long they took."""
    found = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    return {line.pop("row"): line | {"seconds": None} for line in found}


def workers_of(process, stage):
    """The processes of a stage's workers."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if stage in " ".join(child.cmdline())]


@pytest.fixture
def one_thread():
    """As many sum up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_ray_makes_what_the_local_driver_makes_though_a_worker_is_killed(
    small_pipeline_folder, tmp_path, one_thread
):
    rows = tmp_path / "rows.jsonl"
    prompts = [{"prompt": f"boat {number % 3}", "seed": number} for number in range(11)]
    prompts[4]["kv_compression"] = "mean:2:27"  # of a layer that the small model does not have
    rows.write_text("\n".join(map(json.dumps, prompts)))
    local, out = tmp_path / "local", tmp_path / "ray"
    assert cli.main(command(small_pipeline_folder, local, rows, "--skip-bad")) == 1

    on_ray = command(small_pipeline_folder, out, rows, "--skip-bad", "--ray", "local")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "pixart_sigma", *on_ray],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            end = time.monotonic() + PATIENCE
            while not (found := workers_of(process, "DenoiseWorker")):
                assert process.poll() is None and time.monotonic() < end, process.communicate()
                time.sleep(0.05)
            found[0].send_signal(signal.SIGKILL)
            said, told = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 1, told  # of the row that can not be drawn
    assert "10 pictures" in said and "1 failed" in told
    assert lines(out) == lines(local)
    for path in local.glob("*.png"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert not list((out / ".batch").glob("*/*"))


@pytest.mark.parametrize(
    "gpus, has, message",
    [
        (
            "transformer=1",
            {"CPU": 8},
            r"Ray has 0 GPUs, and the workers ask for 2 \(t5 1 x 0, ",
        ),
        (None, {"CPU": 8, "GPU": 3}, "Ray has 3 GPUs, and the workers ask for 4 "),
        (None, {"CPU": 4}, "Ray has 4 processors, into which 4 workers and Ray itself do not fit"),
    ],
)
def test_what_a_cluster_does_not_have_is_not_waited_for(gpus, has, message):
    with pytest.raises(SigmaError, match=message):
        fit(parse_pools("transformer=2", gpus), has)


def test_workers_share_the_gpus_that_there_are():
    found = fit(parse_pools("transformer=2", "t5=0.5,vae=0.5"), {"CPU": 8, "GPU": 3})
    assert {stage: pool.gpus for stage, pool in found.items()} == {"t5": 0.5, "transformer": 1, "vae": 0.5}
    assert {pool.gpus for pool in fit(parse_pools(None, None), {"CPU": 8}).values()} == {0}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_without_ray(address):
    with pytest.raises(SigmaError, match=f"No Ray answers at {address} "), cluster(address, {}):
        pytest.fail("it goes on")
