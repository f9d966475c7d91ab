"""Weight files on disk: what is wrong with one, what it holds, and its tensors. No code is ever unpickled."""

import argparse
import json
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..errors import CheckpointError
from .gguf import BlockType, read_gguf_facts, read_gguf_header, read_gguf_tensors
from .locating import is_index, locate, shards_of
from .parts import FACTS, PARTS, TRAINING_STATE, Choice, choose, kind_of, models
from .quantised_layers import FORMAT

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit, in bytes
DAMAGED = "It is damaged or was not downloaded to its end: download it again."


def check_file(path: str | Path) -> None:
    """Raise CheckpointError unless `path` is a whole safetensors or GGUF file or a PyTorch pickle, by its
    contents.

    Named are a missing or unreadable file, an empty one, a saved web page, a git-lfs pointer, a file that was
    cut off, and anything else that holds no weights. Reads no tensor data.
    """
    if _format(Path(path)) == "gguf":
        read_gguf_header(Path(path))


def read_header(
    path: str | Path, part: str | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype | BlockType]]:
    """Shape and dtype of each tensor of a file, an index or a folder (see `locating`); of one that GGUF holds
    in blocks, their type.

    With a part, as `read_state_dict` has it. Reads no tensor data. Raises CheckpointError as `check_file`
    does, and for a pickle with code in it.
    """
    return _read(Path(path), part, _file_header)


def read_state_dict(path: str | Path, part: str | None = None) -> dict[str, Any]:
    """The tensors of a file, an index or a folder (see `locating`), in the dtypes of the file; what GGUF
    holds in blocks as QuantisedWeight.

    part: "transformer", "text_encoder" or "vae" for the weights of that model alone, by their bare names,
    without what wrappers, trainers and files of several models put in front of them or into them, without
    averages where the weights themselves are there. None for all tensors by the names of the file; of nested
    dictionaries in a pickle the names are joined, and an optimiser's state is left out.
    They are memory-mapped from safetensors, GGUF and zip `.pth` files. Raises CheckpointError as
    `read_header` does, and for a file without that part, by the name of what it is.
    """
    return _read(Path(path), part, _file_tensors)


def read_outline(path: str | Path, part: str | None = None) -> dict[str, Any]:
    """What `read_state_dict` gives, on the meta device; only the tensors that say in JSON how a layer is
    quantised (FORMAT) are read. Raises CheckpointError as `read_header` does."""
    outline: dict[str, Any] = {}
    header = read_header(path, part)
    for name, (shape, dtype) in header.items():
        if isinstance(dtype, BlockType):
            outline[name] = dtype.outline(shape)
        else:
            outline[name] = torch.empty(shape, dtype=dtype, device="meta")
    if any(name.endswith(FORMAT) for name in header):
        tensors = read_state_dict(path, part)
        outline |= {name: tensors[name] for name in header if name.endswith(FORMAT)}
    return outline


def read_metadata(path: str | Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; of an index, what its first shard says.

    {} for other formats. Raises CheckpointError as `check_file` does.
    """
    located = locate(Path(path))
    if is_index(located):
        located = located.parent / next(iter(shards_of(located)))
    if _format(located) != "safetensors":
        return {}
    try:
        with safe_open(located, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{located} can not be read: {error}. {DAMAGED}") from error


def read_facts(path: str | Path) -> dict:
    """What this package wrote into a safetensors or GGUF file beside the weights, {} where it wrote nothing.

    JSON: in safetensors a tensor of bytes, because who saves by ComfyUI's nodes can add tensors and no
    metadata, in GGUF an entry of the metadata.
    """
    located = locate(Path(path))
    format = "" if is_index(located) else _format(located)
    if format not in ("safetensors", "gguf"):
        return {}
    try:
        if format == "gguf":
            found = json.loads(read_gguf_facts(located) or "{}")
        else:
            with safe_open(located, framework="np") as file:
                found = json.loads(file.get_tensor(FACTS).tobytes()) if FACTS in file.keys() else {}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"What {located} says of itself can not be read: {error}. {DAMAGED}") from error
    return found if isinstance(found, dict) else {}


def facts_tensor(facts: dict) -> torch.Tensor:
    """What `read_facts` reads under the name FACTS."""
    return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)


def choose_part(names, part: str, path: Path) -> Choice:
    """The names of one part's weights among all `names` of `path`; see `read_state_dict`.

    Raises CheckpointError for a file that has no such part, or one weight twice.
    """
    names = list(names)
    try:
        choice = choose(names, part)
        kind = kind_of(choice.names)
        if choice.names and (kind is None or kind.part == part):
            return choice
        held = [kind_of(found.names) for found in models(names).values()]
    except ValueError as error:
        one, other = error.args
        raise CheckpointError(
            f"{path} holds one weight twice, as {one} and as {other}. Choose another file."
        ) from None
    words = [kind.words for kind in held if kind is not None]
    if not words:
        return choice  # who knows the model says what is missing
    raise CheckpointError(f"{path} is {' and '.join(words)}, not {PARTS[part]}. Choose another file.")


def _read(path: Path, part: str | None, read) -> dict:
    values = _merge(path, read)
    if part is None:
        return values
    return {bare: values[name] for bare, name in choose_part(values, part, path).names.items()}


def _merge(path: Path, read) -> dict:
    located = locate(path)
    if not is_index(located):
        return read(located)
    merged: dict[str, Any] = {}
    for name, keys in shards_of(located).items():
        shard = read(located.parent / name)
        for key in keys:
            if key not in shard:
                raise CheckpointError(
                    f"{located.parent / name} lacks {key}, which {located.name} lists. {DAMAGED}"
                )
        twice = sorted(merged.keys() & shard.keys())
        if twice:
            raise CheckpointError(f"{twice[0]} is in two shards of {located}. Download them again.")
        merged |= shard
    return merged


def _format(path: Path) -> str:
    """What a file's first bytes make it: "safetensors", "gguf", "zip" or "pickle" (PyTorch's before 1.6)."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
            size = file.seek(0, 2)
    except FileNotFoundError as error:
        link = " (it is a link to a file that is gone)" if path.is_symlink() else ""
        raise CheckpointError(f"There is no file {path}{link}.") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder, and a file is needed.") from error
    except PermissionError as error:
        raise CheckpointError(f"No permission to read {path}. Allow your user to read it.") from error
    except OSError as error:
        raise CheckpointError(f"{path} can not be read: {error}.") from error
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise CheckpointError(f"{path} is empty. Download it again.")
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise CheckpointError(
            f"{path} is a web page saved under the name of a model. Download the file itself "
            "(a gated model needs you to be logged in)."
        )
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the model. Run `git lfs pull` beside it.")
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path, size)
        return "zip"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        _check_safetensors(path, head, size)
        return "safetensors"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "pickle"
    raise CheckpointError(
        f"{path} is not a model file: it is neither safetensors, GGUF nor a PyTorch checkpoint."
    )


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is cut off or damaged ({size} bytes are there). Download it again."
        ) from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path} is a zip archive without a PyTorch checkpoint in it. Unpack it first.")


def _check_safetensors(path: Path, head: bytes, size: int) -> None:
    length = int.from_bytes(head[:8], "little")
    if size > 8 and (head[8:9] != b"{" or length > MAX_SAFETENSORS_HEADER):
        raise CheckpointError(
            f"{path} is not a safetensors file, though it may be named so. Download it again."
        )
    needed = 8 + length
    if size >= needed:
        try:
            with open(path, "rb") as file:
                file.seek(8)
                header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            needed += max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"The header of {path} can not be read. {DAMAGED}") from error
    if size < needed:
        raise CheckpointError(f"{path} is cut off: {size} of {needed} bytes are there. Download it again.")


def _file_header(path: Path) -> dict:
    format = _format(path)
    if format == "gguf":
        return {name: (entry.shape, entry.dtype) for name, entry in read_gguf_header(path).items()}
    if format != "safetensors":
        tensors = _load_pickle(path, "meta")
        return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    header = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():
                tensor = file.get_slice(key)
                dtype = SAFETENSORS_DTYPES.get(str(tensor.get_dtype()))
                if dtype is None:
                    raise CheckpointError(
                        f"{path} stores {key} as {tensor.get_dtype()}, which is not read here."
                    )
                header[key] = (tuple(tensor.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can not be read: {error}. {DAMAGED}") from error
    return header


def _file_tensors(path: Path) -> dict[str, Any]:
    format = _format(path)
    if format == "gguf":
        return read_gguf_tensors(path)
    if format != "safetensors":
        return _load_pickle(path, "cpu")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} can not be read: {error}. {DAMAGED}") from error


def _load_pickle(path: Path, device: str) -> dict[str, torch.Tensor]:
    mapped = _format(path) == "zip"
    if not mapped:
        warnings.warn(
            f"{path} is in PyTorch's format from before 1.6 and has to be read as a whole. "
            "Save it as safetensors to load it faster.",
            stacklevel=2,
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # a training run's options
            content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} was refused: it holds {refused[1]}, which is code to run and not weights. "
                "Use a safetensors file from a source that you trust."
            ) from error
        raise CheckpointError(f"{path} holds no weights that can be read safely. {DAMAGED}") from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{path} can not be read as a PyTorch checkpoint. {DAMAGED}") from error
    return _all_tensors(content, path)


def _all_tensors(content, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries, by the names of all joined, without an optimiser's state."""
    found, passed = {}, []
    levels = [("", content)]
    for prefix, level in levels:
        if not isinstance(level, dict):
            passed.append((prefix.rstrip("."), level))
            continue
        for key, value in level.items():
            if isinstance(key, str) and isinstance(value, torch.Tensor):
                found[prefix + key] = value
            elif key not in TRAINING_STATE:
                levels.append((f"{prefix}{key}.", value))
    if not found:
        name, value = passed[0] if passed else ("", content)
        under = f" under {name!r}" if name else ""
        raise CheckpointError(f"{path} holds a {type(value).__name__}{under} and no weights by name.")
    return found
