"""The VAE's decode: whole, in strips and in diffusers' tiles, and what a convolution's library works in."""

from functools import partial

import torch
from measuring import least_seconds, measured

from pixart_sigma.vae.layers import read_decoder
from pixart_sigma.vae.loading import load_vae
from pixart_sigma.vae.memory import decode_memory, whole_decode_bytes
from pixart_sigma.vae.stage import decode

from .scale import Job


def measure(job: Job) -> None:
    vae = load_vae(job.folder / "vae", job.dtype, job.device)
    for side, budget in job.scale.decode_budgets.items():
        measure_size(job, vae, side, budget)
    with job.report.attempt("convolution"):
        work_space(job)


def measure_size(job: Job, vae, side: int, budget: float) -> None:
    decoder, latents = read_decoder(vae), job.latents(side)
    weights = sum(weight.nbytes for weight in vae.parameters())
    shape = (side // 8, side // 8, job.dtype.itemsize)
    predicted = {
        "whole": whole_decode_bytes(decoder, *shape),
        "strips": decode_memory(decoder, *shape, budget, job.device.type == "cpu").device,
    }
    pictures = {}
    for how in ("whole", "strips", "tiles"):
        name = f"{side}x{side}, {how}"
        run = partial(decode, vae, latents, how, budget if how == "strips" else None)
        with job.report.attempt(name):
            pictures[how], _, peak = measured(run, job.device)
            total = weights + predicted[how] if how in predicted else None
            job.report.size(f"{name}: peak", weights + peak, total)
            rounds = 1 if side > 2048 else job.scale.rounds
            job.report.add(f"{name}: seconds", least_seconds(run, job.device, rounds), "s")
    for how in ("strips", "tiles"):
        if "whole" in pictures and how in pictures:
            away = (pictures[how] - pictures["whole"]).abs().max()
            job.report.add(f"{side}x{side}, {how}: most off the whole", float(away), "")


@torch.no_grad()
def work_space(job: Job) -> None:
    """Bytes that a convolution of the decoder's largest map takes beyond its result. cuDNN may turn the map
    to run over channels first; no prediction knows of that."""
    wide, side = job.scale.vae["block_out_channels"][0], job.scale.usual
    for memory_format in (torch.contiguous_format, torch.channels_last):
        conv = torch.nn.Conv2d(wide, wide, 3, padding=1).to(job.device, job.dtype)
        conv = conv.to(memory_format=memory_format)
        given = torch.zeros(1, wide, side, side, device=job.device, dtype=job.dtype)
        given = given.contiguous(memory_format=memory_format)
        conv(given)
        made, _, peak = measured(lambda conv=conv, given=given: conv(given), job.device)
        name = f"convolution of {wide} channels at {side}x{side}, {str(memory_format).removeprefix('torch.')}"
        job.report.size(
            f"{name}: beyond its result", peak - made.nbytes, note=f"the result {made.nbytes / 1e9:.3f} GB"
        )
        del made
