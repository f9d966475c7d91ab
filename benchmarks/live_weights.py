"""Weight bytes alive in a staged run, against its largest stage: at most 1.02 times.

    python benchmarks/live_weights.py [MODEL FOLDER]

Parameters and buffers alive in the process are counted once each stage is loaded, and at its end. The model
is the demo unless a folder is given.
"""

import gc
import sys

import torch

from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways

GATE = 1.02


def live_weights() -> int:
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.nn.Module):
            for tensor in (*thing.parameters(recurse=False), *thing.buffers(recurse=False)):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    pipeline = SigmaPipeline.from_path(model, Ways(device="cpu", measure=True))
    seen, left, run = {}, {}, pipeline.stages.run

    def counted_run(name, load, use, **settings):
        def counted(model):
            seen[name] = live_weights()
            return use(model)

        result = run(name, load, counted, **settings)
        left[name] = live_weights()
        return result

    pipeline.stages.run = counted_run
    pipeline.generate(Settings("a red circle", steps=1))
    largest = max(cost.weights for cost in pipeline.stages.costs.values())
    for name, size in seen.items():
        print(f"{name}: {size / 1e6:.2f} MB of weights alive in use, {left[name] / 1e6:.2f} MB after")
    ratio = max(seen.values()) / largest
    print(f"most alive at once: {ratio:.3f} of the largest stage, {largest / 1e6:.2f} MB (gate {GATE})")
    return 0 if ratio <= GATE and not any(left.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
