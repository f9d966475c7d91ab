"""Which T5 makes embeddings, known without loading it."""

from dataclasses import dataclass, field
from pathlib import Path

from ..choices import DEFAULT_T5_PRECISION
from ..files.digests import Progress, file_digest
from ..files.fingerprint import fingerprint
from ..files.locating import find_weight_files
from ..files.reading import read_bytes
from .changes import WeightChanges
from .config import read_config
from .loading import find_encoder
from .tokenizer import find_tokenizer
from .tokenizer_places import beside, name_of
from .weights import read_encoder_weights


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder makes embeddings: a hash of its weights and tokenizer, and the precision it works in.

    tokenizer: the name of one that does not belong to the encoder's files, or "". content: a hash of all that
    its files hold. The fingerprint, which pictures and saved embeddings tell, is of some numbers of each
    weight, by which another encoder is known and not one that was damaged.
    """

    fingerprint: str
    precision: str
    tokenizer: str = field(default="", compare=False)
    content: str = ""


def identify(
    path: str | Path,
    tokenizer=None,
    precision: str | None = None,
    changes: WeightChanges | None = None,
    progress: Progress | None = None,
) -> EncoderIdentity:
    """Know a T5 encoder without loading it; the arguments are those of TextEncoder.load.

    The fingerprint covers the config, the tokenizer, the weights, see `fingerprint`, and their changes. Where
    the files are new they are read as a whole, see `file_digest`, also for `progress`.
    Raises CheckpointError or SigmaError where there is no encoder or tokenizer.
    """
    path = find_encoder(path)
    saved, read = None, []
    if path.is_dir():
        saved = read_config(path)[1]
        read.append(read_bytes(path / "config.json"))
    file = find_tokenizer(path, tokenizer)
    for part in (file, file.parent / "tokenizer_config.json"):
        read.append(read_bytes(part) if part.is_file() else b"")
    if changes is not None:
        read.append(changes.fingerprint.encode())
    return EncoderIdentity(
        fingerprint(read_encoder_weights(path), *read),
        precision or saved or DEFAULT_T5_PRECISION,
        "" if file.parent in beside(path) else name_of(file),
        "".join(file_digest(part, progress) for part in find_weight_files(path)),
    )
