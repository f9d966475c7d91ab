"""Which T5 makes embeddings, known without loading it."""

from dataclasses import dataclass
from pathlib import Path

from ..files.fingerprint import fingerprint
from ..files.weight_files import read_state_dict
from ..settings import DEFAULT_T5_PRECISION
from .loading import find_encoder
from .tokenizer import find_tokenizer
from .weights import read_config, refuse_gguf


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder makes embeddings: a hash of its weights and tokenizer, and the precision it works in."""

    fingerprint: str
    precision: str


def identify(path: str | Path, tokenizer=None, precision: str | None = None) -> EncoderIdentity:
    """Know a T5 encoder without loading it; `path`, `tokenizer` and `precision` as for TextEncoder.load.

    The fingerprint covers the config, the tokenizer and the weights, see `fingerprint`.
    Raises CheckpointError or SigmaError where there is no encoder or tokenizer.
    """
    path = find_encoder(path)
    refuse_gguf(path)
    saved, beside = None, []
    if path.is_dir():
        saved = read_config(path)[1]
        beside.append((path / "config.json").read_bytes())
    file = find_tokenizer(path, tokenizer)
    for part in (file, file.parent / "tokenizer_config.json"):
        beside.append(part.read_bytes() if part.is_file() else b"")
    return EncoderIdentity(
        fingerprint(read_state_dict(path), *beside), precision or saved or DEFAULT_T5_PRECISION
    )
