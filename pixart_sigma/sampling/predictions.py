"""What a model predicts, as clean latents, and back."""

import math

import torch


def predict_clean(scheduler, scaled: torch.Tensor, predicted: torch.Tensor, timestep) -> torch.Tensor:
    """The clean latents x0 (B, 4, h, w) in `scaled` = sqrt(abar) x0 + sqrt(1 - abar) noise, by what the model
    predicted for it.

    `scaled` is the model's input, after scale_model_input, which is of this form for every scheduler, but for
    a flow: there it is (1 - sigma) x0 + sigma noise.
    Source: DDPM, arXiv 2006.11239; v: arXiv 2202.00512; flow: arXiv 2209.03003.
    """
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return predicted
    if kind == "flow_prediction":
        return scaled - _flow_sigma(scheduler, timestep) * predicted
    sigma = noise_level(scheduler, timestep)
    if kind == "v_prediction":
        return (scaled / sigma - predicted) / math.sqrt(1 + 1 / sigma**2)
    return scaled * math.sqrt(1 + sigma**2) - sigma * predicted


def predict_output(scheduler, scaled: torch.Tensor, clean: torch.Tensor, timestep) -> torch.Tensor:
    """What the model would have predicted for `scaled` if these were the clean latents in it; the inverse of
    `predict_clean`."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return clean
    if kind == "flow_prediction":
        return (scaled - clean) / _flow_sigma(scheduler, timestep)
    sigma = noise_level(scheduler, timestep)
    if kind == "v_prediction":
        return scaled / sigma - clean * math.sqrt(1 + 1 / sigma**2)
    return scaled * math.sqrt(1 + 1 / sigma**2) - clean / sigma


def noise_level(scheduler, timestep) -> float:
    """Noise to signal at a timestep, sqrt((1 - abar) / abar); infinite where there is noise alone.

    Between two whole timesteps it is interpolated linearly, as diffusers' Euler does.
    """
    if scheduler.config.prediction_type == "flow_prediction":
        sigma = _flow_sigma(scheduler, timestep)
        return sigma / (1 - sigma) if sigma < 1 else math.inf
    table = scheduler.alphas_cumprod
    below = min(max(int(timestep), 0), len(table) - 1)
    pair = table[[below, min(below + 1, len(table) - 1)]].double()
    low, high = ((1 - pair) / pair).sqrt().tolist()
    share = float(timestep) - below
    return low + share * (high - low) if share else low


def _flow_sigma(scheduler, timestep) -> float:
    return float(timestep) / len(scheduler.alphas_cumprod)
