"""Normalised attention guidance against the paper's arithmetic, inside diffusers' own transformer."""

import copy

import pytest
import torch
import torch.nn.functional as F

from pixart_sigma.errors import SigmaError
from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.settings import Settings
from pixart_sigma.transformer.hooks import Hooks
from pixart_sigma.transformer.loading import load_transformer

SCALE = 5.0


@pytest.fixture(scope="module")
def transformer(diffusers_file):
    return load_transformer(diffusers_file, variant="1024")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS = normal(2, 4, 8, 12, seed=0)
PROMPTS = Prompts(normal(2, 5, 64, seed=1), None, normal(2, 5, 64, seed=2))
BOTH = torch.cat([PROMPTS.negative_embeds, PROMPTS.prompt_embeds])


class PaperProcessor:
    """Attention to a prompt whose tokens stand behind those of the negative prompt, with the alpha and tau
    that the authors have for SDXL."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **ignored):
        def attend(tokens):
            query, key, value = attn.to_q(hidden_states), attn.to_k(tokens), attn.to_v(tokens)
            heads = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)]
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

        negative, positive = (attend(tokens) for tokens in encoder_hidden_states.chunk(2, dim=1))
        guided = positive + (SCALE - 1) * (positive - negative)
        ratio = guided.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
        guided = ratio.clamp(max=2.5) / ratio * guided
        return attn.to_out[0](0.5 * guided + 0.5 * positive)


def test_it_is_the_papers_in_diffusers_transformer(transformer, tiny_transformer):
    reference = copy.deepcopy(tiny_transformer)
    for block in reference.transformer_blocks:
        block.attn2.processor = PaperProcessor()
    expected = reference(
        LATENTS,
        # It reads (2, 10, C): the tokens of both prompts of a picture, one after the other.
        encoder_hidden_states=torch.cat([PROMPTS.negative_embeds, PROMPTS.prompt_embeds], dim=1),
        timestep=torch.tensor([500.0, 500.0]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0][:, :4]
    made = transformer(LATENTS, 500, BOTH, nag_scale=SCALE)
    assert (made - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = transformer(LATENTS, 500, PROMPTS.prompt_embeds)
    assert (made - plain).abs().max() > 1e-2 * plain.abs().max()


def test_a_negative_prompt_that_is_the_prompt_changes_nothing(transformer):
    embeds = PROMPTS.prompt_embeds
    made = transformer(LATENTS, 500, torch.cat([embeds, embeds]), nag_scale=SCALE)
    assert (made - transformer(LATENTS, 500, embeds)).abs().max() < 1e-5


def test_prompts_of_two_lengths_are_masked(transformer):
    """Padding of the shorter one changes nothing."""
    shorter = Prompts(PROMPTS.prompt_embeds, None, PROMPTS.negative_embeds[:, :2])
    settings = Settings(steps=2, guidance_scale=1, nag_scale=SCALE)
    made = denoise(guide(transformer, shorter, settings), LATENTS, settings)
    repeated = shorter.negative_embeds.repeat(1, 2, 1)  # asked twice, a token weighs as much as once
    expected = denoise(
        guide(transformer, Prompts(PROMPTS.prompt_embeds, None, repeated), settings), LATENTS, settings
    )
    assert (made - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_run_with_it_asks_the_transformer_once_for_each_picture(transformer):
    settings = Settings(steps=3, guidance_scale=1, nag_scale=SCALE)
    rows = []
    counting = transformer.proj_out.register_forward_hook(lambda _, tokens, __: rows.append(len(tokens[0])))
    made = denoise(guide(transformer, PROMPTS, settings), LATENTS, settings)
    counting.remove()
    assert rows == [2, 2, 2]
    by_hand = denoise(lambda x, t: transformer(x, t, BOTH, nag_scale=SCALE), LATENTS, settings)
    assert (made - by_hand).abs().max() < 1e-5 * made.abs().max()
    without = Settings(steps=3, guidance_scale=1)
    plain = denoise(guide(transformer, PROMPTS, without), LATENTS, without)
    assert (made - plain).abs().max() > 1e-3 * plain.abs().max()


def test_other_hooks_are_still_asked(transformer):
    class Counting(Hooks):
        def __init__(self):
            self.asked = []

        def run_block(self, *arguments):
            self.asked.append("block")
            return super().run_block(*arguments)

        def before_attention(self, name, *tokens):
            self.asked.append(f"before {name}")
            return tokens

        def attend(self, name, *arguments):
            self.asked.append(name)
            return super().attend(name, *arguments)

        def after_attention(self, name, tokens):
            self.asked.append(f"after {name}")
            return tokens

    hooks = Counting()
    transformer(LATENTS, 500, BOTH, hooks=hooks, nag_scale=SCALE)
    self_attention = ["block", "before attn1", "attn1", "after attn1"]
    assert hooks.asked == [*self_attention, "before attn2", "attn2", "attn2", "after attn2"] * 2


def test_one_prompt_for_each_picture_is_too_few(transformer):
    with pytest.raises(SigmaError, match="These latents need 4 prompt embeddings, and there are 2"):
        transformer(LATENTS, 500, PROMPTS.prompt_embeds, nag_scale=SCALE)
    settings = Settings(guidance_scale=1, nag_scale=SCALE)
    with pytest.raises(SigmaError, match="nag_scale need negative_embeds"):
        guide(transformer, Prompts(PROMPTS.prompt_embeds), settings)(LATENTS, torch.tensor(500))
