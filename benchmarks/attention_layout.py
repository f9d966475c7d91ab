"""What a transformer step gains on a CPU from keys and values that lie one head after the other.

    python benchmarks/attention_layout.py [--tokens 1024 4096] [--rounds 5]

Two layers of width 1152 (16 heads of 72), a prompt of 300 tokens and random weights, one thread, float32.
As the engine has it, and with keys and values as their projections leave them, in turn; the smallest CPU time
of each counts. Gate: both give the same noise, bit for bit (exit status 1 if not). The times are reported.
"""

import argparse
import sys
import time
from unittest.mock import patch

import torch
from kv_compression import PROMPT_TOKENS, make_transformer
from measuring import seconds_in_turn

from pixart_sigma.transformer import attention


def compare(transformer, tokens: int, rounds: int) -> tuple[float, bool]:
    """(speed-up, equal) of a step over so many tokens."""
    side = 2 * int(tokens**0.5)
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, side, side, generator=random)
    prompt = torch.randn(1, PROMPT_TOKENS, transformer.sigma_config.caption_channels, generator=random)
    made = {}

    def step():
        made["head by head"] = transformer(latents, 500, prompt)

    def step_as_projected():
        with patch.object(attention, "head_by_head", lambda tokens: tokens):
            made["as projected"] = transformer(latents, 500, prompt)

    ours, before = map(min, seconds_in_turn([step, step_as_projected], rounds, time.process_time))
    return before / ours, torch.equal(made["head by head"], made["as projected"])


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformer = make_transformer(2)
    print("| tokens | speed-up | bit for bit |\n|---|---|---|")
    failed = False
    for tokens in arguments.tokens:
        faster, equal = compare(transformer, tokens, arguments.rounds)
        failed |= not equal
        print(f"| {tokens} | {faster:.3f} | {'yes' if equal else 'NO'} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
