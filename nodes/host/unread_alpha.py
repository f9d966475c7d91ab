"""Alpha that ComfyUI's own LoRA loaders do not read, said on the node that loads.

They read `.alpha` alone. PEFT writes it into an adapter_config.json, diffusers into the file's metadata.
"""

import logging
from pathlib import Path

from ...pixart_sigma.errors import CheckpointError
from ...pixart_sigma.transformer.lora_scaling import read_scaling
from .notice import add_notice

PEFT = "base_model.model."
LORA_ALPHA = 2  # where the host's LoRA adapter has it
USE = "ComfyUI's loader does not read it, and takes it to be as large as the rank. Load Σ LoRA reads it."

logger = logging.getLogger(__name__)


def tell_of_peft(patches: dict) -> None:
    """That PEFT's files say alpha beside the weights, where a patch is PEFT's and says none."""
    for patch in patches.values():
        if getattr(patch, "name", "") == "lora" and patch.weights[LORA_ALPHA] is None:
            if any(key.startswith(PEFT) for key in patch.loaded_keys):
                _tell(f"This LoRA is PEFT's, whose alpha stands in an adapter_config.json beside it. {USE}")
                return


def tell_of_metadata(metadata: dict[str, str]) -> None:
    """That a LoRA's metadata say another alpha than its rank."""
    try:
        said = read_scaling(Path(), metadata)
    except CheckpointError:  # what can not be read, nobody reads
        return
    if said.alpha is not None and (said.alpha != said.rank or said.patterns or said.ranks):
        _tell(f"This LoRA's metadata say its alpha ({said.alpha:g}, rank {said.rank or 'unknown'}). {USE}")


def _tell(words: str) -> None:
    add_notice(words)
    logger.warning(words)
