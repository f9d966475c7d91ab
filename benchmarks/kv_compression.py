"""How much of the ideal speed-up KV compression reaches at the real width, on one CPU thread in float32.

    python benchmarks/kv_compression.py [--tokens 1024 4096 16384] [--rounds 3] [--whole]

The transformer has two layers of width 1152 (16 heads of 72), a prompt of 300 tokens and random weights.
Dense and compressed forward passes are taken in turn, and the smallest CPU time of each counts. The ideal is
the ratio of their multiply-adds, attention included, which the unit tests count. Reported only, with no gate.

With --whole all 28 layers run once at 2048x2048 with every thread: dense, mean:2:deep and mean:2:all.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import torch
from measuring import seconds_in_turn

from pixart_sigma.transformer.config import XL_2
from pixart_sigma.transformer.cost import multiply_adds
from pixart_sigma.transformer.kv_rules import parse
from pixart_sigma.transformer.network import build_transformer

PROMPT_TOKENS = 300


def make_transformer(layers: int):
    transformer = build_transformer(replace(XL_2, num_layers=layers))
    random = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(weight.shape, generator=random) * 0.02
        for name, weight in transformer.state_dict().items()
    }
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


def compare(
    transformer, side: int, settings: list[str], rounds: int, clock
) -> dict[str, tuple[float, float]]:
    """{setting: (measured, ideal)} speed-ups for pictures of side x side pixels."""
    config = transformer.sigma_config
    latents = torch.randn(1, 4, side // 8, side // 8)
    embeds = torch.randn(1, PROMPT_TOKENS, config.caption_channels)
    rules = {setting: parse(setting, config.num_layers) for setting in ["off", *settings]}
    calls = [partial(transformer, latents, 500, embeds, kv_compression=chosen) for chosen in rules.values()]
    least = dict(zip(rules, map(min, seconds_in_turn(calls, rounds, clock)), strict=True))
    count = {setting: multiply_adds(config, side, side, PROMPT_TOKENS, rules[setting]) for setting in rules}
    return {setting: (least["off"] / least[setting], count["off"] / count[setting]) for setting in settings}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformer = make_transformer(2)
    print("| tokens | setting | speed-up | ideal | share of the ideal |\n|---|---|---|---|---|")
    for tokens in arguments.tokens:
        side = 16 * int(tokens**0.5)
        speeds = compare(transformer, side, ["mean:2:all", "mean:4:all"], arguments.rounds, time.process_time)
        for setting, (measured, ideal) in speeds.items():
            print(
                f"| {tokens} | {setting} | {measured:.2f} | {ideal:.2f} | {measured / ideal:.2f} |",
                flush=True,
            )
    if arguments.whole:
        torch.set_num_threads(threads)
        whole = make_transformer(28)
        speeds = compare(whole, 2048, ["mean:2:deep", "mean:2:all"], 1, time.monotonic)
        for setting, (measured, ideal) in speeds.items():
            print(
                f"28 layers at 2048x2048, {threads} threads, {setting}: {measured:.2f} of ideally {ideal:.2f}"
            )


if __name__ == "__main__":
    main()
