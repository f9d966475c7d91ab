"""CPU seconds that loading this pack adds to the start of a real ComfyUI: at most 0.15.

    python benchmarks/host_import.py [ROUNDS]

Each round is a fresh process on the CPU: ComfyUI imports its own modules, then loads the pack as at any
start; the smallest of each counts. The pack may import none of diffusers, transformers and bitsandbytes
(ComfyUI itself has imported transformers by then).
"""

import json
import subprocess
import sys

import host

GATE = 0.15
LATE = ("diffusers", "transformers", "bitsandbytes")


def measure() -> None:
    """One round, in a process of its own; prints the figures as the last line."""
    from time import process_time

    host.enter("--cpu")
    import execution  # noqa: F401
    import server  # noqa: F401
    from comfy_config import config_parser  # noqa: F401

    import nodes

    theirs = process_time()
    before, known = set(sys.modules), set(nodes.NODE_CLASS_MAPPINGS)
    loaded = host.load_pack()
    seconds = process_time() - theirs
    added = set(sys.modules) - before
    late = [name for name in LATE if name in added]
    ours = len(set(nodes.NODE_CLASS_MAPPINGS) - known)
    print(json.dumps({"loaded": loaded, "nodes": ours, "host": theirs, "pack": seconds, "late": late}))


def main() -> int:
    rounds = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        done = subprocess.run(
            [sys.executable, "-c", "import host_import; host_import.measure()"],
            cwd=host.PACK / "benchmarks",
            check=True,
            capture_output=True,
            text=True,
        )
        rounds.append(json.loads(done.stdout.splitlines()[-1]))
    theirs, ours = (min(figures[name] for figures in rounds) for name in ("host", "pack"))
    late = sorted({name for figures in rounds for name in figures["late"]})
    nodes = min(figures["nodes"] for figures in rounds)
    print(f"host {theirs:.2f} s, {nodes} nodes of this pack {ours:.3f} s above (gate {GATE})")
    print(f"of {', '.join(LATE)} the pack imports: {', '.join(late) or 'none'}")
    return 0 if ours <= GATE and not late and nodes and all(figures["loaded"] for figures in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
