"""Prompt embeddings on disk: files that people keep, and a cache that spares T5 for prompts seen before.

Both are safetensors with a checksum in their metadata, so that a damaged one is noticed and never drawn.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import CheckpointError, SigmaError
from ..files.weight_files import MAX_SAFETENSORS_HEADER, check_file, read_state_dict
from ..files.writing import write_beside
from .encoder import Encoded, find_encoder
from .model import PLAIN, compute_dtype
from .tokenizer import find_tokenizer
from .weights import read_config, refuse_gguf

FORMAT = "pixart-sigma prompt embeddings"
VERSION = "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of each weight of T5 this many numbers are read at its start, middle and end.
SAMPLED_NUMBERS = 32
CACHE_BYTES = 256 * 2**20
CACHED_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{64}\.safetensors\..+")
UNFINISHED_SECONDS = 3600  # no write takes so long: who began it was killed


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """What T5 made of a prompt and a negative prompt, and how.

    positive, negative: (1, n, C) and (1, m, C) in fp32, fp16 or bf16, trimmed to their real tokens.
    positive_text, negative_text: as written. precision, clean_caption: T5's settings. fingerprint: see
    `identify`. positive_truncated, negative_truncated: words that did not fit. What is not known is "".

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

    def __post_init__(self):
        for name in ("positive", "negative"):
            _check_embeds(name, getattr(self, name))
        if self.positive.shape[2] != self.negative.shape[2]:
            raise SigmaError(
                f"The positive embeddings are {self.positive.shape[2]} wide and the negative ones "
                f"{self.negative.shape[2]}. Encode both prompts with the same text encoder."
            )

    @property
    def width(self) -> int:
        """C, which must be what the transformer reads: 4096 for PixArt-Sigma."""
        return self.positive.shape[2]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Raises SigmaError where it cannot be written."""
        texts = {name: getattr(self, name) for name in _TEXTS}
        try:
            _write(
                Path(path),
                {"positive": self.positive, "negative": self.negative},
                texts | {"clean_caption": "true" if self.clean_caption else "false"},
            )
        except OSError as error:
            raise SigmaError(f"The embeddings cannot be written to {path}: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> "PromptEmbeddings":
        """Read what `save` wrote, onto the CPU. Raises CheckpointError for any other or damaged file."""
        tensors, metadata = _read(Path(path), ("positive", "negative"))
        try:
            clean_caption = {"true": True, "false": False}[metadata["clean_caption"]]
            return cls(**tensors, clean_caption=clean_caption, **{name: metadata[name] for name in _TEXTS})
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error} in its metadata. {_WRITE_AGAIN}") from error
        except SigmaError as error:
            raise CheckpointError(f"{path}: {error}") from error


_TEXTS = (
    "positive_text",
    "negative_text",
    "precision",
    "fingerprint",
    "positive_truncated",
    "negative_truncated",
)
_WRITE_AGAIN = "Save it again, with Save Prompt Embeddings or `pixart-sigma encode`."


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder makes embeddings: a hash of its weights and tokenizer, and the precision it works in."""

    fingerprint: str
    precision: str


def identify(path: str | Path, tokenizer=None, precision: str | None = None) -> EncoderIdentity:
    """Know a T5 encoder without loading it; `path`, `tokenizer` and `precision` as for TextEncoder.load.

    The fingerprint covers the config, the tokenizer, and of every weight its name, shape, dtype and some
    numbers as they are stored: the same encoder in another dtype is another one, since its embeddings differ.
    Raises CheckpointError or SigmaError where there is no encoder or tokenizer.
    """
    path = find_encoder(path)
    refuse_gguf(path)
    digest = hashlib.sha256()
    saved = None
    if path.is_dir():
        saved = read_config(path)[1]
        digest.update((path / "config.json").read_bytes())
    file = find_tokenizer(path, tokenizer)
    for part in (file, file.parent / "tokenizer_config.json"):
        digest.update(part.read_bytes() if part.is_file() else b"")
    for key, weight in sorted(read_state_dict(path).items()):
        digest.update(f"\n{key} {weight.dtype} {tuple(weight.shape)}\n".encode())
        flat = weight.reshape(-1)
        for start in (0, len(flat) // 2, max(0, len(flat) - SAMPLED_NUMBERS)):
            digest.update(_bytes(flat[start : start + SAMPLED_NUMBERS]))
    return EncoderIdentity(digest.hexdigest(), precision or saved or "int8")


def cache_key(encoder: EncoderIdentity, device: torch.device, **asked) -> str:
    """The name of an encoder's answer on a kind of device; `asked`, ready for JSON, is all that decides it.

    A text is asked for as `prepare_prompt` returns it.
    """
    dtype = PLAIN.get(encoder.precision) or compute_dtype(device)
    decides = [FORMAT, VERSION, encoder.fingerprint, encoder.precision, device.type, str(dtype), asked]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


class EmbeddingCache:
    """Embeddings by `cache_key` in a folder, one file each; the least recently used go beyond `max_bytes`.

    Several processes may share the folder. Nothing here raises for what is on the disk: what cannot be read
    is a miss, and what cannot be written is logged in one line. Prompts are not written, only what was cut
    off from them.
    """

    def __init__(self, folder: str | Path, max_bytes: int = CACHE_BYTES):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._told = False

    def get(self, key: str) -> Encoded | None:
        """What was put under `key`, or None. A damaged file is removed."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors, metadata = _read(path, ("prompt_embeds",))
            _check_embeds("prompt", tensors["prompt_embeds"])
            if metadata.get("key") != key:
                raise CheckpointError(f"{path} holds another prompt.")
        except SigmaError:
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of the last use decides what goes first
        return Encoded(tensors["prompt_embeds"], metadata.get("truncated", ""))

    def put(self, key: str, encoded: Encoded) -> None:
        """Keep it, and let others go where there is no room."""
        if encoded.prompt_embeds.nbytes > self.max_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(
                self._path(key),
                {"prompt_embeds": encoded.prompt_embeds},
                {"key": key, "truncated": encoded.truncated},
            )
        except OSError as error:
            if not self._told:
                logging.getLogger(__name__).warning(
                    f"Prompt embeddings are not cached: {self.folder} cannot be written ({error.strerror}). "
                    "The run goes on without."
                )
            self._told = True
            return
        self._told = False
        self._evict()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _evict(self) -> None:
        """Another process may do the same at the same time, so any file may be gone already."""
        kept, total = [], 0
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if UNFINISHED_NAME.fullmatch(entry.name):
                        if time.time() - entry.stat().st_mtime > UNFINISHED_SECONDS:
                            _remove(entry.path)
                    elif CACHED_NAME.fullmatch(entry.name):
                        status = entry.stat()
                        kept.append((status.st_mtime_ns, status.st_size, entry.path))
                        total += status.st_size
        for _, size, path in sorted(kept):
            if total <= self.max_bytes:
                return
            _remove(path)
            total -= size


def user_cache_folder() -> Path:
    """Where the terminal caches: in $XDG_CACHE_HOME or ~/.cache, on Windows in %LOCALAPPDATA%."""
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    root = Path(os.environ.get(variable, ""))
    # A relative one counts as not set, says the XDG Base Directory Specification.
    return (root if root.is_absolute() else Path.home() / default) / "pixart_sigma" / "embeddings"


def _check_embeds(name: str, embeds: torch.Tensor) -> None:
    if embeds.ndim != 3 or embeds.shape[0] != 1 or 0 in embeds.shape:
        raise SigmaError(
            f"The {name} embeddings have shape {tuple(embeds.shape)}, and one prompt's have "
            "(1, tokens, width). Save one prompt at a time."
        )
    if embeds.dtype not in DTYPES:
        raise SigmaError(f"The {name} embeddings are {embeds.dtype}; only fp32, fp16 and bf16 are kept.")
    if not torch.isfinite(embeds).all():
        raise SigmaError(f"The {name} embeddings have numbers that are not finite. Encode the prompt again.")


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    # Clones, because the format refuses tensors that share memory, such as one prompt given twice.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": f"{FORMAT} {VERSION}"} | metadata
    metadata["sha256"] = _checksum(tensors, metadata)
    content = save(tensors, metadata)
    write_beside(path, lambda file: file.write(content))


def _read(path: Path, names: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of these names and the metadata of a file, read at once: it may be replaced at any time.

    Raises CheckpointError.
    """
    try:
        check_file(path)
        with open(path, "rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), MAX_SAFETENSORS_HEADER)
            metadata = json.loads(file.read(length)).get("__metadata__") or {}
            _check_format(path, metadata.get("format"))
            file.seek(0)
            tensors = load(file.read())
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} can not be read as prompt embeddings: {error}. {_WRITE_AGAIN}"
        ) from error
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
        "Choose a file from Save Prompt Embeddings or `pixart-sigma encode`."
    )


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _remove(path: str | Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
