"""Whole runs within the memory of small cards, as `plan` has them: they must finish, at its peaks."""

import time
from dataclasses import replace

import torch
from measuring import at_most

from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways

from .scale import PROMPT, Job


def measure(job: Job) -> None:
    ways = Ways(device=str(job.device), measure=True)
    pipeline = SigmaPipeline.from_path(job.folder, ways)
    for side, limit in job.scale.limits:
        name = f"{side}x{side} within {limit / 1e9:g} GB"
        with job.report.attempt(f"{name}: run"):
            run(job, pipeline, name, side, limit)


def run(job: Job, pipeline: SigmaPipeline, name: str, side: int, limit: float) -> None:
    settings = Settings(PROMPT, width=side, height=side, binning=False, steps=job.scale.steps)
    asked = replace(pipeline.ways, budget=limit)
    plan = pipeline.plan(settings, asked)
    on_gpu, reserved = job.device.type == "cuda", 0
    before = torch.cuda.memory_allocated(job.device) if on_gpu else 0
    with at_most(before + limit, job.device):
        start = time.perf_counter()
        made = pipeline.generate(settings, asked)
        seconds = time.perf_counter() - start
        if on_gpu:
            reserved = torch.cuda.max_memory_reserved(job.device)
            torch.cuda.reset_peak_memory_stats(job.device)
    peaks = []
    for stage, cost in pipeline.stages.costs.items():
        planned = plan.stages[stage]
        peaks.append(cost.peak - cost.before)
        job.report.size(f"{name}: {stage}", peaks[-1], planned.peak, note=planned.how)
        job.report.add(f"{name}: {stage}, seconds", cost.seconds, "s")
    ran = made.metadata.ways
    planned_ways = {
        key: getattr(plan.ways, key) for key in ("t5_precision", "t5_device", "transformer_device")
    }
    other = [
        f"{key} was {getattr(ran, key)}" for key, value in planned_ways.items() if getattr(ran, key) != value
    ]
    job.report.size(
        f"{name}: run",
        max(peaks),
        plan.peak,
        note="; ".join(other or ["as planned"]) + f"; reserved {reserved / 1e9:.2f} GB",
    )
    job.report.add(f"{name}: seconds", seconds, "s")
