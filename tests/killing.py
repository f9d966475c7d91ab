"""Kills each writer of the pack at random moments, and fills the disk under it: what it was to replace stays
whole, and what it leaves behind is cleared by the next that writes there.

    python tests/killing.py --times 40

The suite does it a few times, see `unit/files/test_killed.py`. It forks, which Windows cannot.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from pixart_sigma import DEMO  # noqa: E402
from pixart_sigma.errors import UNUSABLE  # noqa: E402
from pixart_sigma.files.picture_files import read_said, write_picture  # noqa: E402
from pixart_sigma.files.writing import clear_once  # noqa: E402
from pixart_sigma.prompt_embeds import Encoded  # noqa: E402
from pixart_sigma.text.cache import EmbeddingCache  # noqa: E402
from pixart_sigma.text.embeddings import PromptEmbeddings  # noqa: E402
from pixart_sigma.text.encoder import TextEncoder  # noqa: E402
from pixart_sigma.text.quantize import quantize_t5  # noqa: E402
from pixart_sigma.transformer.checkpoint import inspect  # noqa: E402
from pixart_sigma.transformer.converting import convert  # noqa: E402
from pixart_sigma.transformer.loading import load_transformer  # noqa: E402
from pixart_sigma.transformer.merging import Merge, write_merged  # noqa: E402

KEY = "0" * 64
FULL = 4096  # bytes that a file may have where the disk is full


@dataclass(frozen=True)
class Writer:
    """A name to write to; what writes there; what reads it, and raises where it is not whole."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]


def _embeddings() -> torch.Tensor:
    return torch.randn(1, 300, 1024)


def _load(path: Path) -> None:
    load_transformer(path)


def _convert(to: str) -> Callable[[Path], object]:
    return lambda path: convert(inspect(DEMO), to, path)


def _quantize(path: Path) -> None:
    new = path.with_name(f"t5_{time.time_ns()}") if path.exists() else path  # no folder is replaced
    quantize_t5(DEMO / "text_encoder", new, "int8")


def _read_cache(path: Path) -> None:
    if EmbeddingCache(path.parent).get(KEY) is None:
        raise ValueError(f"{path} is no entry")


WRITERS = (
    Writer(
        "picture.png",
        lambda path: write_picture(path, Image.effect_noise((512, 512), 90).convert("RGB"), '{"a": 1}'),
        read_said,
    ),
    Writer(
        "prompt.safetensors",
        lambda path: PromptEmbeddings(_embeddings(), _embeddings(), "a star").save(path),
        PromptEmbeddings.load,
    ),
    Writer(
        f"{KEY}.safetensors",
        lambda path: EmbeddingCache(path.parent).put(KEY, Encoded(_embeddings(), "")),
        _read_cache,
    ),
    Writer(
        "merged.safetensors",
        lambda path: write_merged(path, Merge(inspect(DEMO)), "diffusers", torch.bfloat16),
        _load,
    ),
    Writer("int8.safetensors", _convert("int8"), _load),
    Writer("q8_0.gguf", _convert("q8_0"), _load),
    Writer("t5", _quantize, TextEncoder.load),
)


def attack(writer: Writer, folder: Path, times: int, random_numbers: random.Random) -> int:
    """Kills it so many times, after a full disk; how many of them left something half written behind.

    Raises AssertionError for a target that is not whole, and for what is left of it at the end.
    """
    target = folder / writer.name
    began = time.monotonic()
    assert _ends(lambda: writer.write(target)) == 0, f"{writer.name} cannot be written"
    takes = time.monotonic() - began
    writer.read(target)
    (usual := folder / "usual").touch()
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        assert file.stat().st_mode == usual.stat().st_mode, f"{file} is {file.stat().st_mode:o}"
    assert _ends(lambda: _on_a_full_disk(writer, target)) == 0, f"{writer.name}: a full disk is not said"
    assert _hidden(folder) == [], f"{writer.name}: a full disk leaves {_hidden(folder)}"
    left = 0
    for _ in range(times):
        process = _fork(lambda: writer.write(target))
        longest = takes
        if random_numbers.random() < 0.5:  # else it is hardly ever in mid-write
            _wait_for_hidden(folder, takes)
            longest = takes / 50
        time.sleep(random_numbers.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        writer.read(target)
        left += bool(_hidden(folder))
    assert _ends(lambda: writer.write(target)) == 0
    assert _hidden(folder) == [], f"{writer.name} leaves {_hidden(folder)}"
    writer.read(target)
    return left


def _on_a_full_disk(writer: Writer, target: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))
    try:
        writer.write(target)
    except UNUSABLE:
        return
    # The cache goes on without.
    assert writer.name.startswith(KEY), f"{writer.name} was written to a full disk"


def _wait_for_hidden(folder: Path, seconds: float) -> None:
    """Until something is half written, or so long."""
    end = time.monotonic() + seconds
    while not _hidden(folder) and time.monotonic() < end:
        time.sleep(0.0005)


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def _fork(work: Callable[[], object]) -> int:
    """The id of a process that does this work, as one that has just begun, and ends with status 0, or 1."""
    if process := os.fork():
        return process
    status = 1
    try:
        clear_once.cache_clear()
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _ends(work: Callable[[], object]) -> int:
    """The exit status of work that is not killed."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(work), 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=40, help="how often each is killed (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # others would be missing in what is forked
    for writer in WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            left = attack(writer, Path(folder), arguments.times, random.Random(arguments.seed))
        print(
            f"{writer.name[:20]:<20} killed {arguments.times} times, {left} of them in mid-write: whole",
            flush=True,
        )


if __name__ == "__main__":
    main()
