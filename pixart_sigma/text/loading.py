"""What a T5 encoder is loaded from: its files, found and read by their headers, and what it will take."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..choices import DEFAULT_T5_PRECISION, T5_PRECISIONS
from ..devices import pick_device
from ..errors import SigmaError
from ..files.locating import locate
from .changes import WeightChanges
from .model import check_packages, compute_dtype, quiet_int8_casts
from .streaming import StreamedT5
from .tokenizer import find_tokenizer, load_tokenizer
from .weights import expected_nbytes, read_t5


def read_encoder(
    path, precision: str | None = None, changes: WeightChanges | None = None, outline: bool = False
):
    """What TextEncoder.load builds from: (path of the encoder, T5Config, weights, precision). Weights are
    memory-mapped, and changed when they are read; with `outline` they are on the meta device. Raises as
    TextEncoder.load."""
    path = find_encoder(path)
    if precision is not None and precision not in T5_PRECISIONS:
        raise SigmaError(
            f"Unknown text encoder precision {precision!r}: use one of {', '.join(T5_PRECISIONS)}."
        )
    config, weights, saved = read_t5(path, outline)
    if saved and precision not in (None, saved):
        raise SigmaError(
            f"{path} was saved in {saved}, so it can not be loaded in {precision}. Choose {saved}, "
            "or load the original encoder: quantising twice would lose quality."
        )
    if changes is not None:
        if saved:
            raise SigmaError(f"{path} was saved in {saved}, and such weights can not be changed by adapters.")
        weights = changes.applied(weights)
    return path, config, weights, precision or saved or DEFAULT_T5_PRECISION


def find_encoder(path) -> Path:
    """The encoder's folder in a pipeline folder; the GGUF file in a folder without a config.json, where its
    weights say what it is; any other path as it is."""
    path = Path(path)
    if (path / "text_encoder").is_dir() and not (path / "config.json").exists():
        path = path / "text_encoder"
    if path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf")):
        return locate(path)
    return path


def stream_model(config, weights: dict, precision: str, device: torch.device, path: Path) -> StreamedT5:
    """A StreamedT5 for this device, still on the CPU. Raises SigmaError and CheckpointError as StreamedT5."""
    check_packages(precision)
    quiet_int8_casts()
    return StreamedT5(config, weights, precision, compute_dtype(precision, device), path)


class Description(NamedTuple):
    """An encoder that is not loaded: its tokenizer, its bytes on the device, and C of its embeddings."""

    tokenizer: Any
    nbytes: int
    width: int


def describe_encoder(
    path, tokenizer=None, precision: str | None = None, device="cpu", stream: bool = False
) -> Description:
    """Of the encoder that TextEncoder.load would give, whose weights are not loaded."""
    device = pick_device(device)
    path, config, weights, precision = read_encoder(path, precision, outline=True)
    loaded_tokenizer = load_tokenizer(find_tokenizer(path, tokenizer), config.vocab_size)
    if stream:
        nbytes = stream_model(config, weights, precision, device, path).window_nbytes(device)
    else:
        nbytes = expected_nbytes(weights, precision, compute_dtype(precision, device))
    return Description(loaded_tokenizer, nbytes, config.d_model)
