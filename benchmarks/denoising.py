"""A denoising run of this engine against diffusers' PixArtSigmaPipeline: same weights, noise and embeddings.

Real width (1152 as 16 heads of 72), 4 layers, sample_size 128, run at 512x512 pixels with a prompt of 20
tokens, an empty negative prompt and guidance 4.5, in float32 on one CPU thread. Counted, and so exact:
multiply-adds at most 0.93 of the pipeline's, and positions computed once in a run. The latents must agree.
CPU time is reported only. Exit status 1 if a gate fails. Usage: denoising.py [--steps 2] [--rounds 2]
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from measuring import multiply_adds, seconds_in_turn

from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.sampling.noise import get_noise
from pixart_sigma.settings import Settings
from pixart_sigma.transformer import network as engine
from pixart_sigma.transformer.config import XL_2

GATE = 0.93
GUIDANCE = 4.5
SIZE = 512
PROMPT_TOKENS = 20
REFERENCE_TOKENS = 300
CONFIG = replace(XL_2, num_layers=4)


def make_transformers():
    """Our transformer and diffusers', sharing one set of random weights."""
    reference = PixArtTransformer2DModel(**CONFIG.to_diffusers()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in reference.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    ours = engine.build_transformer(CONFIG)
    ours.load_state_dict(reference.state_dict(), assign=True)
    return ours.eval().requires_grad_(False), reference


def pad(embeds):
    """Embeddings as the pipeline makes them: 300 tokens, and the mask of the real ones."""
    tokens = embeds.shape[1]
    filler = embeds.new_zeros(1, REFERENCE_TOKENS - tokens, embeds.shape[2])
    return torch.cat([embeds, filler], dim=1), (torch.arange(REFERENCE_TOKENS) < tokens).long()[None]


def make_runs(steps: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """A run of this engine and one of the pipeline, which give latents."""
    ours, reference = make_transformers()
    pipe = PixArtSigmaPipeline(None, None, None, reference, DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    noise = get_noise(1, SIZE, SIZE, seed=0)
    generator = torch.Generator().manual_seed(1)
    positive = torch.randn(1, PROMPT_TOKENS, CONFIG.caption_channels, generator=generator)
    negative = torch.randn(1, 1, CONFIG.caption_channels, generator=generator)
    prompt_embeds, prompt_mask = pad(positive)
    negative_embeds, negative_mask = pad(negative)

    settings = Settings(steps=steps, guidance_scale=GUIDANCE)
    prompts = Prompts(positive, negative_embeds=negative)

    def run_ours():
        return denoise(guide(ours, prompts, settings), noise, settings)

    def run_reference():
        return pipe(
            negative_prompt=None,
            latents=noise,
            height=SIZE,
            width=SIZE,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_mask,
            negative_prompt_embeds=negative_embeds,
            negative_prompt_attention_mask=negative_mask,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            use_resolution_binning=False,
            output_type="latent",
        ).images

    return run_ours, run_reference


@contextmanager
def computed_positions() -> Iterator[list]:
    """A list that gets an entry each time the engine computes positions."""
    positions, original = [], engine.get_positions

    def counting(*grid):
        positions.append(grid)
        return original(*grid)

    engine.get_positions = counting
    yield positions
    engine.get_positions = original


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each, taken in turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = make_runs(arguments.steps)
    with computed_positions() as positions:
        (latents, mine), (expected, theirs) = map(multiply_adds, runs)
    error = float((latents - expected).norm() / expected.norm())
    ratio = mine / theirs
    print(f"latents differ by   {error:.1e} relative")
    print(f"multiply-adds       {mine / 1e9:.1f} against {theirs / 1e9:.1f} G: {ratio:.3f} (gate {GATE})")
    print(f"positions computed  {len(positions)} in {arguments.steps} steps (gate 1)")
    if arguments.rounds:
        ours, reference = map(sum, seconds_in_turn(runs, arguments.rounds, time.process_time))
        print(f"CPU time            {ours:.1f} against {reference:.1f} s: {ours / reference:.3f}")
    passed = ratio <= GATE and len(positions) == 1 and error <= 1e-4
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
