"""How far KV compression moves the demo's latents, at sizes from 128 to 512 pixels.

    python benchmarks/kv_latents.py [--sizes 128 256 384 512] [--settings mean:2:deep ...] [--prompts 4]

Relative L2 of the latents after 20 steps at guidance 4.5 against those without compression, from the same
noise; averaged over prompts, each with a seed of its own. `demo-kv` is the transformer that was trained with
compression against the dense one, of other weights. Reported only: what it does to pictures is counted by
`tools/demo/evaluate.py`.
"""

import argparse

from pixart_sigma import Settings, SigmaPipeline, Ways
from pixart_sigma.studies.calibration import DEMO_PROMPTS

SETTINGS = ("uniform:2:deep", "mean:2:deep", "mean:2:all", "mean:4:all")
TRAINED = "demo-kv"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--prompts", type=int, default=4, choices=range(1, 1 + len(DEMO_PROMPTS)))
    arguments = parser.parse_args()
    dense = SigmaPipeline.from_path("demo", Ways(release="keep"))
    trained = SigmaPipeline.from_path("demo", Ways(release="keep"), transformer=TRAINED)
    prompts = DEMO_PROMPTS[: arguments.prompts]

    def latents(pipeline, size, setting=None):
        made = (
            pipeline.generate(
                Settings(prompt, seed=seed, width=size, height=size, binning=False, kv_compression=setting)
            )
            for seed, prompt in enumerate(prompts)
        )
        return [result.latents for result in made]

    references = {size: latents(dense, size) for size in arguments.sizes}
    print("| setting |" + "".join(f" {size} px |" for size in arguments.sizes))
    print("|---" * (1 + len(arguments.sizes)) + "|")
    for setting in (*arguments.settings, TRAINED):
        row = []
        for size, reference in references.items():
            pipeline = trained if setting == TRAINED else dense
            made = latents(pipeline, size, None if setting == TRAINED else setting)
            errors = [
                float((one - other).norm() / other.norm()) for one, other in zip(made, reference, strict=True)
            ]
            row.append(sum(errors) / len(errors))
        print(f"| `{setting}` |" + "".join(f" {error:.1%} |" for error in row), flush=True)


if __name__ == "__main__":
    main()
