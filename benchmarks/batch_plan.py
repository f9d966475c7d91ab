"""How many pictures of PixArt-Sigma go through the transformer at once within a budget, and what each costs.

    python benchmarks/batch_plan.py [--budget 8] [--steps 20] [--tokens 300] [--tflops 20] [--bandwidth 250]

Nothing is loaded or timed: memory is the planner's, operations are counted on the meta device at the real
widths, and bytes are those of the weights that a stage reads for each picture, activations apart. Seconds
follow from a device that is assumed: each stage takes what the slower of its operations and its bytes takes,
at a throughput and a bandwidth that are kept up throughout.
Prompts have `--tokens` each; the negative prompt is encoded once for all, and takes part in every step.
"""

import argparse
import functools
from dataclasses import dataclass, replace

import torch
from measuring import multiply_adds

from pixart_sigma.batch.local import most_together
from pixart_sigma.planner import Models, Plan, plan
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text.needs import T5_XXL
from pixart_sigma.transformer import cost

META = torch.device("meta")
SIDES = 512, 1024, 2048


@dataclass(frozen=True)
class Cost:
    """Of one picture in a stage: floating-point operations, two for each multiply-add, and bytes of weights
    that are read."""

    operations: float
    read: float

    def seconds(self, operations: float, bandwidth: float) -> float:
        """On a device of so many operations and bytes per second."""
        return max(self.operations / operations, self.read / bandwidth)


@dataclass(frozen=True)
class Published:
    """Plans of the published shapes in a budget of bytes, as `most_together` asks a pipeline for them."""

    models: Models
    budget: float

    def plan(self, settings: Settings) -> Plan:
        return plan(settings, Ways(budget=self.budget), self.models)


@functools.cache
def encode_operations(tokens: int) -> float:
    from transformers import T5Config, T5EncoderModel

    with META, torch.no_grad():
        encoder = T5EncoderModel(T5Config(**T5_XXL)).eval()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return 2.0 * multiply_adds(lambda: encoder(input_ids=ids))[1]


def decode_operations(vae: torch.nn.Module, side: int) -> float:
    latents = torch.zeros(1, 4, side // 8, side // 8, device=META)
    with torch.no_grad():
        return 2.0 * multiply_adds(lambda: vae.to(META).decode(latents))[1]


def costs(made: Plan, models: Models, steps: int, tokens: int, together: int) -> dict[str, Cost]:
    """By stage, for a picture of those that go through the transformer together."""
    side, passes = made.width, 2 * steps
    once = 2.0 * cost.multiply_adds(models.transformer, side, side, tokens)
    reads = passes if made.ways.guidance_in_turn else steps
    weights = {name: stage.weights for name, stage in made.stages.items()}
    return {
        "T5": Cost(encode_operations(tokens), weights["text encoder"]),
        "transformer": Cost(passes * once, reads * weights["transformer"] / together),
        "VAE": Cost(decode_operations(models.vae, side), weights["VAE decode"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=8, help="GB on the device")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=300, help="of each prompt")
    parser.add_argument("--tflops", type=float, default=20, help="assumed, 10^12 operations per second")
    parser.add_argument("--bandwidth", type=float, default=250, help="assumed, GB per second")
    arguments = parser.parse_args()
    assumed = arguments.tflops * 1e12, arguments.bandwidth * 1e9
    published = Published(Models.published(), arguments.budget * 1e9)
    asked = f"{arguments.budget:g} GB, {arguments.steps} steps with guidance, {arguments.tokens} tokens"
    print(f"{asked}; assumed, not measured: {arguments.tflops:g} TFLOP/s, {arguments.bandwidth:g} GB/s")
    for side in SIDES:
        settings = Settings(
            width=side,
            height=side,
            binning=False,
            steps=arguments.steps,
            max_sequence_length=arguments.tokens,
        )
        together = most_together(published, settings)
        made = published.plan(replace(settings, count=together))
        found = costs(made, published.models, arguments.steps, arguments.tokens, together)
        seconds = sum(stage.seconds(*assumed) for stage in found.values())
        print(f"\n{side}x{side}: {together} at once, {3600 / seconds:.0f} pictures per hour")
        for name, stage in zip(found, made.stages.values(), strict=True):
            print(
                f"  {name:12} {stage.how:20} peak {stage.peak / 1e9:5.2f} GB, a picture: "
                f"{found[name].operations / 1e12:7.2f} TFLOP, {found[name].read / 1e9:6.2f} GB, "
                f"{found[name].seconds(*assumed):6.2f} s"
            )


if __name__ == "__main__":
    main()
