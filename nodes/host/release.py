"""Takes one model out of the device's memory, and no other."""

import comfy.model_management
import comfy.sd
from comfy.model_patcher import ModelPatcher

from ...pixart_sigma.choices import RELEASES
from ...pixart_sigma.errors import SigmaError
from .memory import look


def release(model, mode: str) -> None:
    """Release a MODEL, CLIP or VAE and all its clones; it loads itself again when it is next used.

    mode: "keep" does nothing, "offload" takes the weights off the device, "free" also drops those of our T5
    from RAM. A MODEL or VAE leaves its weights in RAM, which it could not read again; where they are mapped
    from a file, the system drops them by itself. Raises SigmaError for another mode or object.
    """
    if mode not in RELEASES:
        raise SigmaError(f"The mode is {mode!r}; choose one of {', '.join(RELEASES)}.")
    if mode == "keep":
        return
    look()
    patcher = model if isinstance(model, ModelPatcher) else getattr(model, "patcher", None)
    if not isinstance(patcher, ModelPatcher):
        raise SigmaError(
            f"Only a MODEL, CLIP or VAE can be released, not {type(model).__name__}. Connect the loader's "
            "output."
        )
    unload(patcher)
    if mode == "free" and hasattr(patcher, "drop"):
        patcher.drop()
    comfy.model_management.soft_empty_cache()


def kind_of(model) -> str:
    """What a node's socket calls it: MODEL, CLIP or VAE."""
    if isinstance(model, ModelPatcher):
        return "MODEL"
    return "VAE" if isinstance(model, comfy.sd.VAE) else "CLIP"


def unload(patcher: ModelPatcher) -> None:
    """Unload the patcher and its clones on every device.

    The host's unload_model_and_clones does so on one device only, and leaves T5 on the CPU in its list.
    """
    loaded_models = comfy.model_management.current_loaded_models
    ours = [loaded for loaded in loaded_models if _same_weights(loaded, patcher)]
    for loaded in ours:
        if loaded.model is None:  # the node that used this clone is done with it
            patcher.detach()
        else:
            loaded.model_unload()
    identities = {id(loaded) for loaded in ours}
    loaded_models[:] = [loaded for loaded in loaded_models if id(loaded) not in identities]


def _same_weights(loaded, patcher: ModelPatcher) -> bool:
    if loaded.model is None:
        return loaded.real_model is not None and loaded.real_model() is patcher.model
    return (
        loaded.model.model is patcher.model
        or getattr(loaded.model, "clone_base_uuid", None) == patcher.clone_base_uuid
    )
