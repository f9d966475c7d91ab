"""Each writer is killed, and finds the disk full; `python tests/killing.py` does it more often."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot kill like this")
def test_each_writer_is_killed_and_leaves_the_old_whole_and_nothing_behind():
    # In a process of its own, of one thread: it forks.
    done = subprocess.run(
        [sys.executable, TESTS / "killing.py", "--times", "1", "--seed", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    killed = re.findall(r"killed 1 times, (\d) of them in mid-write: whole", done.stdout)
    assert len(killed) == 7 and "1" in killed, done.stdout
