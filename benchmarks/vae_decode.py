"""The decode in strips against the whole one and diffusers' tiles: the SDXL VAE's shape, random weights.

    python benchmarks/vae_decode.py [--sizes 512 768] [--budget 256e6]

In fp32 on the CPU. Counted and gated: the strips' largest difference from the whole decode (1e-4 of its
range), multiply-adds (1.05 of the whole's), and by shapes the bytes at work (0.35 of the whole's) and with
those that wait (1.0) at 1024x1024. Reported: how much tiles differ, CPU time, bytes that wait.
"""

import argparse
import sys
import time

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from pixart_sigma.vae.feature_maps import Parking
from pixart_sigma.vae.layers import read_decoder
from pixart_sigma.vae.loading import SDXL_VAE
from pixart_sigma.vae.memory import decode_memory, whole_decode_bytes
from pixart_sigma.vae.strips import decode_in_strips


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768], help="pixels on a side")
    parser.add_argument(
        "--budget", type=float, default=256e6, help="bytes for a strip at work and what waits"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(SDXL_VAE).eval().requires_grad_(False)
    decoder = read_decoder(vae)
    passed = True
    for size in arguments.sizes:
        latent = torch.randn(1, 4, size // 8, size // 8)
        whole, whole_seconds, whole_work = run(lambda latent=latent: vae.decode(latent).sample)
        parking = Parking(latent.device, 0)
        strips, seconds, work = run(
            lambda latent=latent, parking=parking: decode_in_strips(
                decoder, latent, arguments.budget, parking=parking
            )
        )
        vae.use_tiling = True
        tiles, tiled_seconds, tiled_work = run(lambda latent=latent: vae.decode(latent).sample)
        vae.use_tiling = False
        scale = whole.abs().max()
        error, tiled_error = ((other - whole).abs().max() / scale for other in (strips, tiles))
        passed &= error <= 1e-4 and work <= 1.05 * whole_work
        print(
            f"{size}x{size}: strips differ by {error:.1e} (tiles {tiled_error:.1e}); multiply-adds "
            f"{work / whole_work:.3f} of the whole's (tiles {tiled_work / whole_work:.2f}); CPU time "
            f"{seconds / whole_seconds:.2f} (tiles {tiled_seconds / whole_seconds:.2f}); "
            f"waiting {parking.parked_peak / 1e6:.0f} MB"
        )
    side = 1024 // 8
    whole_bytes = whole_decode_bytes(decoder, side, side, 4)
    needed = decode_memory(decoder, side, side, 4)
    passed &= needed.device <= 0.35 * whole_bytes and needed.device + needed.ram <= whole_bytes
    print(
        f"1024x1024, by shapes: at work {needed.device / 1e6:.0f} MB, waiting {needed.ram / 1e6:.0f} MB, of "
        f"the whole's {whole_bytes / 1e6:.0f} MB: {needed.device / whole_bytes:.2f}, together "
        f"{(needed.device + needed.ram) / whole_bytes:.2f}"
    )
    return 0 if passed else 1


@torch.no_grad()
def run(decode) -> tuple[torch.Tensor, float, int]:
    """The picture, seconds of CPU time, and multiply-adds, each of a run of its own."""
    start = time.process_time()
    picture = decode()
    seconds = time.process_time() - start
    with FlopCounterMode(display=False) as counter:
        decode()
    return picture, seconds, counter.get_total_flops() // 2


if __name__ == "__main__":
    sys.exit(main())
