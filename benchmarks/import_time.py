"""CPU seconds of `import pixart_sigma` above an empty interpreter: at most 0.15.

    python benchmarks/import_time.py

Both commands run in turn, each the given number of times; the smallest of each counts.
"""

import resource
import subprocess
import sys

ROUNDS = 9
GATE = 0.15


def cpu_seconds(command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", command], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    nothing, package = zip(
        *((cpu_seconds("pass"), cpu_seconds("import pixart_sigma")) for _ in range(ROUNDS)), strict=True
    )
    above = min(package) - min(nothing)
    print(f"nothing {min(nothing):.3f} s, import {min(package):.3f} s: {above:.3f} s above (gate {GATE})")
    return 0 if above <= GATE else 1


if __name__ == "__main__":
    sys.exit(main())
