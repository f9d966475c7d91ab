"""The planner node: its outputs are what the other nodes take."""

import comfy.model_management as management
import pytest
import torch
from pack.nodes.decode import TILINGS
from pack.nodes.host.planner import make_plan
from pack.nodes.planner import VRAMPlanner
from pack.pixart_sigma.choices import T5_DEVICES, T5_PRECISIONS
from pack.pixart_sigma.errors import SigmaError


def test_the_plan_fits_the_other_nodes():
    for budget, size, expected in (
        (8.0, 1024, ("int8", "auto", "auto", "off", 0.0)),
        (2.0, 2048, ("bf16", "stream", "auto", "strips")),
        (1.0, 1024, ("bf16", "stream", "auto", "strips")),
    ):
        *settings, table = VRAMPlanner.execute(budget, size, size, 1).result
        assert tuple(settings)[: len(expected)] == expected, settings
        precision, device, _, tiling, decode_budget = settings
        assert precision in T5_PRECISIONS and device in T5_DEVICES and tiling in TILINGS
        assert decode_budget <= budget and "transformer" in table and "GB" in table
        assert ("in one pass, loaded partially by ComfyUI" in table) == (budget == 1.0)


def test_the_budget_is_the_memory_there_is_unless_it_is_given():
    total = management.get_total_memory(torch.device("cpu")) - management.extra_reserved_memory()
    assert make_plan(0, 256, 256, 1).budget == total
    with pytest.raises(SigmaError, match="too small for the transformer"):
        make_plan(0.2e9, 1024, 1024, 1)


def test_more_than_the_graphics_card_has_is_refused(monkeypatch):
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    with pytest.raises(SigmaError, match="and this graphics card has"):
        make_plan(1e15, 1024, 1024, 1)
