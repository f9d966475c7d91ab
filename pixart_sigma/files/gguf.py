"""GGUF files: the tensors that one holds, memory-mapped, in the order of torch's dimensions.

The format is that of ggml (docs/gguf.md), versions 2 and 3, little-endian. The file is untrusted: each count
and length is held against what is left of the file before anything is read or skipped by it. The package
`gguf` says how large the blocks of each type are; its own reader makes an object for every number it meets.
"""

import functools
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .gguf_blocks import FORMULAS, dequantise_blocks
from .gguf_names import to_transformers_names
from .mapping import Entry, stored_bytes
from .parts import FACTS
from .quantised_weights import QuantisedWeight
from .reading import MOST_DIMENSIONS, MOST_NAME, MOST_TENSORS, check_shape, open_file, parsing

MAX_ENTRIES = 10_000  # of metadata
MAX_STRINGS = 2_000_000  # in one list, such as a vocabulary
# By the number of a metadata value's type, its bytes.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, LIST = 8, 9
UNSIGNED = {0, 2, 4, 10}
ARCHITECTURE = "general.architecture"
TEXTS = (ARCHITECTURE, FACTS)
ALIGNMENT = "general.alignment"
# The shape of a tensor that was flattened so that blocks fit into its rows (city96's ComfyUI-GGUF).
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}


@dataclass(frozen=True)
class BlockType:
    """How a tensor is quantised: `block_size` numbers in `type_size` bytes."""

    name: str
    block_size: int
    type_size: int

    def weight(self, shape: tuple[int, ...], stored: torch.Tensor) -> QuantisedWeight:
        """The weight of this shape on its raw bytes (uint8), a row of them for each row of blocks."""
        whole = shape[-1] % self.block_size == 0  # not so for a tensor that was flattened
        rows = stored.view(prod(shape[:-1]) if whole else 1, -1)

        def formula(weight: torch.Tensor) -> torch.Tensor:
            return dequantise_blocks(weight, self.name, self.type_size)

        return QuantisedWeight(self.name, shape, {"weight": rows}, formula)

    def outline(self, shape: tuple[int, ...]) -> QuantisedWeight:
        """A weight of this shape on the meta device."""
        nbytes = prod(shape) // self.block_size * self.type_size
        return self.weight(shape, torch.empty(nbytes, dtype=torch.uint8, device="meta"))


def read_gguf_header(path: Path) -> dict[str, Entry]:
    """The tensors of a GGUF file by name, T5's as transformers calls them. Reads no tensor data.

    Raises CheckpointError for a file that is cut off or damaged, is of another version, holds nothing or has
    a type that is not known, and without the package gguf.
    """
    return _read(path)[0]


def read_gguf_facts(path: Path) -> str:
    """What this package wrote of its model into a GGUF file, JSON, or "". Raises as `read_gguf_header`."""
    return _read(path)[1].get(FACTS, "")


def block_type(name: str) -> BlockType:
    """The block type of this name. Raises CheckpointError without the package gguf."""
    found = next((kind for kind in _block_types().values() if getattr(kind, "name", "") == name), None)
    if not isinstance(found, BlockType):
        raise CheckpointError(f"The installed package gguf does not know {name}: pip install -U gguf.")
    return found


def _read(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    with open_file(path) as file, parsing(path, "can not be read as GGUF"):
        size = file.seek(0, 2)
        file.seek(0)
        return _Reader(file, size, path).read()


def read_gguf_tensors(path: Path) -> dict[str, Any]:
    """The tensors by name, memory-mapped; those in blocks as QuantisedWeight. Raises as the header does."""
    header = read_gguf_header(path)
    tensors: dict[str, Any] = {}
    for name, stored in stored_bytes(path, header).items():
        entry = header[name]
        if isinstance(entry.dtype, BlockType):
            tensors[name] = entry.dtype.weight(entry.shape, stored)
        else:
            tensors[name] = stored.view(entry.dtype).view(entry.shape)
    return tensors


class _Reader:
    """Reads a header from its start to its end."""

    def __init__(self, file, size: int, path: Path):
        self.file, self.size, self.path = file, size, path
        self.types = _block_types()

    def read(self) -> tuple[dict[str, Entry], dict[str, Any]]:
        """The tensors, and of the metadata what somebody asks for."""
        self.skip(4)  # GGUF
        version = self.number(4)
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is GGUF of version {version}, in this byte order; versions 2 and 3, "
                "little-endian, are read. Choose another file."
            )
        tensors, entries = self.count(8, MOST_TENSORS, "tensors"), self.count(8, MAX_ENTRIES, "entries")
        metadata = dict(self.metadata_entry() for _ in range(entries))
        found: dict[str, tuple] = {}
        for _ in range(tensors):
            name, facts = self.tensor_entry()
            if name in found:
                raise _damaged(self.path, f"it has {name} twice")
            found[name] = facts
        if not found:
            made_for = f" for the architecture {metadata[ARCHITECTURE]!r}" if ARCHITECTURE in metadata else ""
            raise CheckpointError(f"{self.path} is GGUF{made_for} without any weights. Choose another file.")
        return self.place(found, metadata), metadata

    def place(self, found: dict[str, tuple], metadata: dict) -> dict[str, Entry]:
        """The tensors with where they are, each inside of the file."""
        alignment = metadata.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8 or alignment > 2**20:
            raise _damaged(self.path, f"its alignment is {alignment!r}")
        begin = -(-self.file.tell() // alignment) * alignment
        placed, names = {}, to_transformers_names(found)
        for name, (shape, dtype, offset) in found.items():
            nbytes = self.nbytes(name, shape, dtype)
            if offset % alignment:
                raise _damaged(self.path, f"{name} is not aligned")
            if begin + offset + nbytes > self.size:
                raise _cut_off(self.path, f"{begin + offset + nbytes} bytes are needed for {name}")
            original = metadata.get(ORIGINAL_SHAPE + name)
            if isinstance(original, tuple) and prod(original) == prod(shape):
                shape = original
            placed[names[name]] = Entry(shape, dtype, begin + offset, nbytes)
        if len(placed) < len(found):
            raise _damaged(self.path, "it has a weight under two names")
        return placed

    def nbytes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | BlockType) -> int:
        if not isinstance(dtype, BlockType):
            return prod(shape) * dtype.itemsize
        if not shape or 0 in shape or shape[-1] % dtype.block_size:
            raise _damaged(self.path, f"{name} {shape} has no whole blocks of {dtype.name}")
        return prod(shape) // dtype.block_size * dtype.type_size

    def tensor_entry(self) -> tuple[str, tuple]:
        name = self.text(MOST_NAME)
        dimensions = self.count(4, MOST_DIMENSIONS, f"dimensions of {name}")
        shape = check_shape(name, tuple(self.number(8) for _ in range(dimensions))[::-1])
        number, offset = self.number(4), self.number(8)
        dtype = self.types.get(number)
        if dtype is None:
            raise CheckpointError(
                f"{self.path} stores {name} as type {number} of GGUF, which the installed package gguf does "
                "not read. Update it (pip install -U gguf), or choose a file in Q8_0, Q5_0 or Q4_0."
            )
        return name, (shape, dtype, offset)

    def metadata_entry(self) -> tuple[str, Any]:
        name = self.text(MOST_NAME)
        return name, self.value(self.number(4), name)

    def value(self, kind: int, name: str) -> Any:
        """A value of the metadata where somebody asks for it; it is skipped where nobody does."""
        if kind in SCALARS:
            return self.number(SCALARS[kind]) if kind in UNSIGNED else self.skip(SCALARS[kind])
        if kind == STRING:
            return self.text(MOST_NAME) if name in TEXTS else self.skip(self.number(8))
        if kind != LIST:
            raise _damaged(self.path, f"{name} has a value of type {kind}")
        held = self.number(4)
        if held in SCALARS:
            length = self.count(8, self.size // SCALARS[held], f"numbers in {name}")
            if name.startswith(ORIGINAL_SHAPE) and length <= MOST_DIMENSIONS:
                return tuple(self.number(SCALARS[held]) for _ in range(length))
            return self.skip(length * SCALARS[held])
        if held != STRING:
            raise _damaged(self.path, f"{name} is a list of type {held}")
        for _ in range(self.count(8, MAX_STRINGS, f"texts in {name}")):
            self.skip(self.number(8))
        return None

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.bytes(nbytes), "little")

    def count(self, nbytes: int, most: int, what: str) -> int:
        found = self.number(nbytes)
        if found > most:
            raise _damaged(self.path, f"it claims {found} {what}")
        return found

    def text(self, most: int) -> str:
        return self.bytes(self.count(8, most, "bytes in a name")).decode("utf-8")

    def bytes(self, nbytes: int) -> bytes:
        if nbytes > self.size - self.file.tell():
            raise _cut_off(self.path)
        return self.file.read(nbytes)

    def skip(self, nbytes: int) -> None:
        if nbytes > self.size - self.file.tell():
            raise _cut_off(self.path)
        self.file.seek(nbytes, 1)


@functools.cache
def _block_types() -> dict[int, torch.dtype | BlockType]:
    """By their numbers in a file the types that can be read: torch's, and those that are dequantised."""
    try:
        import numpy
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(
            "To read GGUF files the package gguf is needed, and it is not installed: pip install gguf."
        ) from error
    types: dict[int, torch.dtype | BlockType] = {}
    for kind, (block_size, type_size) in GGML_QUANT_SIZES.items():
        if kind.name in PLAIN:
            types[int(kind)] = PLAIN[kind.name]
            continue
        try:
            if kind.name not in FORMULAS:
                dequantize(numpy.zeros((1, type_size), numpy.uint8), kind)
        except NotImplementedError:
            continue
        types[int(kind)] = BlockType(kind.name, block_size, type_size)
    return types


def _cut_off(path: Path, needed: str = "its header is longer") -> CheckpointError:
    return CheckpointError(
        f"{path} is cut off: {path.stat().st_size} bytes are there, and {needed}. Download it again."
    )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} can not be read as GGUF: {why}. It is damaged or was not downloaded to its end: "
        "download it again."
    )
