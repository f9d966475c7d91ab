"""What the stages cost is recorded, and the report shows it truthfully. On the CPU."""

import json
import time

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import CurrentNodeContext
from pack.nodes.host.memory import Stage, record, stages
from pack.nodes.host.memory_picture import BAR, LEFT, TOP, draw
from pack.nodes.host.release import release
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.host.vae import load_vae
from pack.nodes.memory import MemoryReport, ReleaseModel
from pack.pixart_sigma import DEMO

BUDGET_LINE, OVER_BUDGET, BEFORE = (0xB3, 0x26, 0x1E), (0xE4, 0x57, 0x2E), (0x9A, 0xA5, 0xB1)
TEXT = (0x22, 0x22, 0x22)


def test_the_nodes_have_a_description_that_the_host_can_read():
    assert ReleaseModel.GET_NODE_INFO_V1() and MemoryReport.GET_NODE_INFO_V1()


def test_a_report_before_the_first_run_says_so():
    """The first one in this process that would record."""
    picture, table, figures = MemoryReport.execute().result
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and "has run yet" in table
    assert json.loads(figures)["stages"] == json.loads(figures)["held"] == []
    assert json.loads(figures)["budget"] is None


def test_a_stages_peak_and_time_are_recorded_also_when_it_fails():
    with CurrentNodeContext("run 1", "1"):
        with record("Encode the prompts"):
            block = torch.ones(100_000_000 // 4)
            time.sleep(0.1)
            del block
        with pytest.raises(KeyboardInterrupt), record("A stage that fails"):
            raise KeyboardInterrupt
    first, second = stages()
    assert first.peak - first.before > 80e6 and first.after - first.before < 40e6 and first.seconds > 0.1
    assert second.name == "A stage that fails"
    for _ in range(60):
        with record("Decode"):
            pass
    assert len(stages()) == 50


def test_the_report_is_of_the_last_run():
    with CurrentNodeContext("run 2", "1"), record("Decode"):
        pass
    held = []
    with CurrentNodeContext("run 3", "1"):
        for name in ("Encode the prompts", "Sample", "Decode with a name that is too long"):
            with record(name):
                held.append(torch.ones(50_000_000 // 4))
    assert [stage.name for stage in stages()][:2] == ["Encode the prompts", "Sample"] and len(stages()) == 3
    picture, table, _ = MemoryReport.execute(after="picture").result
    assert picture.dtype == torch.float32 and 0 <= picture.min() < picture.max() <= 1
    first_words = [line.split()[0] for line in table.splitlines()]
    assert first_words == ["Memory", "stage", "Encode", "Sample", "Decode"]


def make_patcher(name, size) -> ModelPatcher:
    module = type(name, (torch.nn.Module,), {})()
    module.weight = torch.nn.Parameter(torch.zeros(size // 4), requires_grad=False)
    return ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture
def held():
    """What the host holds after a run that another pack's models were loaded before."""
    sizes = {"Foreign": 40_000_000, "Evicted": 20_000_000, "Ours": 80_000_000}
    foreign, evicted, ours = (make_patcher(*given) for given in sizes.items())
    comfy.model_management.load_models_gpu([foreign, evicted])
    with CurrentNodeContext("run 4", "1"):
        with record("Sample"):
            release(evicted, "offload")
            comfy.model_management.load_models_gpu([ours])
            activations = torch.ones(400_000_000 // 4)
            release(ours, "free")
            del activations
        with record("Decode"):
            comfy.model_management.load_models_gpu([ours])
        with record("Decode again"):
            comfy.model_management.load_models_gpu([ours])
    return foreign, ours


def test_other_packs_models_are_told_apart_from_what_a_stage_loads_and_frees(held):
    assert [(stage.loaded, stage.freed) for stage in stages()] == [
        (80_000_000, 100_000_000),
        (80_000_000, 0),
        (0, 0),
    ]
    first = stages()[0]
    assert first.peak - first.before > 300e6
    budget = (first.before + first.peak) / 2
    picture, table, figures = MemoryReport.execute(budget=budget / 1e9).result
    report = json.loads(figures)
    assert [model["model"] for model in report["held"]] == ["Ours", "Foreign"]
    assert report["held"][0] == {"model": "Ours", "device": "cpu", "bytes": 80_000_000}
    assert report["budget"] == int(budget) and report["stages"][0]["freed"] == 100_000_000
    assert "over budget" in table and "still held: Foreign, 40 MB on cpu" in table and "budget:" in table

    line, over = columns(picture, BUDGET_LINE), columns(picture, OVER_BUDGET)
    assert min(abs(x - (250 + 590 * budget / first.peak)) for x in line) < 2
    assert max(over) == 840 and columns(picture, BEFORE)
    assert json.loads(MemoryReport.execute().result[2])["budget"] is None


def columns(picture, color) -> list[int]:
    """Where a colour is, from the left."""
    pixels = (picture[0] * 255).round().int()
    return (pixels == torch.tensor(color)).all(-1).any(0).nonzero().flatten().tolist()


def test_a_row_says_which_model_was_released_and_by_which_node():
    models = make_patcher("Ours", 40_000), load_clip(DEMO, "fp32", "auto"), load_vae(DEMO)
    for node, model in enumerate(models):
        with CurrentNodeContext("run 5", str(node)):
            ReleaseModel.execute("picture", model, "offload")
    assert [(stage.name, stage.node) for stage in stages()] == [
        ("Release MODEL", "0"),
        ("Release CLIP", "1"),
        ("Release VAE", "2"),
    ]
    _, table, figures = MemoryReport.execute().result
    assert [line.split()[:3] for line in table.splitlines()[2:5]] == [
        ["Release", "MODEL", "0"],
        ["Release", "CLIP", "1"],
        ["Release", "VAE", "2"],
    ]
    assert [stage["node"] for stage in json.loads(figures)["stages"]] == ["0", "1", "2"]


@pytest.mark.parametrize("peak", [6.9, 7.2, 7.7, 7.99])
def test_the_budgets_line_crosses_no_figure(peak):
    """Its label stands above the rows."""
    sizes = {"before": 10**9, "peak": int(peak * 1e9), "after": 10**9, "loaded": 10**9, "freed": 10**9}
    rows = [Stage(name="Sample", node="3", seconds=1.0, **sizes)]
    without = columns(draw("", rows, [])[:, TOP : TOP + BAR, LEFT:], TEXT)
    picture = draw("", rows, [], budget=8 * 10**9)
    line = columns(picture[:, TOP : TOP + BAR, LEFT:], BUDGET_LINE)
    figure = columns(picture[:, TOP : TOP + BAR, LEFT:], TEXT)
    assert len(line) == 2 and len(figure) == len(without)
    assert max(figure) < min(line) - 3 or min(figure) > max(line) + 3
    assert columns(picture[:, TOP + BAR + 1 :, LEFT:], BUDGET_LINE) == []


@pytest.mark.parametrize("budget", [-1.0, float("nan")])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="budget"):
        MemoryReport.execute(budget=budget)


def test_a_report_is_never_cached():
    assert MemoryReport.fingerprint_inputs() != MemoryReport.fingerprint_inputs()
