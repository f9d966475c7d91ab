"""The patcher of our MODEL: the host's own, with LoRAs translated and nothing left behind on a device."""

import functools

import comfy.model_management
import comfy.model_patcher
import comfy.utils
from comfy.model_patcher import ModelPatcher

from .lora import EMPTY, add_translated


def make_patcher(model, disable_dynamic: bool = False) -> ModelPatcher:
    """A patcher for a SigmaModel on the host's devices."""
    device = comfy.model_management.get_torch_device()
    # The host's dynamic patcher is not for the CPU, and answers there with one that is not a subclass.
    plain = disable_dynamic or comfy.model_management.is_device_cpu(device)
    patcher = sigma_patcher(ModelPatcher if plain else comfy.model_patcher.CoreModelPatcher)
    return patcher(model, device, comfy.model_management.unet_offload_device())


@functools.cache
def sigma_patcher(base: type) -> type:
    """The subclass of one of the host's patchers; which one is known when a model is loaded."""

    class SigmaPatcher(base):
        def clone(self, *arguments, **settings):
            twin = super().clone(*arguments, **settings)
            if type(twin) is ModelPatcher:
                twin.__class__ = sigma_patcher(ModelPatcher)
            return twin

        def add_patches(self, patches, *strengths, **named_strengths):
            add = super().add_patches
            return add_translated(
                lambda ours: add(ours, *strengths, **named_strengths), patches, self._width()
            )

        def add_hook_patches(self, hook, patches, *strengths, **named_strengths):
            add = super().add_hook_patches
            return add_translated(
                lambda ours: add(hook, ours, *strengths, **named_strengths), patches, self._width()
            )

        def _width(self) -> int:
            return self.model.diffusion_model.inner_dim

        def model_state_dict(self, filter_prefix=None):
            state_dict = super().model_state_dict(filter_prefix)
            return {name: tensor for name, tensor in state_dict.items() if tensor is not EMPTY}

        def load(self, device_to=None, *arguments, **settings):
            super().load(device_to, *arguments, **settings)
            self._move_tables(device_to)

        def detach(self, unpatch_all=True):
            model = super().detach(unpatch_all)
            if unpatch_all:
                self._move_tables(self.offload_device)
                model.diffusion_model.forget_sizes()
            return model

        def _move_tables(self, device):
            """The host leaves weights of modules that have submodules where they are."""
            network = self.model.diffusion_model
            for module in (network, *network.transformer_blocks):
                if module.scale_shift_table.device != device:
                    moved = module.scale_shift_table.to(device)
                    comfy.utils.set_attr_param(module, "scale_shift_table", moved)

    return SigmaPatcher
