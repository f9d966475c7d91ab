"""The patcher of our MODEL: the host's own, with patches translated and nothing left behind on a device."""

import functools

import comfy.model_management
import comfy.model_patcher
import comfy.utils
from comfy.model_patcher import ModelPatcher

from ...pixart_sigma.transformer.keys import TABLE
from .bypass import BYPASS, one_after_the_other, refuse_copies
from .hooks import REPLACEABLE, check_set, replaced_block
from .lora import PREFIX, add_translated, authors_names
from .merging import check_merge, in_authors_names
from .unread_alpha import tell_of_metadata, tell_of_peft
from .whole_matrix import refuse_joined, with_siblings

COPIES = "multigpu"  # the host's name for those of a MODEL on other devices


def make_patcher(model, disable_dynamic: bool = False) -> ModelPatcher:
    """A patcher for a SigmaModel on the host's devices."""
    device = comfy.model_management.get_torch_device()
    # The host's dynamic patcher is not for the CPU, and answers there with one that is not a subclass.
    plain = disable_dynamic or comfy.model_management.is_device_cpu(device)
    patcher = sigma_patcher(ModelPatcher if plain else comfy.model_patcher.CoreModelPatcher)
    return patcher(model, device, comfy.model_management.unet_offload_device())


class SigmaPatcher(ModelPatcher):
    def clone(self, *arguments, **settings):
        twin = super().clone(*arguments, **settings)
        if type(twin) is ModelPatcher:
            twin.__class__ = SigmaPatcher
        return twin

    def deepclone_multigpu(self, *arguments, **settings):
        """A copy for another device, with weights of its own."""
        refuse_copies(self.injections)
        copy = super().deepclone_multigpu(*arguments, **settings)
        copy.parent = None
        return copy

    def match_multigpu_clones(self):
        """Where a loaded patcher is gone, the host goes on with its parent, so a copy's parent is one that
        has the copy's weights. By the host it is this MODEL, and the copy's weights could not be unloaded."""
        parents = {copy.model: copy.parent or copy for copy in self.get_additional_models_with_key(COPIES)}
        if parents:
            refuse_copies(self.injections)
        super().match_multigpu_clones()
        for copy in self.get_additional_models_with_key(COPIES):
            copy.parent = parents[copy.model]

    def add_patches(self, patches, *strengths, **named_strengths):
        add = super().add_patches
        weights = self.model_state_dict()
        tell_of_peft(patches)
        patches = check_merge(patches, authors_names(weights), weights)
        return add_translated(
            lambda ours: add(with_siblings(ours, self), *strengths, **named_strengths),
            patches,
            self._width(),
            weights,
        )

    def add_hook_patches(self, hook, patches, *strengths, **named_strengths):
        add = super().add_hook_patches
        return add_translated(
            lambda ours: add(hook, refuse_joined(ours), *strengths, **named_strengths),
            patches,
            self._width(),
            self.model_state_dict(),
        )

    def set_attachments(self, key, attachment):
        """The host's Load LoRA gives the file's metadata so."""
        super().set_attachments(key, attachment)
        if key == "lora_metadata":
            tell_of_metadata(attachment)

    def set_injections(self, key, injections):
        """A second bypassed LoRA joins the first, in whose place the host would put it."""
        if key == BYPASS and key in self.injections:
            injections = [one_after_the_other([*self.injections[key], *injections])]
        super().set_injections(key, injections)

    def get_key_patches(self, filter_prefix=None):
        """Under the authors' names where a prefix is given, as the host's nodes for merging do, so that
        a MODEL from any loader takes them; its hooks give none, and look for their weights by ours."""
        patches = super().get_key_patches(filter_prefix)
        return in_authors_names(patches, authors_names(patches)) if filter_prefix == PREFIX else patches

    def set_model_patch(self, patch, name):
        check_set(name)
        super().set_model_patch(patch, name)

    def set_model_patch_replace(self, patch, name, block_name, number, transformer_index=None):
        if name in REPLACEABLE:
            part = () if transformer_index is None else (transformer_index,)
            replaced_block(
                name, (block_name, number, *part), self.model.diffusion_model.sigma_config.num_layers
            )
        super().set_model_patch_replace(patch, name, block_name, number, transformer_index)

    def set_model_rope_options(self, *options, **named_options):
        check_set("rope_options")
        super().set_model_rope_options(*options, **named_options)

    def _width(self) -> int:
        return self.model.diffusion_model.inner_dim

    def model_state_dict(self, filter_prefix=None):
        weights = super().model_state_dict().items()
        return {name: weight for name, weight in weights if name.startswith(filter_prefix or "")}

    def load(self, device_to=None, *arguments, **settings):
        super().load(device_to, *arguments, **settings)
        self._move_tables(device_to)
        # Nor does the host patch them.
        for name, _ in self._tables():
            if name in self.patches and name not in self.backup:
                self.patch_weight_to_device(name, device_to)

    def detach(self, unpatch_all=True):
        model = super().detach(unpatch_all)
        if unpatch_all:
            self._move_tables(self.offload_device)
            model.diffusion_model.forget_sizes()
        return model

    def _tables(self):
        network = self.model.diffusion_model
        yield PREFIX + TABLE, network
        for layer, block in enumerate(network.transformer_blocks):
            yield f"{PREFIX}transformer_blocks.{layer}.{TABLE}", block

    def _move_tables(self, device):
        """The host leaves weights of modules that have submodules where they are."""
        for _, module in self._tables():
            if module.scale_shift_table.device != device:
                moved = module.scale_shift_table.to(device)
                comfy.utils.set_attr_param(module, TABLE, moved)


@functools.cache
def sigma_patcher(base: type) -> type:
    """SigmaPatcher on top of another of the host's patchers; which one is known when a model is loaded."""
    return SigmaPatcher if base is ModelPatcher else type("SigmaPatcher", (SigmaPatcher, base), {})
