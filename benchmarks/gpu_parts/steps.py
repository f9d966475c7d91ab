"""A guided step of the transformer: seconds and bytes by size, KV compression and place."""

import torch
from measuring import least_seconds, measured

from pixart_sigma.sampling.guidance import guide
from pixart_sigma.settings import Settings
from pixart_sigma.transformer.cost import multiply_adds
from pixart_sigma.transformer.kv_rules import resolve
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.stage import Pass, predict_needs

from .scale import Job

RULES = (None, "mean:2:all", "mean:2:deep", "mean:4:all")


def measure(job: Job) -> None:
    network = load_transformer(job.folder / "transformer", job.dtype, job.device)
    for side in job.scale.sizes:
        dense = None
        for rule in RULES:
            name = f"{side}x{side}, {rule or 'dense'}"
            with job.report.attempt(name):
                seconds = step(job, network, name, side, rule)
                dense = dense or seconds
                if rule:
                    ideal = products(job, side, None) / products(job, side, rule)
                    job.report.add(f"{name}: times as fast as dense", dense / seconds, "", reference=ideal)
        with job.report.attempt(f"{side}x{side}, prompts in turn"):
            step(job, network, f"{side}x{side}, prompts in turn", side, None, in_turn=True, reference=dense)
        if side == job.scale.usual:
            with job.report.attempt("four pictures at once"):
                four = step(job, network, f"{side}x{side}, four pictures", side, None, count=4)
                job.report.add("four pictures at once, of four alone", four / (4 * dense), "")
    del network
    streamed = load_transformer(job.folder / "transformer", job.dtype, job.device, stream=True)
    for side in job.scale.sizes[:3]:
        with job.report.attempt(f"{side}x{side}, streamed"):
            step(job, streamed, f"{side}x{side}, streamed", side, None)


@torch.no_grad()
def step(
    job: Job, network, name: str, side: int, rule: str | None, *, in_turn=False, count=1, reference=None
) -> float:
    """The seconds of a step, beside `reference`; its peak beside the prediction."""
    place = "stream" if hasattr(network, "_parked") else "auto"
    settings = Settings(kv_compression=rule or "off", steps=job.scale.steps)
    predict, latents = guide(network, job.prompts(), settings, in_turn), job.latents(side, count)
    timestep = torch.tensor(500, device=job.device)
    predict(latents, timestep)  # which projects the prompts, and has the libraries choose
    noise, _, working = measured(lambda: predict(latents, timestep), job.device)
    if not noise.isfinite().all():
        raise ValueError("the noise is not finite")
    needs = predict_needs(job.scale.transformer, Pass(side, side, count), job.dtype, place, in_turn)
    # The projected and the given prompts were there before.
    held = needs.weights if place == "auto" else 0
    job.report.size(f"{name}: peak", held + working, needs.peak)
    seconds = least_seconds(
        lambda: predict(latents, timestep), job.device, 1 if side > 2048 else job.scale.rounds
    )
    work = 4 * count * products(job, side, rule) / seconds / 1e12
    job.report.add(f"{name}: a step", seconds, "s", reference=reference, note=f"{work:.0f} TFLOP/s")
    return seconds


def products(job: Job, side: int, rule: str | None) -> int:
    """Multiply-adds of one picture and one prompt."""
    config = job.scale.transformer
    return multiply_adds(config, side, side, 300, resolve(rule, config, side, side) if rule else ())
