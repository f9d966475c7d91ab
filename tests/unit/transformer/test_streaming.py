"""The streamed transformer: equal to the resident one, in the memory of two blocks, whatever goes wrong."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image

from pixart_sigma.cli.commands import main
from pixart_sigma.errors import SigmaError
from pixart_sigma.memory import block_buffers
from pixart_sigma.memory.block_buffers import BlockBuffers, PinnedMemory
from pixart_sigma.memory.measure import live_bytes, peak_bytes
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.planner import Models
from pixart_sigma.planner import plan as make_plan
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.transformer.config import XL_2, KVWeights
from pixart_sigma.transformer.kv_rules import KVCompression
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.network import build_transformer
from pixart_sigma.transformer.stage import Pass
from pixart_sigma.transformer.streaming import StreamedTransformer, stream_blocks, window_nbytes

CPU = torch.device("cpu")
GB = 10**9
TRAINED = KVWeights(2, (1, 2))


def make(kv=None, qk_norm=False, dtype=torch.float32):
    """A random transformer of three blocks; the same one at every call."""
    config = replace(
        XL_2,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_channels=24,
        cross_attention_dim=16,
        kv_compression=kv,
        qk_norm=qk_norm,
    )
    return with_weights(build_transformer(config), dtype)


def with_weights(transformer, dtype):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (0.3 * torch.randn(weight.shape, generator=generator)).to(dtype)
        for name, weight in transformer.state_dict().items()
    }
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


def make_input(height=8, width=8, batch=1, tokens=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator).to(dtype)
    embeds = torch.randn(batch, tokens, 24, generator=generator).to(dtype)
    return latents, torch.tensor([700]), embeds


# ---- equality


@pytest.mark.parametrize("way", ["from RAM", "through two buffers"])
@pytest.mark.parametrize(
    ("model", "inputs", "settings"),
    [
        ({}, {}, {}),
        ({}, {"height": 6, "width": 13}, {}),
        ({}, {"batch": 2}, {}),
        ({}, {}, {"kv_compression": (KVCompression("mean", 2, (0, 2)),)}),
        ({"kv": TRAINED, "qk_norm": True}, {"height": 10}, {}),
        ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "batch": 2}, {}),
    ],
    ids=["square", "rectangle", "two", "compressed", "trained compression", "bfloat16"],
)
def test_it_equals_the_resident_one_bit_for_bit(request, way, model, inputs, settings):
    if way == "through two buffers":
        request.getfixturevalue("parked")
    resident, streamed = make(**model), stream_blocks(make(**model), CPU)
    for timestep in (700, 20):
        latents, _, embeds = make_input(**inputs)
        expected = resident(latents, timestep, embeds, **settings)
        assert torch.equal(streamed(latents, timestep, embeds, **settings), expected)
    assert bool(streamed._parked) == (way == "through two buffers")
    for name, weight in resident.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_loaded_from_a_file(diffusers_file, parked, dtype):
    resident = load_transformer(diffusers_file, dtype, variant="1024")
    streamed = load_transformer(diffusers_file, dtype, variant="1024", stream=True)
    assert isinstance(streamed, StreamedTransformer) and not isinstance(resident, StreamedTransformer)
    assert not any(weight.requires_grad for weight in streamed.parameters())
    latents, embeds = torch.ones(1, 4, 8, 8, dtype=dtype), torch.ones(1, 3, 64, dtype=dtype)
    assert torch.equal(streamed(latents, 9, embeds), resident(latents, 9, embeds))


# ---- memory


def test_the_window_of_published_blocks_is_what_a_call_takes(parked):
    config = replace(XL_2, num_layers=3)
    streamed = stream_blocks(with_weights(build_transformer(config), torch.bfloat16), CPU)
    latents = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    embeds = torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    taken = peak_bytes(CPU, lambda: streamed(latents, 9, embeds))
    beside = [weight for name, weight in streamed.named_parameters() if "transformer_blocks" not in name]
    counted = taken + sum(weight.numel() * weight.element_size() for weight in beside)
    predicted = window_nbytes(build_transformer(XL_2), torch.bfloat16)
    assert counted == pytest.approx(predicted, rel=0.1)
    assert predicted < 0.12 * GB


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_middle_leaves_nothing(parked, monkeypatch, error):
    streamed, latents = stream_blocks(make(), CPU), make_input()
    expected = streamed(*latents)
    buffers = []

    class Watched(BlockBuffers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            buffers.extend(weakref.ref(buffer) for buffer in self.bytes)

    def stop(*_, **__):
        raise error("in the middle")

    monkeypatch.setattr(block_buffers, "BlockBuffers", Watched)
    gc.collect()
    before = live_bytes(CPU)
    forward = streamed.transformer_blocks[1].forward
    streamed.transformer_blocks[1].forward = stop
    with pytest.raises(error) as raised:
        streamed(*latents)
    # Also while the error is kept.
    assert len(buffers) == 2 and not any(buffer() is not None for buffer in buffers)
    in_ram = {block_bytes.untyped_storage().data_ptr() for block_bytes in streamed._parked}
    assert {w.untyped_storage().data_ptr() for w in streamed.transformer_blocks.parameters()} == in_ram
    del raised
    gc.collect()
    assert live_bytes(CPU) == before
    streamed.transformer_blocks[1].forward = forward
    assert torch.equal(streamed(*latents), expected)


def test_nothing_is_left_pinned(parked, monkeypatch):
    unpinned = []
    monkeypatch.setattr(block_buffers, "_unpin", unpinned.append)
    streamed = stream_blocks(make(), CPU)
    del streamed
    gc.collect()
    assert len(unpinned) == 1


def test_ram_that_can_not_be_pinned_serves_as_well(parked, monkeypatch):
    def refuse(*_):
        raise RuntimeError("CUDA refused to pin 1 bytes of RAM (error 2)")

    monkeypatch.setattr(PinnedMemory, "allocate", refuse)
    assert torch.equal(stream_blocks(make(), CPU)(*make_input()), make()(*make_input()))


# ---- the pipeline


def demo(**settings) -> SigmaPipeline:
    return SigmaPipeline.from_path("demo", Ways(device="cpu", **settings))


def draw(pipeline, **settings) -> torch.Tensor:
    settings = {"width": 128, "height": 64, "steps": 2, "binning": False} | settings
    return pipeline.generate(Settings("a red circle", "blue", **settings)).latents


@pytest.mark.parametrize("release", ["free", "offload", "keep"])
def test_the_pipeline_draws_the_same(parked, release):
    pipeline = demo(transformer_device="stream", release=release)
    expected = draw(demo())
    assert torch.equal(draw(pipeline), expected)
    assert torch.equal(draw(pipeline), expected)
    held = pipeline.stages._held.get("transformer")
    assert (held is None) if release == "free" else isinstance(held, StreamedTransformer)


def test_a_plan_streams_and_uses_what_it_says(parked):
    pipeline = demo(measure=True, release="keep")
    found, settings = pipeline.components, Settings("a red circle", "blue", steps=2)
    models = Models.read(found.checkpoint, found.text_encoder, found.vae)

    def planned_for(place):
        ways = replace(pipeline.ways, budget=GB, transformer_device=place)
        return make_plan(settings, ways, models, dtype=torch.float32)

    resident = pipeline.generate(settings, planned_for("auto").ways).latents
    assert not isinstance(pipeline.stages._held["transformer"], StreamedTransformer)
    pipeline.stages.drop("transformer")
    made = planned_for("stream")
    assert made.ways.transformer_device == "stream"
    assert torch.equal(pipeline.generate(settings, made.ways).latents, resident)
    assert isinstance(pipeline.stages._held["transformer"], StreamedTransformer)
    cost, planned = pipeline.stages.costs["transformer"], made.stages["transformer"]
    # The device is the CPU, so what waits in RAM counts too.
    assert cost.peak - cost.before == pytest.approx(planned.peak + planned.ram, rel=0.1)


def test_a_run_without_memory_streams_in_the_end(parked, monkeypatch, caplog):
    pipeline = demo(release="keep")
    expected = draw(pipeline)
    stage, places = pipeline.transformer, []
    ways, load = stage._ways, stage.load

    def ways_on_a_gpu(*arguments):
        stage.device = torch.device("cuda")  # as far as choosing goes
        try:
            return ways(*arguments)
        finally:
            stage.device = CPU

    def full(place):
        places.append(place)
        if place != "stream":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load(place)

    monkeypatch.setattr(stage, "_ways", ways_on_a_gpu)
    monkeypatch.setattr(stage, "load", full)
    pipeline.stages.drop("transformer")
    assert torch.equal(draw(pipeline), expected)
    assert places == ["auto", "auto", "stream"] and "runs again: in one pass, streamed" in caplog.text


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        ("cpu", ("auto", False, True), ["in one pass", "in turn"]),
        ("cpu", ("stream", False, False), ["in one pass, streamed"]),
        ("cuda", ("auto", True, True), ["in turn", "in one pass, streamed", "in turn, streamed"]),
        ("cuda", ("auto", False, False), ["in one pass", "in one pass, streamed"]),
        ("cuda", ("stream", True, True), ["in turn, streamed"]),
    ],
)
def test_the_ways_go_from_what_is_asked_for_to_smaller_ones(device, asked, expected):
    stage = demo().transformer
    stage.device = torch.device(device)
    place, in_turn, guided = asked
    ways = stage._ways(Pass(64, 64, guided=guided), Ways(transformer_device=place, guidance_in_turn=in_turn))
    assert [way.how.replace("prompt and negative prompt ", "") for way in ways] == expected
    assert [tuple(way.chosen.values()) for way in ways] == [
        ("stream" if "streamed" in name else "auto", "turn" in name) for name in expected
    ]


def test_a_place_that_there_is_not_is_refused():
    with pytest.raises(SigmaError, match="transformer_device is 'cpu'; choose one of auto, stream"):
        demo(transformer_device="cpu")


# ---- the planner


def plan(budget, size, models, in_ram=False, **ways):
    """Of a square of exactly this size."""
    settings = Settings(width=size, height=size, binning=False)
    return make_plan(settings, Ways(budget=budget, **ways), models, in_ram=in_ram)


@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0, 1.3])
def test_a_small_budget_streams(budget):
    made = plan(budget * GB, 1024, models=Models.published())
    stage = made.stages["transformer"]
    assert made.ways.transformer_device == "stream" and "streamed" in stage.how
    assert made.peak <= budget * GB and stage.weights < stage.peak
    assert stage.ram == pytest.approx(1.19 * GB, rel=0.01)
    assert "transformer: in one pass needs 1.44 GB, so it is" in made.why and stage.how in made.why
    assert made.ways.guidance_in_turn == (budget == 0.3)


def test_only_a_small_budget_streams():
    models = Models.published()
    assert plan(1.6 * GB, 1024, models).ways.transformer_device == "auto"
    assert plan(2.5 * GB, 4096, models).ways.guidance_in_turn  # is tried before
    assert plan(8 * GB, 1024, models, transformer_device="stream").ways.transformer_device == "stream"
    for place in ("auto", "stream"):
        made = plan(8 * GB, 1024, models, in_ram=True, transformer_device=place)
        assert made.ways.transformer_device == "auto" and not made.stages["transformer"].ram
    with pytest.raises(SigmaError, match="too small for the transformer"):
        plan(1 * GB, 1024, models, in_ram=True, t5_precision="int8", t5_device="cpu")


def test_the_commands(capsys, tmp_path):
    assert main(["plan", "--budget", "1GB", "--size", "1024x1024"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("transformer"))
    assert "in one pass, streamed" in row
    assert main(["plan", "--budget", "1GB", "--size", "1024x1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transformer_device"] == "stream"
    pictures = []
    for place in ("auto", "stream"):
        pictures.append(tmp_path / f"{place}.png")
        arguments = ["--size", "64x64", "--steps", "1", "--device", "cpu", "--out", str(pictures[-1])]
        assert main(["generate", "a red circle", *arguments, "--transformer-device", place]) == 0
    first, second = (Image.open(picture) for picture in pictures)
    assert first.tobytes() == second.tobytes()
