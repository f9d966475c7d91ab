"""What the text stage will need in memory, from the shapes of an encoder: nothing is loaded."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..choices import MAX_SEQUENCE_LENGTH, T5_PRECISIONS
from ..memory.measure import peak_bytes
from ..memory.ways import Needs
from .loading import read_encoder
from .streaming import MOST_WAITING, StreamedT5
from .weights import expected_nbytes

META = torch.device("meta")
# The published encoder, T5-XXL's, in transformers' words.
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class EncoderShapes:
    """A T5 encoder by its T5Config and its weights by key. `saved` is the precision that a quantised one was
    saved in, None for one that can be loaded in any."""

    config: Any
    weights: dict[str, Any]
    saved: str | None = None

    @classmethod
    def published(cls) -> "EncoderShapes":
        """T5-XXL's."""
        from transformers import T5Config

        config = T5Config(**T5_XXL)
        weights = _encoder(config, torch.bfloat16).state_dict()
        del weights["encoder.embed_tokens.weight"]  # the same as shared.weight
        return cls(config, weights)

    @classmethod
    def read(cls, path: Path) -> "EncoderShapes":
        """Of an encoder on disk. Raises CheckpointError and SigmaError as loading it does."""
        _, config, weights, precision = read_encoder(path, outline=True)
        quantized = getattr(config, "quantization_config", None) is not None
        return cls(config, weights, precision if quantized else None)

    def needs(
        self,
        precision: str,
        place: str,
        half: torch.dtype = torch.bfloat16,
        tokens: int = MAX_SEQUENCE_LENGTH,
    ) -> Needs:
        """Bytes of a prompt of so many tokens in a place of T5_DEVICES; a quantised encoder computes in
        `half`."""
        named = T5_PRECISIONS[precision].dtype
        computing = getattr(torch, named) if named else half
        weights = expected_nbytes(self.weights, precision, computing)
        activations = _activation_bytes(self.config.to_json_string(), computing, tokens)
        if place == "cpu":
            return Needs(0, 0, weights + activations)
        if place == "stream":
            streamed = StreamedT5(self.config, self.weights, precision, computing, None)
            window = streamed.window_nbytes(torch.device("cuda"))
            return Needs(window + activations + MOST_WAITING, window, weights)
        return Needs(weights + activations, weights)


@functools.cache
def _activation_bytes(config: str, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that the encoder of a config, as JSON, needs for what it computes of so many tokens."""
    from transformers import T5Config

    encoder = _encoder(T5Config.from_dict(json.loads(config)), dtype)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=META)
    with torch.no_grad(), _FusedAttention():
        return peak_bytes(META, lambda: encoder(input_ids=ids))


def _encoder(config, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import T5EncoderModel

    with META:
        return T5EncoderModel(config).eval().to(dtype)


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel does it, which makes no scores; the meta device has none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))
