"""Whole runs within the memory of small cards, as `plan` has them: they must finish, at its peaks."""

import time
from dataclasses import replace

import torch
from measuring import at_most

from pixart_sigma.memory.measure import live_bytes
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
    reserved = []  # by the allocator at the most, stage by stage

    def look(stage: str = "") -> None:
        if job.device.type == "cuda":
            reserved.append(torch.cuda.max_memory_reserved(job.device))

    with at_most(live_bytes(job.device) + limit, job.device):
        start = time.perf_counter()
        made = pipeline.generate(settings, asked, on_stage=look)
        seconds = time.perf_counter() - start
        look()
    peaks = []
    for stage, cost in pipeline.stages.costs.items():
        planned = plan.stages[stage]
        peaks.append(cost.peak - cost.before)
        job.report.size(f"{name}: {stage}", peaks[-1], planned.peak, note=planned.how)
        job.report.add(f"{name}: {stage}, seconds", cost.seconds, "s")
    ran = made.metadata.ways
    words = ("t5_precision", "t5_device", "transformer_device", "guidance_in_turn", "decode")
    other = [
        f"{word} was {getattr(ran, word)}" for word in words if getattr(ran, word) != getattr(plan.ways, word)
    ]
    note = "; ".join(
        [*(other or ["as planned"]), *(f"{max(reserved) / 1e9:.2f} GB reserved" for _ in reserved[:1])]
    )
    job.report.size(f"{name}: run", max(peaks), plan.peak, note=note)
    job.report.add(f"{name}: seconds", seconds, "s")
