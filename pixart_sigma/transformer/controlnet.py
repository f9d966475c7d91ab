"""ControlNet for PixArt: a second row of blocks that reads a picture beside the transformer and adds to its
tokens.

It is ControlNet-Transformer of the PixArt-delta paper (arXiv 2401.05252, section 4), in the file format of
diffusers' and SimpleTuner's trainers: copies of the transformer's first blocks, a projection before the first
and one behind each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import SigmaError
from .config import TransformerConfig
from .hooks import NO_HOOKS, BlockCall, Hooks


class ControlNetBlock(torch.nn.Module):
    """A copy of one block of the transformer, between its projections."""

    def __init__(self, block: torch.nn.Module, width: int, is_first: bool):
        super().__init__()
        if is_first:
            self.before_proj = torch.nn.Linear(width, width)
        self.transformer_block = block
        self.after_proj = torch.nn.Linear(width, width)

    def forward(self, tokens, hidden_states, prompt_embeds, call: BlockCall):
        """The ControlNet's tokens, and the transformer's before the block beside it, (B, N, C) each -> the
        ControlNet's after this block, and what they add to the transformer's."""
        if call.index == 1:
            tokens = hidden_states + self.before_proj(tokens)
        tokens = self.transformer_block(tokens, prompt_embeds, call)
        return tokens, self.after_proj(tokens)


class ControlNet(torch.nn.Module):
    """The blocks; made by `load_controlnet`. What stands for the picture, the timestep and the prompt is the
    transformer's: it has no embedding of its own. `sigma_config` is of a transformer that has these blocks
    alone."""

    def __init__(self, config: TransformerConfig, blocks: torch.nn.ModuleList):
        super().__init__()
        self.sigma_config, width = config, config.cross_attention_dim
        self.controlnet_blocks = torch.nn.ModuleList(
            ControlNetBlock(block, width, is_first=index == 0) for index, block in enumerate(blocks)
        )


def check_fits(controlnet: TransformerConfig, config: TransformerConfig) -> None:
    """Raise SigmaError where a ControlNet, by its config, is for other transformers than of this config."""
    ours, theirs = ((one.cross_attention_dim, one.num_attention_heads) for one in (controlnet, config))
    if ours != theirs:
        raise SigmaError(
            f"The ControlNet is for a transformer of width {ours[0]} in {ours[1]} heads, and this one has "
            f"width {theirs[0]} in {theirs[1]}. Choose the ControlNet that was trained for it."
        )
    if controlnet.num_layers >= config.num_layers:
        raise SigmaError(
            f"The ControlNet of {controlnet.num_layers} layers is for a transformer of at least "
            f"{controlnet.num_layers + 1}, and this one has {config.num_layers}. Choose the ControlNet that "
            "was trained for it."
        )


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet at work on one picture.

    latents (1 or B, 4, h, w): the picture's, from the VAE and scaled by its factor, as large as those that
    are denoised; B is a divisor of how many there are.
    strength: what its blocks add is multiplied by this. SimpleTuner's pipeline multiplies the latents, in
    which 0 would be a grey picture and not none; at 1 both are the same.
    """

    controlnet: ControlNet
    latents: torch.Tensor
    strength: float = 1.0

    def latents_for(self, latents: torch.Tensor) -> torch.Tensor:
        """The picture's latents for each of those that are denoised, (B, 4, h, w). Raises SigmaError where
        they do not fit."""
        count = len(self.latents)
        if self.latents.shape[1:] != latents.shape[1:] or not count or len(latents) % count:
            raise SigmaError(
                f"The latents of the control picture are {tuple(self.latents.shape)}, those of the picture "
                f"to be made {tuple(latents.shape)}: encode the control picture at the size of the other."
            )
        return self.latents.to(latents).repeat(len(latents) // count, 1, 1, 1)


class ControlHooks(Hooks):
    """Lets ControlNets add to the tokens before each block; all else is as `hooks` have it.

    For one call of the transformer: what the ControlNets came to by the last block is kept here. Nothing that
    is hooked into the transformer acts within a ControlNet. KV compression does, as on the block beside which
    it stands, but for trained one, whose weights it has not.
    """

    def __init__(self, controls: tuple[Control, ...], hooks: Hooks = NO_HOOKS):
        self.hooks, self.controls = hooks, controls
        self.tokens: list[torch.Tensor] = []

    def start(self, transformer, latents):
        """Raises SigmaError for a ControlNet of another transformer, and latents of another size."""
        for control in self.controls:
            check_fits(control.controlnet.sigma_config, transformer.sigma_config)
        self.tokens = [transformer.embed(control.latents_for(latents)) for control in self.controls]
        self.hooks.start(transformer, latents)

    def run_block(self, block, hidden_states, prompt_embeds, call: BlockCall):
        if call.index > 0:
            hidden_states = self._control(hidden_states, prompt_embeds, call)
        return self.hooks.run_block(block, hidden_states, prompt_embeds, call)

    def before_attention(self, name, queries, keys, values):
        return self.hooks.before_attention(name, queries, keys, values)

    def attend(self, name, attention, query, key, value, attn_mask):
        return self.hooks.attend(name, attention, query, key, value, attn_mask)

    def after_attention(self, name, tokens):
        return self.hooks.after_attention(name, tokens)

    def _control(self, hidden_states, prompt_embeds, call: BlockCall):
        """hidden_states (B, N, C) with what every ControlNet adds before this block."""
        rule, bias = call.kv_compression, call.prompt_bias
        # With normalised attention guidance there are negative prompts too, in front.
        prompt_embeds = prompt_embeds[-len(hidden_states) :]
        call = replace(
            call,
            prompt_bias=None if bias is None else bias[-len(hidden_states) :],
            kv_compression=None if rule is not None and rule.operator == "conv" else rule,
            hooks=NO_HOOKS,
        )
        controlled = hidden_states
        for place, control in enumerate(self.controls):
            blocks = control.controlnet.controlnet_blocks
            if call.index > len(blocks):
                continue
            self.tokens[place], added = blocks[call.index - 1](
                self.tokens[place], hidden_states, prompt_embeds, call
            )
            controlled = controlled + control.strength * added
            del added  # the next ControlNet's MLP is the peak
        return controlled
