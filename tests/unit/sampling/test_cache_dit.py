"""Which steps are forecast, against cache-dit's DBCache with TaylorSeer on diffusers' own class.

Its threshold is so high that every step is near enough to be cached. What is left are its warm-up and its
limit of cached steps in a row: those of a forecast, which begins after ORDER + 1 computed steps.
"""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling import guidance
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.forecast import ForecastRun
from pixart_sigma.settings import Settings

LAYERS, CHANNELS = 6, 16
ORDER = 1
ALWAYS_NEAR = 1e9


class Network:
    """diffusers' transformer as `guide` calls it; asked: of each call the timestep, and how many of its
    blocks were computed."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformer = PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=LAYERS,
                cross_attention_dim=CHANNELS,
                sample_size=16,
                caption_channels=CHANNELS,
                use_additional_conditions=False,
            )
        self.transformer = transformer.eval().requires_grad_(False)
        self.asked: list[tuple[float, int]] = []
        self._blocks = 0
        for block in transformer.transformer_blocks:
            block.register_forward_hook(self._count)

    def _count(self, *_):
        self._blocks += 1

    def __call__(self, latents, timestep, prompt_embeds, prompt_mask):
        self._blocks = 0
        answer = self.transformer(
            latents,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=prompt_mask,
            timestep=timestep.expand(len(latents)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        self.asked.append((float(timestep), self._blocks))
        return answer[:, :4]


@pytest.fixture
def network():
    return Network()


def run(network, steps: int, speed: str = "off") -> None:
    random = torch.Generator().manual_seed(0)
    shapes = (1, 4, 8, 8), (1, 5, CHANNELS), (1, 2, CHANNELS)
    noise, positive, negative = (torch.randn(shape, generator=random) for shape in shapes)
    settings = Settings(steps=steps, speed=speed)
    prompts = Prompts(positive, negative_embeds=negative)
    denoise(guidance.guide(network, prompts, settings), noise, settings)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("skipped", [1, 2])
def test_the_steps_that_are_computed_are_those_of_cache_dit(network, monkeypatch, steps, skipped):
    cache_dit = pytest.importorskip("cache_dit", reason="no cache-dit: pip install cache-dit")
    runs = []

    class Kept(ForecastRun):
        def __init__(self, savings):
            super().__init__(savings)
            runs.append(self)

    monkeypatch.setattr(guidance, "ForecastRun", Kept)
    run(network, steps, f"forecast:{ORDER}:{skipped}")
    ours = [timestep for timestep, _ in runs[0].computed]
    assert network.asked == [(timestep, LAYERS) for timestep in ours]
    network.asked.clear()
    cache_dit.enable_cache(
        network.transformer,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=ORDER + 1,
            max_continuous_cached_steps=skipped,
            residual_diff_threshold=ALWAYS_NEAR,
            num_inference_steps=steps,
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=ORDER),
    )
    # Else it goes on with what it has seen before.
    cache_dit.refresh_context(network.transformer, num_inference_steps=steps)
    run(network, steps)
    cache_dit.disable_cache(network.transformer)
    assert len(network.asked) == steps
    assert {blocks for _, blocks in network.asked} == {1, LAYERS}
    assert ours == [timestep for timestep, blocks in network.asked if blocks == LAYERS]
