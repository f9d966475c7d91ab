"""A plan for the device that the host computes on."""

from dataclasses import replace

import comfy.model_management as management
import torch

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.planner import Plan, plan
from ...pixart_sigma.settings import Settings, Ways


def make_plan(budget: float, width: int, height: int, count: int) -> Plan:
    """The plan for `budget` bytes, or for what the device has if it is 0. Where the host has no graphics card
    it is made for one with this budget. Where it streams the transformer it says that the host loads it
    partially, which is the host's own way to need less.

    Raises SigmaError for more than the card has, and for a budget in which a stage does not fit.
    """
    device = management.get_torch_device()
    total = management.get_total_memory(device)
    if budget > total and not management.is_device_cpu(device):
        raise SigmaError(
            f"The budget is {budget / 1e9:.1f} GB, and this graphics card has {total / 1e9:.1f} GB. Give "
            "less, or 0 for what it has."
        )
    settings = Settings(width=width, height=height, count=count, binning=False)
    ways = Ways(budget=budget or total - management.extra_reserved_memory())
    made = plan(settings, ways, dtype=_dtype(device))
    return _loaded_partially(made) if made.ways.transformer_device == "stream" else made


def _loaded_partially(made: Plan) -> Plan:
    stage = made.stages["transformer"]
    how = stage.how.replace("streamed", "loaded partially by ComfyUI")
    stages = made.stages | {"transformer": replace(stage, how=how)}
    return replace(made, stages=stages, why=made.why.replace(stage.how, how))


def _dtype(device: torch.device) -> torch.dtype:
    """What the host computes in on this card."""
    if management.is_device_cpu(device) or management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if management.should_use_fp16(device) else torch.float32
