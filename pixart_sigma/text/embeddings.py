"""Prompt embeddings as files that people keep: safetensors with a checksum in their metadata, so that a
damaged one is noticed and never drawn."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from ..choices import MAX_SEQUENCE_LENGTH
from ..errors import CheckpointError, SigmaError
from ..files.fingerprint import raw_bytes
from ..files.safetensors_files import read_whole_safetensors
from ..files.weight_files import check_file
from ..files.writing import write_beside
from ..prompt_embeds import Encoded, Prompts
from ..settings import Settings, check_settings
from .encoder import TextEncoder

FORMAT = "pixart-sigma prompt embeddings"
VERSION = "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """What T5 made of a prompt and a negative prompt, and how.

    positive, negative: (1, n, C) and (1, m, C) in fp32, fp16 or bf16, trimmed to their real tokens.
    positive_text, negative_text: as written. precision, clean_caption: T5's settings. fingerprint: see
    `identify`. positive_truncated, negative_truncated: words that did not fit in
    max_sequence_length tokens. What is not known is "".

    Raises SigmaError for tensors of another rank, width or dtype, or with numbers that are not finite.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    positive_text: str = ""
    negative_text: str = ""
    precision: str = ""
    clean_caption: bool = False
    fingerprint: str = ""
    positive_truncated: str = ""
    negative_truncated: str = ""
    max_sequence_length: int = MAX_SEQUENCE_LENGTH

    def __post_init__(self):
        for name in ("positive", "negative"):
            check_embeds(name, getattr(self, name))
        if self.positive.shape[2] != self.negative.shape[2]:
            raise SigmaError(
                f"The positive embeddings are {self.positive.shape[2]} wide and the negative ones "
                f"{self.negative.shape[2]}. Encode both prompts with the same text encoder."
            )

    @property
    def width(self) -> int:
        """C, which must be what the transformer reads: 4096 for PixArt-Sigma."""
        return self.positive.shape[2]

    @classmethod
    def made(
        cls, settings: Settings, positive: Encoded, negative: Encoded, precision: str, fingerprint: str = ""
    ) -> "PromptEmbeddings":
        """What an encoder in a precision made of the settings' prompt and negative prompt."""
        return cls(
            positive=positive.prompt_embeds,
            negative=negative.prompt_embeds,
            positive_text=settings.prompt,
            negative_text=settings.negative,
            precision=precision,
            clean_caption=settings.clean_caption,
            fingerprint=fingerprint,
            positive_truncated=positive.truncated,
            negative_truncated=negative.truncated,
            max_sequence_length=settings.max_sequence_length,
        )

    def prompts(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Prompts:
        """Both, for `guide`, where the transformer computes and in what."""
        return Prompts(self.positive.to(device, dtype), None, self.negative.to(device, dtype))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Raises SigmaError where it cannot be written."""
        metadata = {name: getattr(self, name) for name in TEXTS}
        metadata["clean_caption"] = "true" if self.clean_caption else "false"
        metadata["max_sequence_length"] = str(self.max_sequence_length)
        try:
            write_tensors(
                Path(path),
                {"positive": self.positive, "negative": self.negative},
                metadata,
            )
        except OSError as error:
            raise SigmaError(f"The embeddings cannot be written to {path}: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> "PromptEmbeddings":
        """Read what `save` wrote, onto the CPU. Raises CheckpointError for any other or damaged file."""
        tensors, metadata = read_tensors(Path(path), ("positive", "negative"))
        try:
            clean_caption = {"true": True, "false": False}[metadata["clean_caption"]]
            texts = {name: metadata[name] for name in TEXTS}
            # A file of before there were other lengths does not say it.
            length = int(metadata.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
            return cls(
                positive=tensors["positive"],
                negative=tensors["negative"],
                clean_caption=clean_caption,
                max_sequence_length=length,
                **texts,
            )
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error} in its metadata. {_WRITE_AGAIN}") from error
        except ValueError as error:  # a SigmaError is one
            raise CheckpointError(f"{path}: {error}") from error


def encode(encoder: TextEncoder, settings: Settings) -> PromptEmbeddings:
    """The embeddings of the settings' prompt and negative prompt. Raises SigmaError as TextEncoder.encode."""
    check_settings(settings)
    positive, negative = encoder.encode_all(
        (settings.prompt, settings.negative), settings.clean_caption, settings.max_sequence_length
    )
    return PromptEmbeddings.made(settings, positive, negative, encoder.precision)


TEXTS = (
    "positive_text",
    "negative_text",
    "precision",
    "fingerprint",
    "positive_truncated",
    "negative_truncated",
)
_WRITE_AGAIN = "Save it again, with Save Σ Prompt Embeddings or `pixart-sigma encode`."


def check_embeds(name: str, embeds: torch.Tensor) -> None:
    """SigmaError unless these are one prompt's embeddings (1, tokens, width) that can be kept."""
    if embeds.ndim != 3 or embeds.shape[0] != 1 or 0 in embeds.shape:
        raise SigmaError(
            f"The {name} embeddings have shape {tuple(embeds.shape)}, and one prompt's have "
            "(1, tokens, width). Save one prompt at a time."
        )
    if embeds.dtype not in DTYPES:
        raise SigmaError(f"The {name} embeddings are {embeds.dtype}; only fp32, fp16 and bf16 are kept.")
    if not torch.isfinite(embeds).all():
        raise SigmaError(f"The {name} embeddings have numbers that are not finite. Encode the prompt again.")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as a file of the format, whole or not at all; OSError where that fails."""
    # Clones, because the format refuses tensors that share memory, such as one prompt given twice.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": f"{FORMAT} {VERSION}"} | metadata
    metadata["sha256"] = _checksum(tensors, metadata)
    content = save(tensors, metadata)
    write_beside(path, lambda file: file.write(content))


def read_tensors(path: Path, names: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of these names and the metadata of a file, read at once: it may be replaced at any time.

    Raises CheckpointError.
    """
    check_file(path)
    try:
        tensors, metadata = read_whole_safetensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} It is no file of prompt embeddings. {_WRITE_AGAIN}") from error
    _check_format(path, metadata.get("format"))
    if sorted(tensors) != sorted(names):
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(tensors))}, not {' and '.join(names)}. {_WRITE_AGAIN}"
        )
    if metadata.pop("sha256", None) != _checksum(tensors, metadata):
        raise CheckpointError(f"{path} was damaged or changed after it was written. {_WRITE_AGAIN}")
    return tensors, metadata


def _check_format(path: Path, found) -> None:
    if found == f"{FORMAT} {VERSION}":
        return
    if isinstance(found, str) and found.startswith(FORMAT):
        raise CheckpointError(f"{path} was written by a newer version of the pack ({found}). Update it.")
    raise CheckpointError(
        f"{path} holds no prompt embeddings: its format is {found!r}, not '{FORMAT} {VERSION}'. "
        "Choose a file from Save Σ Prompt Embeddings or `pixart-sigma encode`."
    )


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
