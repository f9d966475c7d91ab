"""What a forward pass is predicted to cost is what it costs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart_sigma.memory.measure import peak_bytes
from pixart_sigma.transformer.config import XL_2, KVWeights
from pixart_sigma.transformer.controlnet import Control, ControlHooks
from pixart_sigma.transformer.controlnet_file import build_controlnet
from pixart_sigma.transformer.cost import activation_bytes, multiply_adds
from pixart_sigma.transformer.kv_rules import parse
from pixart_sigma.transformer.network import build_transformer


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (2048, 2048), (768, 1360), (4096, 4096)])
@pytest.mark.parametrize(
    "setting", ["off", "mean:2:deep", "mean:4:all", "uniform:3:all", "conv:2:deep", "conv:4:all"]
)
def test_multiply_adds_are_those_that_are_run(size, setting):
    """XL/2 on the meta device, which counts and computes nothing; a block of each kind stands for all."""
    rule = next(iter(parse(setting, 28)), None)
    kv = (
        KVWeights(rule.ratio, tuple(layer // 14 for layer in rule.layers if layer % 14 == 0))
        if "conv" in setting
        else None
    )
    config = replace(XL_2, num_layers=2, kv_compression=kv)
    rules = () if rule is None else (replace(rule, layers=(0, 1) if len(rule.layers) == 28 else (1,)),)

    def attention(query, key, value, attn_mask=None):
        return (query @ key.transpose(-1, -2)) @ value

    transformer = build_transformer(config, attention=attention)
    meta = {"device": "meta"}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(
            torch.empty(1, 4, size[0] // 8, size[1] // 8, **meta),
            torch.empty(1, **meta),
            torch.empty(1, 300, 1152, **meta),
            kv_compression=rules,
            prompt_projected=True,
        )
    expected = multiply_adds(config, *size, 300, rules)
    assert abs(counter.get_total_flops() / 2 / expected - 1) < 1e-3


def test_multiply_adds_of_the_published_network():
    """The figures of the paper's network, 28 layers of width 1152, in multiply-adds."""
    for size, rules, expected in [
        (1024, "off", 3.32e12),
        (2048, "off", 26.18e12),
        (4096, "off", 312.5e12),
        (4096, "mean:2:all", 312.5e12 / 3.09),
        (4096, "mean:4:all", 312.5e12 / 6.49),
        (2048, "mean:2:deep", 26.18e12 / 1.36),
    ]:
        counted = multiply_adds(XL_2, size, size, 300, parse(rules, 28))
        assert abs(counted / expected - 1) < 5e-3, (size, rules, counted)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_peak_of_a_pass_with_controlnets(count):
    """Of XL/2's width, on the meta device. With one ControlNet a tensor of tokens too much is predicted."""
    config, batch, side = replace(XL_2, num_layers=3), 2, 64
    tokens = batch * (side // 2) ** 2 * config.cross_attention_dim * 4

    def attention(query, key, value, attn_mask=None):
        return torch.empty_like(query)

    transformer = build_transformer(config, attention=attention)
    controlnet = build_controlnet(replace(config, num_layers=2), attention=attention)
    latents, embeds = (
        torch.empty(shape, device="meta") for shape in ((batch, 4, side, side), (batch, 300, 4096))
    )
    controls = (Control(controlnet, latents[:1]),) * count

    def run():
        hooks = ControlHooks(controls)
        with torch.no_grad():
            transformer(latents, 500.0, embeds, hooks=hooks)

    run()  # which keeps the positions
    needed = peak_bytes(torch.device("meta"), run) + embeds.nbytes
    predicted = activation_bytes(config, batch, side, side, 300, 4, count)
    assert -0.1 * tokens < predicted - needed < (1.1 if count == 1 else 0.1) * tokens
