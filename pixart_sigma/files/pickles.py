"""PyTorch's checkpoints, zip files since 1.6 and bare pickles before: no code in one is ever run.

PyTorch's own restricted reader makes the tensors. What it would do without end is refused before: its
outline, the pickle, is walked first, and what comes out is held against the size of the file.
"""

import argparse
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from .mapping import files_are_mapped
from .parts import TRAINING_STATE
from .reading import DAMAGED, MOST_BYTES, MOST_DEPTH, MOST_NAME, MOST_TENSORS, open_file, parsing

OUTLINE = "/data.pkl"
MOST_PARTS = 100_000  # of a tuple, those of its own tuples counted as often as they are in it
FILLING = {"APPEND", "APPENDS", "LIST", "SETITEM", "SETITEMS", "DICT"}
# The pickles in a file of before 1.6: a number, the version, the machine, and the checkpoint.
LEGACY_PICKLES = 4
# A weight may be in a file by two names; more is a small file that stands for much memory.
MOST_SHARED = 4
SMALL = 2**20  # bytes


def check_zip(path: Path, size: int) -> None:
    """CheckpointError for a zip archive that is damaged or is no checkpoint of PyTorch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises what it likes for damaged bytes
        raise CheckpointError(
            f"{path} is cut off or damaged ({size} bytes are there). Download it again."
        ) from error
    outlines = [entry for entry in entries if entry.filename.endswith(OUTLINE)]
    if not outlines:
        raise CheckpointError(f"{path} is a zip archive without a PyTorch checkpoint in it. Unpack it first.")
    if len(entries) > MOST_TENSORS or outlines[0].file_size > MOST_BYTES:
        raise CheckpointError(
            f"{path} has {len(entries)} entries and an outline of {outlines[0].file_size} bytes, more than "
            "any checkpoint has."
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} was compressed as a zip archive, which PyTorch does not do. Unpack it, or save it again."
        )


def load_pickle(path: Path, device: str, zipped: bool) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, on "cpu", mapped to a zip file where files are mapped, or on "meta".

    Raises CheckpointError for one that is damaged, holds code or no weights by name, or stands for more
    memory than a file of its size can.
    """
    mapped = zipped and files_are_mapped()
    if not zipped:
        warnings.warn(
            f"{path} is in PyTorch's format from before 1.6 and has to be read as a whole. "
            "Save it as safetensors to load it faster.",
            stacklevel=2,
        )
    with parsing(path, "can not be read as a PyTorch checkpoint"):
        _check_outlines(path, zipped)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # a training run's options
                content = torch.load(path, map_location=device, weights_only=True, mmap=mapped or None)
        except pickle.UnpicklingError as error:
            raise _refused(path, error) from error
        found = _all_tensors(content, path)
        _check_tensors(found, path, device)
    return found


class _Bounded:
    """An open file of which a pickle can be read, and no more than a pickle of weights has."""

    def __init__(self, file: BinaryIO):
        self.file, self.end = file, file.tell() + MOST_BYTES

    def read(self, count: int) -> bytes:
        if count > self.end - self.file.tell():
            raise ValueError(f"its outline has more than {MOST_BYTES} bytes")
        return self.file.read(count)

    def readline(self) -> bytes:
        return self.file.readline(max(0, self.end - self.file.tell()))

    def tell(self) -> int:
        return self.file.tell()


def _check_outlines(path: Path, zipped: bool) -> None:
    """Walk the pickles of a file; raises what `_check_outline` does."""
    if zipped:  # by the reader that PyTorch itself reads it with
        _check_outline(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))
        return
    size = path.stat().st_size
    with open_file(path) as file:
        for _ in range(LEGACY_PICKLES):
            if file.tell() < size:
                _check_outline(_Bounded(file))


def _check_outline(outline: Any) -> None:
    """Walk the operations of a pickle, doing none, and raise ValueError where they make tuples in tuples that
    take for ever to be told apart: 2^28 parts need only 28 operations.

    The stack holds how many parts each value has; pickletools knows what an operation takes and leaves.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(outline):
        name = operation.name
        if name == "MARK":
            marks.append(len(stack))
        elif "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        else:
            # What lists and dictionaries hold is never asked for as a whole.
            taken = _take(operation, stack, marks)
            parts = 1 if name in FILLING else 1 + sum(taken)
            if parts > MOST_PARTS:
                raise ValueError(f"it nests tuples of more than {MOST_PARTS} parts")
            stack += [parts] * len(operation.stack_after)


def _take(operation: Any, stack: list[int], marks: list[int]) -> list[int]:
    """What an operation takes from the stack, the values behind its mark among them."""
    before = operation.stack_before
    count = len(before)
    if pickletools.markobject in before:
        begin = marks.pop() - before.index(pickletools.markobject)
    else:
        begin = len(stack) - count
    if begin < 0:
        raise ValueError(f"{operation.name} takes more than there is")
    taken = stack[begin:]
    del stack[begin:]
    return taken


def _refused(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return CheckpointError(
            f"{path} was refused: it holds {code[1]}, which is code to run and not weights. "
            "Use a safetensors file from a source that you trust."
        )
    return CheckpointError(f"{path} holds no weights that can be read safely. {DAMAGED}")


def _all_tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries, by the names of all joined, without an optimiser's state."""
    found: dict[str, torch.Tensor] = {}
    passed = []
    levels = [("", content, 0)]
    for prefix, level, depth in levels:
        if not isinstance(level, dict):
            passed.append((prefix.rstrip("."), level))
            continue
        if depth > MOST_DEPTH or len(levels) > MOST_TENSORS:
            raise ValueError("its dictionaries hold one another without end")
        if len(prefix) > MOST_NAME:
            raise ValueError(f"it has a name of {len(prefix)} letters")
        for key, value in level.items():
            if isinstance(key, str) and isinstance(value, torch.Tensor):
                found[prefix + key] = value
            elif key not in TRAINING_STATE:
                levels.append((f"{prefix}{key}.", value, depth + 1))
    if not found:
        name, value = passed[0] if passed else ("", content)
        under = f" under {name!r}" if name else ""
        raise CheckpointError(f"{path} holds a {type(value).__name__}{under} and no weights by name.")
    return found


def _check_tensors(found: dict[str, torch.Tensor], path: Path, device: str) -> None:
    """Raises ValueError for tensors that no checkpoint of weights has, and that no code here expects."""
    size, taken = path.stat().st_size, 0
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"{name} is no plain tensor")
        if tensor.device.type != device:
            raise ValueError(f"{name} has no numbers")
        taken += tensor.nbytes
    if taken > MOST_SHARED * size + SMALL:
        raise ValueError(f"its {len(found)} tensors would take {taken} bytes, and the file has {size}")
