"""Whole runs of the demo on the device against the CPU's, and what is left there after them."""

from dataclasses import replace

import pytest
import torch
from gpu_device import relative, settled_bytes
from PIL import Image
from safetensors.torch import save_file

from pixart_sigma import DEMO, ControlPicture
from pixart_sigma.memory.measure import StorageMeter, make_meter
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.runs import Run
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.studies.calibration import calibrate_pipeline
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.controlnet_file import build_controlnet
from pixart_sigma.transformer.converting import convert

PROMPT = "a red square to the left of a blue star"
CASES = {
    **{name: {"scheduler": name} for name in ("sa_solver", "euler", "euler_ancestral", "unipc", "lcm")},
    "dpmpp_2m in 20 steps": {"steps": 20},
    "ddim with fresh noise": {"scheduler": "ddim", "eta": 0.7},
    "one step": {"scheduler": "one_step"},
    "recipe": {"recipe": "phased-4", "transformer": "demo-phased"},
    "trained kv compression": {"transformer": "demo-kv"},
    "kv compression by means": {"kv_compression": "mean:2:all"},
    "forecast steps": {"speed": "forecast:1:1:10-95%", "steps": 8},
    "attention guidance": {"guidance_scale": 1.0, "nag_scale": 5.0, "negative": "blue"},
    "two pictures off the grid": {"count": 2, "width": 200, "height": 136, "binning": False},
    "karras": {"spacing": "karras", "scheduler": "euler"},
}


@pytest.fixture(scope="module")
def asked(on_gpu) -> dict:
    """The size and the steps of a run: the demo's own on a GPU, and what a CPU makes in a second."""
    return {"steps": 8} if on_gpu else {"steps": 3, "width": 64, "height": 64, "binning": False}


def make(device, dtype="fp32", transformer=None, **ways) -> SigmaPipeline:
    return SigmaPipeline.from_path(
        "demo", Ways(device=str(device), dtype=dtype, **ways), transformer=transformer
    )


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu(device, asked, case):
    chosen = asked | CASES[case]
    transformer = chosen.pop("transformer", None)
    if "recipe" in chosen:
        del chosen["steps"]
    settings = Settings(PROMPT, **chosen)
    made, expected = (make(place, transformer=transformer).generate(settings) for place in (device, "cpu"))
    assert relative(made.latents, expected.latents) < 1e-3
    for picture, other in zip(made.images, expected.images, strict=True):
        assert picture.size == other.size
        difference = torch.tensor(list(picture.getdata())) - torch.tensor(list(other.getdata()))
        assert difference.abs().max() <= 3


def test_a_painted_part_of_a_picture_is_that_of_the_cpu(device, asked):
    image, mask = Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L")
    settings = Settings(PROMPT, strength=0.6, **asked)
    made, expected = (make(place).generate(settings, image=image, mask=mask) for place in (device, "cpu"))
    assert relative(made.latents, expected.latents) < 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_finite_and_near(device, on_gpu, asked, dtype):
    if not on_gpu and dtype == "fp16":
        pytest.skip("a CPU takes half a minute for what it has no instructions for")
    settings = Settings(PROMPT, **asked)
    made, expected = (make(device, name).generate(settings) for name in (dtype, "fp32"))
    assert made.latents.isfinite().all() and made.metadata.ways.dtype == dtype
    assert relative(made.latents, expected.latents) < 0.5  # what is not the picture is more than 1 away


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "ways",
    [{"transformer_device": "stream"}, {"t5_device": "stream"}, {"t5_device": "cpu"}, {"release": "keep"}],
    ids=str,
)
def test_another_place_gives_the_same_latents(device, on_gpu, asked, ways, dtype):
    """Streamed bit for bit; where the CPU encodes, as nearly as it computes."""
    if not on_gpu and dtype == "bf16":
        pytest.skip("a CPU takes two minutes for what it has no instructions for")
    pipeline, plain = make(device, dtype, **ways), make(device, dtype)
    settings = Settings(PROMPT, **asked)
    expected = plain.generate(settings).latents
    for _ in range(2):
        latents = pipeline.generate(settings).latents
        if "t5_device" in ways and ways["t5_device"] == "cpu":
            assert relative(latents, expected) < 1e-3
        else:
            assert torch.equal(latents, expected)


def test_prompts_in_turn_are_those_in_one_call(device, asked):
    settings = Settings(PROMPT, negative="a white canvas", **asked)
    made, expected = (
        make(device, guidance_in_turn=in_turn).generate(settings).latents for in_turn in (True, False)
    )
    assert relative(made, expected) < 1e-3


@pytest.mark.parametrize("place", ["auto", "stream"])
@pytest.mark.parametrize("form", ["int8", "fp8", "q8_0", "q5_0", "q4_0"])
def test_a_quantised_transformer_is_that_of_the_cpu(device, asked, tmp_path, form, place):
    file = tmp_path / f"demo{'.gguf' if form.startswith('q') else '.safetensors'}"
    convert(inspect(DEMO), form, file)
    settings = Settings(PROMPT, **asked)
    made = make(device, transformer=file, transformer_device=place).generate(settings).latents
    assert relative(made, make("cpu", transformer=file).generate(settings).latents) < 1e-3


@pytest.mark.parametrize("place", ["auto", "stream"])
def test_a_lora_acts_as_on_the_cpu(device, asked, tmp_path, place):
    generator = torch.Generator().manual_seed(0)
    layer = "transformer.transformer_blocks.1.attn1.to_q"
    tensors = {
        f"{layer}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for side, shape in (("A", (4, 192)), ("B", (192, 4)))
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    settings = Settings(PROMPT, **asked)
    made, expected = (
        make(where, transformer_device=streamed).with_adapters([tmp_path / "lora.safetensors"])
        for where, streamed in ((device, place), ("cpu", "auto"))
    )
    latents = made.generate(settings).latents
    assert relative(latents, expected.generate(settings).latents) < 1e-3
    assert relative(latents, make("cpu").generate(settings).latents) > 1e-3


def test_a_controlnet_acts_as_on_the_cpu(device, asked, tmp_path):
    config = replace(inspect(DEMO).config, num_layers=2, kv_compression=None)
    generator = torch.Generator().manual_seed(0)
    weights = build_controlnet(config).state_dict()
    save_file(
        {name: 0.05 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    (tmp_path / "config.json").write_text(f'{{"num_attention_heads": {config.num_attention_heads}}}')
    controls = [ControlPicture(tmp_path, Image.radial_gradient("L").convert("RGB"), 0.5)]
    settings = Settings(PROMPT, **asked)
    made, expected = (make(place).generate(settings, controls=controls).latents for place in (device, "cpu"))
    assert relative(made, expected) < 1e-3
    assert relative(made, make(device).generate(settings).latents) > 1e-3


def test_a_second_transformer_of_the_same_weights_is_a_run_of_one(device, asked):
    settings = Settings(PROMPT, scheduler="euler", **asked)
    expected = make(device).generate(settings).latents
    refined = make(device).with_refiner("demo").generate(replace(settings, refiner_start=0.7))
    assert torch.equal(refined.latents, expected)


def test_several_runs_together_are_each_alone(device, asked):
    pipeline = make(device)
    prompts = (PROMPT, "a large yellow triangle", "a star")
    every = [Settings(prompt, seed=seed, **asked) for seed, prompt in enumerate(prompts)]
    settled = [pipeline.settle(settings) for settings in every]
    runs = [Run(settings, pipeline.encode(settings, ways)[0]) for settings, ways in settled]
    together, _ = pipeline.denoise(runs, settled[0][1])
    for latents, settings in zip(together, every, strict=True):
        assert relative(latents[None], pipeline.generate(settings).latents) < 1e-3


def test_calibration_runs_on_the_device(device, on_gpu):
    if not on_gpu:
        pytest.skip("it makes some sixty runs; tests/unit/studies does so on a CPU")
    settings = Settings(PROMPT, width=128, height=128, binning=False)
    found = calibrate_pipeline(make(device), (PROMPT,), settings, 0.1)
    assert found.points and all(point.error >= 0 for point in found.points)


# ---- what is left


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("release", ["offload", "free"])
def test_no_byte_of_a_stage_is_left(device, on_gpu, asked, release, error, precision):
    if not on_gpu and (release == "offload" or precision == "nf4"):
        pytest.skip("a CPU has nowhere to offload to, and bitsandbytes packs 4 bit anew there")
    pipeline = make(device, release=release, t5_precision=precision)
    before = settled_bytes(device)
    drawn = []

    def stop(step):
        if error is not None and step.index == 1:
            raise error("in the middle")

    for _ in range(2):  # the second run finds what the first one has offloaded
        try:
            drawn.append(pipeline.generate(Settings(PROMPT, **asked), callback=stop).latents)
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert "in the middle" in str(raised)
        results = 0 if on_gpu else sum(latents.nbytes for latents in drawn)
        assert settled_bytes(device) - before == results
    assert len(drawn) == (2 if error is None else 0)
    assert not drawn or torch.equal(*drawn)


def test_the_meter_counts_what_the_allocator_does(cuda):
    """The peak of a run by the storages that live and by the allocator, which rounds each up to 512 bytes."""

    def peak(meter) -> int:
        with meter:
            make(cuda, release="free").generate(Settings(PROMPT, steps=2))
        return meter.peak - meter.before

    by_storages, by_allocator = peak(StorageMeter(cuda)), peak(make_meter(cuda))
    # Libraries keep buffers to work in, of which no tensor knows.
    assert by_storages <= by_allocator <= 1.1 * by_storages + 100e6
