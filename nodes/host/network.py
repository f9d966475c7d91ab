"""The engine's transformer with the forward pass that the host calls.

Importing this imports diffusers, so nodes do it when they run.
"""

import functools

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ...pixart_sigma.transformer.controlnet import ControlHooks
from ...pixart_sigma.transformer.network import SigmaBlock, SigmaTransformer, layer_classes
from .bypass import PartOfName
from .controlnet import controls_of
from .hooks import HostHooks, attention
from .kv_compression import KV_COMPRESSION


class HostBlock(SigmaBlock):
    """A block that has the authors' names for its layers too."""

    attn, cross_attn, mlp = (
        property(functools.partial(PartOfName, path=f"blocks.0.{name}"))
        for name in ("attn", "cross_attn", "mlp")
    )


class SigmaNetwork(SigmaTransformer):
    # diffusers looks for it in the weights, which the host may keep elsewhere or in another one.
    dtype = None
    # The authors' names, where ours are others.
    blocks = property(lambda self: self.transformer_blocks)
    x_embedder, y_embedder, t_embedder, t_block, final_layer = (
        property(functools.partial(PartOfName, path=name))
        for name in ("x_embedder", "y_embedder", "t_embedder", "t_block", "final_layer")
    )

    def __init__(self, config, attention):
        super().__init__(config, attention)
        for block in self.transformer_blocks:
            block.__class__ = HostBlock

    def forward(
        self,
        x,
        timesteps,
        context,
        context_mask=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ):
        """x (B, 4, h, w), timesteps (B,), context (B, L, C), context_mask (B, L) or None -> noise like x."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        # The wrappers expect the options to be the last argument.
        return executor.execute(x, timesteps, context, context_mask, control, options, **kwargs)

    def _forward(self, x, timesteps, context, context_mask, control, transformer_options, **kwargs):
        hooks = HostHooks(transformer_options, x, self.sigma_config)
        rules_for = transformer_options.get(KV_COMPRESSION)
        rules = None if rules_for is None else rules_for(8 * x.shape[-2], 8 * x.shape[-1])
        controls = controls_of(control)
        if controls:
            hooks = ControlHooks(controls, hooks)
        return super().forward(x, timesteps, context, context_mask, rules, hooks)

    def forget_sizes(self):
        """Drop the positions of the sizes seen so far, which lie on the device."""
        self._positions.clear()


def build_network(config, operations) -> SigmaNetwork:
    """The transformer without weights, of the host's layer classes."""
    with layer_classes(operations), torch.device("meta"):
        return SigmaNetwork(config, attention)
