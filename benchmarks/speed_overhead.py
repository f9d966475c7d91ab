"""How much of the ideal saving forecasts reach at the real width, on one CPU thread in float32.

    python benchmarks/speed_overhead.py [--sizes 1024 2048] [--steps 6] [--layers 4] [--rounds 2]
                                        [--savings forecast:1:1 guidance:1:1]

Whole runs of the engine: width 1152 (16 heads of 72), random weights, a prompt of 60 tokens and a negative
one of 1, guidance 4.5. Full runs and those with savings are taken in turn, and the smallest CPU time of each
counts. Ideal is the share of multiply-adds, by the calls that were made. What is left between the two is the
forecasts' own work, and what a smaller batch costs more for each picture. Reported only.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import torch
from kv_compression import make_transformer
from measuring import seconds_in_turn

from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.sampling.noise import get_noise
from pixart_sigma.settings import Settings
from pixart_sigma.transformer.cost import multiply_adds

PROMPT_TOKENS = 60


class Counted:
    """A transformer, and the multiply-adds of the calls that were made through this."""

    def __init__(self, transformer):
        self.transformer, self.project_prompt = transformer, transformer.project_prompt
        self.total = 0

    def __call__(self, latents, timestep, embeds, *arguments, **named):
        height, width = (8 * side for side in latents.shape[-2:])
        one = multiply_adds(self.transformer.sigma_config, height, width, embeds.shape[1])
        self.total += len(latents) * one
        return self.transformer(latents, timestep, embeds, *arguments, **named)


def compare(transformer, side: int, settings: Settings, savings: list[str], rounds: int):
    """(savings, seconds, their share of the full run's, the multiply-adds' share) for each of the savings,
    full runs first."""
    random = torch.Generator().manual_seed(1)
    positive, negative = (
        torch.randn(1, tokens, transformer.sigma_config.caption_channels, generator=random)
        for tokens in (PROMPT_TOKENS, 1)
    )
    prompts, noise = Prompts(positive, negative_embeds=negative), get_noise(1, side, side, seed=0)
    counted = {speed: Counted(transformer) for speed in ("off", *savings)}

    def run(speed: str) -> torch.Tensor:
        chosen = replace(settings, speed=speed)
        return denoise(guide(counted[speed], prompts, chosen), noise, chosen)

    seconds = seconds_in_turn([partial(run, speed) for speed in counted], rounds, time.process_time)
    least = dict(zip(counted, map(min, seconds), strict=True))
    return [
        (speed, least[speed], least[speed] / least["off"], counted[speed].total / counted["off"].total)
        for speed in counted
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="sides in pixels")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--savings", nargs="+", default=["forecast:1:1", "guidance:1:1"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformer = make_transformer(arguments.layers)
    settings = Settings(steps=arguments.steps)
    print("| size | savings | seconds | of full | multiply-adds | realised share of the ideal saving |")
    print("|---|---|---|---|---|---|")
    for side in arguments.sizes:
        for speed, seconds, share, ideal in compare(
            transformer, side, settings, arguments.savings, arguments.rounds
        ):
            realised = f"{(1 - share) / (1 - ideal):.3f}" if ideal < 1 else "–"
            print(
                f"| {side}x{side} | `{speed}` | {seconds:.1f} | {share:.3f} | {ideal:.3f} | {realised} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
