"""Where the host wants tensors between the nodes."""

import comfy.model_management
import torch


def latent_device() -> torch.device:
    return comfy.model_management.intermediate_device()
