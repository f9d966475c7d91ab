"""What a caller can change inside one call of the transformer, and that nothing of it stays."""

from dataclasses import replace

import pytest
import torch

from pixart_sigma.transformer.hooks import Hooks
from pixart_sigma.transformer.kv_rules import KVCompression
from pixart_sigma.transformer.loading import load_transformer


@pytest.fixture(scope="module")
def transformer(diffusers_file):
    return load_transformer(diffusers_file, variant="1024")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 12, generator=generator)
    return latents, torch.tensor([500.0]), torch.randn(1, 5, 64, generator=generator)


class Watching(Hooks):
    def __init__(self):
        self.seen = []

    def run_block(self, block, hidden_states, prompt_embeds, call):
        self.seen.append((call.index, call.grid))
        return super().run_block(block, hidden_states, prompt_embeds, call)

    def before_attention(self, name, queries, keys, values):
        self.seen.append((name, queries.shape[1], keys.shape[1], keys is values))
        return queries, keys, values


class Skipping(Hooks):
    def run_block(self, block, hidden_states, prompt_embeds, call):
        if call.index == 1:
            return hidden_states, prompt_embeds
        return super().run_block(block, hidden_states, prompt_embeds, call)


class Brightening(Hooks):
    def run_block(self, block, hidden_states, prompt_embeds, call):
        return super().run_block(
            block, hidden_states, prompt_embeds, replace(call, modulation=call.modulation + 1)
        )


class Doubling(Hooks):
    def before_attention(self, name, queries, keys, values):
        return queries, keys, values * 2 if name == "attn1" else values


class Merging(Hooks):
    def before_attention(self, name, queries, keys, values):
        return (queries, keys[:, ::3], values[:, ::3]) if name == "attn1" else (queries, keys, values)


class Silencing(Hooks):
    def after_attention(self, name, tokens):
        return tokens * 0 if name == "attn2" else tokens


def test_they_see_every_block_and_attention(transformer, inputs):
    hooks = Watching()
    assert torch.equal(transformer(*inputs, hooks=hooks), transformer(*inputs))
    one = [("attn1", 24, 24, True), ("attn2", 24, 5, True)]
    assert hooks.seen == [(0, (4, 6)), *one, (1, (4, 6)), *one]


@pytest.mark.parametrize("kind", [Skipping, Brightening, Doubling, Merging, Silencing])
def test_what_they_change_is_of_this_call_alone(transformer, inputs, kind):
    expected = transformer(*inputs)
    assert (transformer(*inputs, hooks=kind()) - expected).abs().max() > 1e-5
    assert torch.equal(transformer(*inputs), expected)


def test_the_prompt_does_not_matter_without_its_attention(transformer, inputs):
    latents, timestep, prompt_embeds = inputs
    silent = transformer(*inputs, hooks=Silencing())
    assert torch.equal(transformer(latents, timestep, prompt_embeds + 1, hooks=Silencing()), silent)


def test_merged_tokens_are_not_compressed_again(transformer, inputs):
    setting = (KVCompression("mean", 2, (0, 1)),)
    merged = transformer(*inputs, hooks=Merging())
    assert torch.equal(transformer(*inputs, kv_compression=setting, hooks=Merging()), merged)
    # values that differ from the keys are compressed as they are
    compressed = transformer(*inputs, kv_compression=setting, hooks=Doubling())
    assert (compressed - transformer(*inputs, kv_compression=setting)).abs().max() > 1e-5
