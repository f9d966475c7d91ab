"""Weight files on disk: what is wrong with one, what it holds, and its tensors. No code is ever unpickled."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .gguf import BlockType, read_gguf_facts, read_gguf_header, read_gguf_tensors
from .locating import is_index, locate, shards_of
from .mapping import Entry, stored_bytes
from .parts import FACTS, PARTS, Choice, choose, kind_of, models
from .pickles import check_zip, load_pickle
from .quantised_layers import FORMAT
from .reading import DAMAGED, open_file, parse_json, parsing
from .safetensors_files import read_safetensors_header, read_safetensors_tensors


def check_file(path: str | Path) -> None:
    """Raise CheckpointError unless `path` is a whole safetensors or GGUF file or a PyTorch pickle, by its
    contents.

    Named are a missing or unreadable file, an empty one, a saved web page, a git-lfs pointer, a file that was
    cut off, and anything else that holds no weights. Reads no tensor data.
    """
    format = _format(Path(path))
    if format == "gguf":
        read_gguf_header(Path(path))
    elif format == "safetensors":
        read_safetensors_header(Path(path))


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
    They are memory-mapped from safetensors, GGUF and zip `.pth` files, see `map_files`. Raises
    CheckpointError as `read_header` does, and for a file without that part, by the name of what it is.
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


def find_tensors(path: str | Path, part: str | None = None) -> dict[str, tuple[Path, Entry] | None]:
    """In which file, and where there, each tensor of `read_state_dict` lies; None for those in pickles."""
    return _read(Path(path), part, _file_places)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; of an index, what its first shard says.

    {} for other formats. Raises CheckpointError as `check_file` does.
    """
    located = locate(Path(path))
    if is_index(located):
        located = located.parent / next(iter(shards_of(located)))
    if _format(located) != "safetensors":
        return {}
    return dict(read_safetensors_header(located).metadata)


def read_facts(path: str | Path) -> dict:
    """What this package wrote into a safetensors or GGUF file beside the weights, {} where it wrote nothing.

    JSON: in safetensors a tensor of bytes, because who saves by ComfyUI's nodes can add tensors and no
    metadata, in GGUF an entry of the metadata.
    """
    located = locate(Path(path))
    format = "" if is_index(located) else _format(located)
    if format not in ("safetensors", "gguf"):
        return {}
    if format == "gguf":
        said: str | bytes = read_gguf_facts(located)
    else:
        entries = read_safetensors_header(located).entries
        said = b"".join(
            stored.numpy().tobytes()
            for stored in stored_bytes(located, {FACTS: entries[FACTS]} if FACTS in entries else {}).values()
        )
    with parsing(located, "says of itself what can not be read"):
        found = parse_json(said or "{}")
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
    with open_file(path) as file, parsing(path):
        head = file.read(1024)
        size = file.seek(0, 2)
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
        check_zip(path, size)
        return "zip"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "pickle"
    raise CheckpointError(
        f"{path} is not a model file: it is neither safetensors, GGUF nor a PyTorch checkpoint."
    )


def _file_header(path: Path) -> dict:
    format = _format(path)
    if format in ("gguf", "safetensors"):
        entries = read_gguf_header(path) if format == "gguf" else read_safetensors_header(path).entries
        return {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
    tensors = load_pickle(path, "meta", format == "zip")
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def _file_places(path: Path) -> dict:
    format = _format(path)
    if format in ("gguf", "safetensors"):
        entries = read_gguf_header(path) if format == "gguf" else read_safetensors_header(path).entries
        return {name: (path, entry) for name, entry in entries.items()}
    return dict.fromkeys(load_pickle(path, "meta", format == "zip"))


def _file_tensors(path: Path) -> dict[str, Any]:
    format = _format(path)
    if format == "gguf":
        return read_gguf_tensors(path)
    if format == "safetensors":
        return read_safetensors_tensors(path)
    return load_pickle(path, "cpu", format == "zip")
