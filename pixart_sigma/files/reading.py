"""How every file is opened and parsed here: regular files alone, within bounds of size, depth and count, and
whatever a parser makes of a damaged one becomes an error that names the file.

Nothing here imports torch, so that a mistake is known at once.
"""

import io
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SigmaError

DAMAGED = "It is damaged or was not downloaded to its end: download it again."
AGAIN = "Download it again."
# Far more than any model, training run or workflow has in what is read as a whole: a header, a config, the
# description in a picture, a tokenizer, the outline of a pickle.
MOST_BYTES = 32 * 2**20
MOST_CONTAINERS = 1_000_000  # lists and objects in a JSON text
MOST_DEPTH = 64
NESTED = f"its values are nested more than {MOST_DEPTH} deep"
MOST_DIGITS = 32  # of a whole number
MOST_TENSORS = 100_000
MOST_NAME = 65_535  # letters of a tensor's name
MOST_DIMENSIONS = 8
MOST_NUMBERS = 2**40  # of one tensor
SPECIAL = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def refuse_special(path: str | Path) -> None:
    """CheckpointError for what is there and is neither a file nor a folder: reading a pipe or a device may
    never end. What is not there is left to whoever opens it."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    except ValueError as error:  # a NUL in it
        raise CheckpointError(f"{path!r} is no path of a file: {error}.") from None
    for is_kind, words in SPECIAL.items():
        if is_kind(mode):
            raise CheckpointError(f"{path} is {words}; give a regular file. Write it to one first.")


def open_file(path: str | Path) -> io.BufferedReader:
    """A regular file, to be read. Raises CheckpointError, with what to do, for one that cannot be opened."""
    refuse_special(path)
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        link = " (it is a link to a file that is gone)" if os.path.islink(path) else ""
        raise CheckpointError(f"There is no file {path}{link}.") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder, and a file is needed.") from error
    except PermissionError as error:
        raise CheckpointError(f"No permission to read {path}. Allow your user to read it.") from error
    except OSError as error:
        raise CheckpointError(f"{path} can not be read: {error.strerror or error}.") from error


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """A file as a whole. Raises CheckpointError as `open_file`, and for one of more than `most` bytes."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CheckpointError(f"{path} is larger than the {most // 2**20} MB that such a file can have.")
    return content


@contextmanager
def parsing(
    name: str | Path,
    said: str = "can not be read",
    advice: str = DAMAGED,
    kind: type[SigmaError] = CheckpointError,
) -> Iterator[None]:
    """Within this block a parser's complaint becomes an error of this kind that names the file: "NAME SAID:
    complaint. ADVICE".

    Any complaint: parsers of foreign bytes raise what they like, and those in Rust, when they panic, what is
    no Exception. An error that names the file already passes, and so do all other interrupts and a lack of
    memory. For a callback of the caller's this is not the place.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if isinstance(error, SigmaError) and str(name) in str(error):
            raise
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        words = str(error).strip().rstrip(".") if isinstance(error, OSError | ValueError) else repr(error)
        raise kind(f"{name} {said}: {words[:300]}. {advice}") from error


def _is_panic(error: BaseException) -> bool:
    """Whether this is a panic of a library in Rust, such as tokenizers, each of which has a class for it that
    can not be imported."""
    return type(error).__module__.startswith("pyo3_runtime")


def parse_json(content: bytes | str) -> Any:
    """What JSON in UTF-8 says, within the bounds above. Raises ValueError.

    Infinity and NaN are read by their names, which diffusers writes, but no number that a float cannot hold.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content)} bytes, and at most {MOST_BYTES} are read")
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    if text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise ValueError(f"it has more than {MOST_CONTAINERS} lists and objects")
    try:
        found = json.loads(text, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError(NESTED) from None
    level = [found]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            break
    else:
        raise ValueError(NESTED)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError for half a character
    return found


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:MOST_DIGITS]} is a number that is too large")
    return number


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError when it can not be read."""
    content = read_bytes(path)
    with parsing(path, "can not be read as JSON", AGAIN):
        settings = parse_json(content)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings. Download it again.")
    return settings


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """The shape that a file's header claims for a tensor. Raises ValueError for one that can not be."""
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    if not whole or len(shape) > MOST_DIMENSIONS or max(1, *shape, math.prod(shape)) > MOST_NUMBERS:
        raise ValueError(f"{name[:MOST_DEPTH]} is said to have the shape {str(list(shape))[:100]}")
    return tuple(shape)
