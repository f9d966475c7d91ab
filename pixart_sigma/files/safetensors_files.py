"""Safetensors files: the header, held against the file before anything is believed, and the tensors.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the header's length, the
header in JSON, and the tensors one behind the other.
"""

from dataclasses import dataclass, field
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .mapping import Entry, read_entry, stored_bytes
from .reading import DAMAGED, MOST_BYTES, MOST_TENSORS, check_shape, open_file, parse_json, parsing

DTYPES = {
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
METADATA = "__metadata__"


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors by name, and texts."""

    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)


def read_safetensors_header(path: Path) -> Header:
    """The header of a file. Reads no tensor data. Raises CheckpointError for a file that is cut off, damaged
    or something else, and for tensors of a dtype that is not known."""
    with open_file(path) as file:
        return _read_header(file, path)


def read_safetensors_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, mapped to the file where files are mapped. Raises as the header does."""
    entries = read_safetensors_header(path).entries
    return {name: _shaped(found, entries[name]) for name, found in stored_bytes(path, entries).items()}


def read_whole_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, in RAM, and the metadata of a file that may be replaced at any time: it is opened once.

    Raises as the header does.
    """
    with open_file(path) as file:
        header = _read_header(file, path)
        tensors = {
            name: _shaped(read_entry(file, entry, path), entry) for name, entry in header.entries.items()
        }
    return tensors, header.metadata


def _shaped(stored: torch.Tensor, entry: Entry) -> torch.Tensor:
    return stored.view(entry.dtype).view(entry.shape)


def _read_header(file: BufferedReader, path: Path) -> Header:
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if size > 8 and (head[8:9] != b"{" or length > MOST_BYTES):
        raise CheckpointError(
            f"{path} is not a safetensors file, though it may be named so. Download it again."
        )
    start = 8 + length
    if size < start:
        raise _cut_off(path, size, start)
    file.seek(8)
    content = file.read(length)
    with parsing(path, "has a header that can not be read"):
        found = parse_json(content)
        metadata = found.pop(METADATA, None) or {}
        if len(found) > MOST_TENSORS:
            raise ValueError(f"it lists {len(found)} tensors")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not texts")
        entries = {name: _entry(name, facts, start, path) for name, facts in found.items()}
        placed = sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes))
        end = start
        for name, entry in placed:
            if entry.start != end:
                raise ValueError(f"{name} does not lie where the tensor before it ends")
            end += entry.nbytes
    if size < end:
        raise _cut_off(path, size, end)
    if size > end:
        raise CheckpointError(f"{path} has {size - end} bytes behind its last tensor. {DAMAGED}")
    return Header(entries, metadata)


def _entry(name: str, facts: dict[str, Any], start: int, path: Path) -> Entry:
    """Raises what a damaged entry makes of this; see `parsing`."""
    dtype = DTYPES.get(facts["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path} stores {name} as {facts['dtype']}, which is not read here.")
    shape = check_shape(name, facts["shape"])
    begin, end = facts["data_offsets"]
    if end - begin != prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"{name} is said to be {list(shape)} in {facts['dtype']} and from {begin} to {end}")
    return Entry(shape, dtype, start + begin, end - begin)


def _cut_off(path: Path, size: int, needed: int) -> CheckpointError:
    return CheckpointError(f"{path} is cut off: {size} of {needed} bytes are there. Download it again.")
