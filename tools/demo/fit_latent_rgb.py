"""Fits the colours of the demo's latents, for live previews: print what nodes/host/transformer.py holds.

Least squares from the four channels of latents, as the transformer sees them, to the mean colour in [-1, 1]
of the 8 x 8 pixels that each stands for, over drawn pictures. Run it after training the demo's VAE.
"""

import random
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2])]

from drawings import random_scene, render  # noqa: E402

from pixart_sigma import DEMO, load_vae  # noqa: E402
from pixart_sigma.vae.coding import encode  # noqa: E402

PICTURES, SIZE = 64, 128


def fit() -> tuple[list[list[float]], list[float]]:
    """Factors (4, 3) and what is added (3,)."""
    rng = random.Random(0)
    pictures = render([random_scene(rng) for _ in range(PICTURES)], SIZE, SIZE, rng)
    latents = encode(load_vae(DEMO / "vae"), pictures / 2 + 0.5)
    colors = torch.nn.functional.avg_pool2d(pictures, 8).movedim(1, -1).reshape(-1, 3)
    latents = latents.movedim(1, -1).reshape(-1, 4)
    ones = torch.ones(len(latents), 1)
    solution = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), colors).solution
    error = torch.cat([latents, ones], dim=1) @ solution - colors
    print(f"root mean square error {float(error.square().mean().sqrt()):.3f} of colours in [-1, 1]")
    rounded = [[round(value, 4) for value in row] for row in solution.tolist()]
    return rounded[:4], rounded[4]


if __name__ == "__main__":
    factors, added = fit()
    print(f"DEMO_LATENT_RGB = (\n    {factors},\n    {added},\n)")
