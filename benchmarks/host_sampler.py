"""KSampler with this pack's MODEL against ComfyUI's own PixArt, in a real ComfyUI on one CPU thread.

    python benchmarks/host_sampler.py [--tokens 60] [--rounds 3]

The same random weights of the real width (1152, 4 layers), 512x512 pixels, a positive prompt of --tokens
tokens and a negative one of one token, guidance 4.5, in fp32. Counted: one call of the model in each step
(ComfyUI's own takes two for prompts of unequal length), and multiply-adds at most 1.01 of its own: the
shorter prompt is padded. CPU time is the least of the rounds, which are taken in turn; it is reported only.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import host

STEPS = 2
GATE = 1.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    host.enter("--cpu")
    import comfy.sd
    import torch

    torch.set_num_threads(1)
    host.load_pack()
    load_model = host.module("nodes.host.transformer").load_model
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "width_1152_1024.safetensors"
        write_transformer(file)
        models = load_model(file), comfy.sd.load_diffusion_model(str(file))
        prompts = [[[torch.randn(1, length, 4096), {}]] for length in (arguments.tokens, 1)]
        return compare(models, prompts, arguments.rounds)


def write_transformer(file: Path) -> None:
    """Random weights of four layers of the published shape, in diffusers' keys."""
    import torch
    from denoising import CONFIG
    from diffusers import PixArtTransformer2DModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(PixArtTransformer2DModel(**CONFIG.to_diffusers()).state_dict(), file)


def compare(models, prompts, rounds: int) -> int:
    import torch
    from measuring import multiply_adds, seconds_in_turn

    import nodes

    latent = {"samples": torch.zeros(1, 4, 64, 64)}

    def sample(model):
        nodes.KSampler().sample(model, 0, STEPS, 4.5, "dpmpp_2m", "normal", *prompts, latent)

    samples = [partial(sample, model) for model in models]
    calls, operations = [], []
    for model, call in zip(models, samples, strict=True):
        seen = []
        counting = model.model.diffusion_model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        operations.append(multiply_adds(call)[1] / 1e9)
        counting.remove()
        calls.append(len(seen) / STEPS)
    seconds = seconds_in_turn(samples, rounds, time.process_time)
    ours, theirs = map(min, seconds)
    print(f"model calls in a step  {calls[0]:.0f} against {calls[1]:.0f}")
    print(f"multiply-adds          {operations[0]:.1f} against {operations[1]:.1f} G")
    print(f"CPU time               {ours:.1f} against {theirs:.1f} s: {ours / theirs:.3f}")
    return 0 if calls[0] == 1 and operations[0] <= GATE * operations[1] else 1


if __name__ == "__main__":
    sys.exit(main())
