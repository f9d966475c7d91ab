"""What savings change in the demo's pictures, and what they cost, beside fewer steps.

    python benchmarks/speed.py --calibration 5=FILE [--size 256] [--count 200] [--savings SPELLING ...]

Held-out prompts, prompt k from seed k, 20 steps, guidance 4.5, 256x256. Each row: multiply-adds as a share of
the full run's (of the transformer, counted from the calls that were made), the relative L2 of the finished
latents against the full run's, and how many pictures are wholly right, judged as by `tools/demo/evaluate.py`.
A calibration is named by its budget; both of its choices are rows, that with other steps and that in place.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from pixart_sigma import Settings, SigmaPipeline, Ways
from pixart_sigma.speed import spell as spell_speed
from pixart_sigma.transformer.calibration import Calibration, Choice
from pixart_sigma.transformer.cost import multiply_adds
from pixart_sigma.transformer.kv_rules import resolve, spell
from pixart_sigma.transformer.network import SigmaTransformer

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "demo"))
from evaluate import held_out_prompts, judge  # noqa: E402

FEWER_STEPS = (14, 10, 8, 6, 5)


class Counter:
    """The multiply-adds of the transformer's calls since the last `take`."""

    def __init__(self):
        self.total = 0
        forward = SigmaTransformer.forward

        def counted(network, latents, timestep, embeds, *arguments, kv_compression=None, **named):
            height, width = (8 * side for side in latents.shape[-2:])
            rules = resolve(kv_compression, network.sigma_config, height, width)
            one = multiply_adds(network.sigma_config, height, width, embeds.shape[1], rules, float(timestep))
            self.total += len(latents) * one
            return forward(
                network, latents, timestep, embeds, *arguments, kv_compression=kv_compression, **named
            )

        SigmaTransformer.forward = counted

    def take(self) -> int:
        total, self.total = self.total, 0
        return total


def rows(arguments) -> dict[str, dict]:
    """Each row's name, and what its settings have beside the full run's."""
    found: dict[str, dict] = {f"{steps} steps": {"steps": steps} for steps in FEWER_STEPS}
    found |= {f"`{savings}`": {"speed": savings} for savings in arguments.savings}
    for given in arguments.calibration:
        budget, _, path = given.partition("=")
        calibration = Calibration.read(Path(path))
        found[f"KV compression alone, budget {budget} %"] = {"kv_compression": spell(calibration.rules)}
        for name, point in (("in place", calibration.speed_in_place), ("any steps", calibration.speed)):
            if point is not None:
                found[f"**budget {budget} %**, {name}"] = as_settings(point.choice)
    return found


def as_settings(choice: Choice) -> dict:
    chosen = {
        "kv_compression": spell(choice.rules),
        "speed": spell_speed(choice.savings),
        "steps": choice.steps,
        "spacing": choice.spacing,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", action="append", default=[], metavar="BUDGET=FILE")
    parser.add_argument("--savings", nargs="*", default=[])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="which held-out prompts are drawn")
    arguments = parser.parse_args()
    pipeline, counter = SigmaPipeline.from_path("demo", Ways(release="keep")), Counter()
    variants = {"full": {}} | rows(arguments)
    costs, errors, right = ({name: [] for name in variants} for _ in range(3))
    for seed, (scene, prompt) in enumerate(held_out_prompts(arguments.count, arguments.seed)):
        reference = None
        for name, changed in variants.items():
            side = arguments.size
            settings = Settings(prompt, width=side, height=side, seed=seed, binning=False, **changed)
            result = pipeline.generate(settings)
            reference = result.latents if reference is None else reference
            costs[name].append(counter.take())
            errors[name].append(float((result.latents - reference).norm() / reference.norm()))
            right[name].append(all(judge(scene, np.asarray(result.images[0])).values()))
        print(f"{seed + 1} of {arguments.count}", file=sys.stderr, flush=True)
    print(f"{arguments.size}x{arguments.size}, {arguments.count} prompts of seed {arguments.seed}\n")
    print("| what | multiply-adds | error, mean | largest | wholly right |\n|---|---|---|---|---|")
    for name in variants:
        share = sum(costs[name]) / sum(costs["full"])
        mean = sum(errors[name]) / len(errors[name])
        print(
            f"| {name} | {share:.3f} | {mean:.1%} | {max(errors[name]):.1%} | {sum(right[name])} of "
            f"{arguments.count} |"
        )


if __name__ == "__main__":
    main()
