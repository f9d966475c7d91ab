"""A cache of embeddings that spares T5 for prompts seen before."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files.digests import user_cache
from ..files.writing import clear_unfinished
from ..prompt_embeds import Encoded
from .embeddings import FORMAT, VERSION, check_embeds, read_tensors, write_tensors
from .identity import EncoderIdentity
from .model import compute_dtype

CACHE_BYTES = 256 * 2**20
CACHED_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


def cache_key(encoder: EncoderIdentity, device: torch.device, **asked) -> str:
    """The name of an encoder's answer on a kind of device; `asked`, ready for JSON, is all that decides it.

    A text is asked for as `prepare_prompt` returns it.
    """
    dtype = compute_dtype(encoder.precision, device)
    decides = [
        FORMAT,
        VERSION,
        encoder.fingerprint,
        encoder.content,
        encoder.precision,
        device.type,
        str(dtype),
        asked,
    ]
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
        """What was put under `key`, or None. What is there and cannot be used is removed."""
        path = self._path(key)
        if not os.path.lexists(path):
            return None
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.max_bytes:
                raise CheckpointError(f"{path} was not put here.")
            tensors, metadata = read_tensors(path, ("prompt_embeds",))
            check_embeds("prompt", tensors["prompt_embeds"])
            if metadata.get("key") != key:
                raise CheckpointError(f"{path} holds another prompt.")
        except Exception:  # whatever it is, the prompt is encoded anew
            _remove(path)
            return None
        _use(path)
        return Encoded(tensors["prompt_embeds"], metadata.get("truncated", ""))

    def put(self, key: str, encoded: Encoded) -> None:
        """Keep it, and let others go where there is no room."""
        if encoded.prompt_embeds.nbytes > self.max_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self._path(key)
            _remove_unless_file(path)  # a link, through which another file would be written
            write_tensors(
                path,
                {"prompt_embeds": encoded.prompt_embeds},
                {"key": key, "truncated": encoded.truncated},
            )
            _use(path)
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
        """Another process may do the same at the same time, so any file may be gone already.

        The least recently used go first, and before them those of a date to come, as of a clock that was set
        back: of these it is not known when they were used.
        """
        clear_unfinished(self.folder)
        kept, total = [], 0
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if CACHED_NAME.fullmatch(entry.name):
                        status = entry.stat(follow_symlinks=False)
                        kept.append((status.st_mtime_ns, status.st_size, entry.path))
                        total += status.st_size
        now = time.time_ns()
        for _, _, size, path in sorted((used <= now, used, size, path) for used, size, path in kept):
            if total <= self.max_bytes:
                return
            _remove(path)
            total -= size


def user_cache_folder() -> Path:
    """Where the terminal caches, see `user_cache`."""
    return user_cache() / "embeddings"


def _use(path: Path) -> None:
    """Say that it was used now, by the clock that `_evict` reads."""
    with contextlib.suppress(OSError):
        now = time.time_ns()
        os.utime(path, ns=(now, now))


def _remove_unless_file(path: Path) -> None:
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.lstat().st_mode):
            _remove(path)


def _remove(path: str | Path) -> None:
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
