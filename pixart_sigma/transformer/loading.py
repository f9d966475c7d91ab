"""A transformer from a checkpoint, with its weights where they belong."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import SigmaError
from ..files.mapping import Whole
from ..files.quantised_weights import dequantised
from .changes import Change
from .checkpoint import Checkpoint, inspect, load_transformer_state_dict
from .network import SigmaTransformer, build_transformer
from .quantised import put_layers, stays_quantised, stored_parts
from .streaming import stream_blocks

UNCHANGED: Mapping[str, Change] = MappingProxyType({})


def load_transformer(
    source: str | Path | Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    stream: bool = False,
    changes: Mapping[str, Change] = UNCHANGED,
) -> SigmaTransformer:
    """Load a transformer from any checkpoint that `inspect` knows, in eval mode and without gradients.

    Weights are cast one by one and each source dropped, so at most the largest tensor is there twice; those
    that are in `dtype` already stay memory-mapped on the CPU. Raises CheckpointError for a file that is not
    a whole PixArt-Sigma transformer. `variant` ("256", "512", "1024", "2K") is for files that do not say
    which they are. With `stream` the blocks stay in RAM and pass through the device two at a time, with the
    same result, see `StreamedTransformer`. `changes` of weights, by diffusers' names, are made in float32
    before a weight is rounded to `dtype`; the file stays as it is. The weights of linear layers that are
    quantised stay so, and are dequantised, and changed, for each use, see `QuantisedLinear`.
    """
    if not isinstance(source, Checkpoint):
        source = inspect(source, variant)
    elif variant is not None and variant != source.variant:
        source = inspect(source.path, variant)
    transformer = build_transformer(source.config)
    files = Whole(source.components["transformer"])
    state_dict = load_transformer_state_dict(source)
    if unknown := sorted(changes.keys() - state_dict.keys()):
        raise SigmaError(f"A change is for {unknown[0]}, which {source.path} does not have.")
    place = "cpu" if stream else device
    quantised = {name: weight for name, weight in state_dict.items() if stays_quantised(name, weight)}
    put_layers(transformer, quantised.items(), changes)
    for name in list(state_dict):
        files.check()
        if name in quantised:
            stored = stored_parts(state_dict.pop(name))
            layer = name.removesuffix("weight")
            state_dict |= {layer + part: tensor.to(place) for part, tensor in stored.items()}
            continue
        weight = dequantised(state_dict[name])
        if name in changes:
            weight = changes[name](weight.to(device=place, dtype=torch.float32))
        state_dict[name] = weight.to(device=place, dtype=dtype)
    transformer.load_state_dict(state_dict, assign=True)
    transformer.eval().requires_grad_(False)
    if not stream:
        if torch.device(device).type == "cpu":  # where weights may stay mapped
            transformer.register_forward_pre_hook(files.check)
        return transformer
    del state_dict, weight, quantised  # each block's weights are dropped as it is parked
    return stream_blocks(transformer, device)
