"""The decode in strips against the whole one on the device, and what happens where memory really runs out."""

import pytest
import torch
from gpu_device import at_most, relative, settled_bytes

from pixart_sigma.errors import SigmaError
from pixart_sigma.memory.measure import free_bytes
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.transformer.stage import Pass
from pixart_sigma.vae.coding import encode
from pixart_sigma.vae.layers import read_decoder
from pixart_sigma.vae.loading import SDXL_VAE, build_vae
from pixart_sigma.vae.memory import least_budget, whole_decode_bytes
from pixart_sigma.vae.stage import decode, decode_and_tell

SMALL = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
PROMPT = "a red square to the left of a blue star"


@pytest.fixture(scope="module")
def vae(on_gpu):
    made = build_vae(SDXL_VAE | ({} if on_gpu else SMALL))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in made.state_dict().items():
        numbers = torch.randn(weight.shape, generator=generator)
        spread = 0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5
        weights[name] = numbers * spread + ("norm" in name and name.endswith("weight"))
    made.load_state_dict(weights, assign=True)
    return made.eval().requires_grad_(False)


@pytest.fixture
def latents(on_gpu) -> torch.Tensor:
    side = 64 if on_gpu else 16
    return torch.randn(1, 4, side, side + 8, generator=torch.Generator().manual_seed(1))


def shape_of(latents, dtype):
    return latents.shape[2], latents.shape[3], dtype.itemsize


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=str)
def test_strips_are_the_whole_decode(device, on_gpu, vae, latents, dtype, tolerance):
    if not on_gpu and dtype == torch.bfloat16:
        pytest.skip("a CPU takes a minute for what it has no instructions for")
    vae.to(device, dtype)
    decoder = read_decoder(vae)
    budget = 1.5 * least_budget(decoder, *shape_of(latents, dtype))
    assert budget < whole_decode_bytes(decoder, *shape_of(latents, dtype))
    before = settled_bytes(device)
    strips, whole = decode(vae, latents, "strips", budget), decode(vae, latents, "whole")
    assert strips.device.type == "cpu" and relative(strips, whole) < tolerance
    left = settled_bytes(device) - before
    assert left == (0 if device.type == "cuda" else strips.nbytes + whole.nbytes)


def test_both_directions_are_those_of_the_cpu(device, vae, latents):
    picture = torch.rand(1, 3, 8 * latents.shape[2], 8 * latents.shape[3])
    found = []
    for place in (device, "cpu"):
        vae.to(place, torch.float32)
        found.append((decode(vae, latents, "whole"), encode(vae, picture)))
    for ours, expected in zip(*found, strict=True):
        assert relative(ours, expected) < 1e-3


def test_a_decode_that_does_not_fit_goes_on_in_strips(cuda, vae, latents):
    vae.to(cuda, torch.float32)
    whole = decode(vae, latents, "whole")
    weights = settled_bytes(cuda)
    decoder = read_decoder(vae)
    needed = whole_decode_bytes(decoder, *shape_of(latents, torch.float32))
    with at_most(weights + int(0.7 * needed), cuda):
        assert free_bytes(cuda) <= 0.7 * needed
        # As it is told that there is more than there is.
        picture, chosen = decode_and_tell(vae, latents, "auto", 1.2 * needed)
    assert chosen["decode"] == "strips" and relative(picture, whole) < 1e-3
    assert settled_bytes(cuda) == weights


def test_a_stage_that_runs_out_of_memory_runs_in_a_smaller_way(cuda):
    pipeline = SigmaPipeline.from_path("demo", Ways(device=str(cuda)))
    before, tried = settled_bytes(cuda), []

    def use(transformer, in_turn):
        tried.append((pipeline.transformer._held_place, in_turn))
        room = torch.ones(2**20, device=cuda)
        if len(tried) < 4:
            torch.empty(2**50, device=cuda)  # more than any card has
        return float(room.sum())

    result, ways = pipeline.transformer.run(use, Pass(256, 256), Ways())
    assert result == 2**20 and tried == [
        (place, turn) for place in ("auto", "stream") for turn in (False, True)
    ]
    assert ways.transformer_device == "stream" and ways.guidance_in_turn
    assert settled_bytes(cuda) == before

    def never(transformer, in_turn):
        torch.empty(2**50, device=cuda)

    with pytest.raises(SigmaError, match="Memory ran out in the transformer"):
        pipeline.transformer.run(never, Pass(256, 256), Ways())
    assert settled_bytes(cuda) == before


def test_a_run_within_a_limit_is_the_run_without(cuda):
    """The allocator refuses more than the budget, so the plan holds or there is no picture."""
    settings = Settings(PROMPT, steps=4, width=512, height=512, binning=False)
    pipeline = SigmaPipeline.from_path("demo", Ways(device=str(cuda), dtype="fp32"))
    expected = pipeline.generate(settings).latents
    budget = 60_000_000
    with at_most(settled_bytes(cuda) + budget + 100_000_000, cuda):  # and what the libraries work in
        made = pipeline.generate(settings, Ways(device=str(cuda), dtype="fp32", budget=budget))
    assert relative(made.latents, expected) < 1e-3
