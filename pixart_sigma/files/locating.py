"""Which files a path stands for: one file, an index of shards, or the weights in a folder. None is opened but
indexes and JSON."""

import json
import os
import re
from pathlib import Path

from ..errors import CheckpointError

CANONICAL_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
EXTENSIONS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def find_weight_files(path: str | Path) -> tuple[Path, ...]:
    """The files that make up a file, an index (`*.index.json`) or a folder of weights, without opening them.

    In a folder the usual names go first, safetensors before pickles. Raises CheckpointError for a folder
    without weights or with several to choose from, a missing shard and an index that can not be used.
    """
    located = locate(Path(path))
    return tuple(located.parent / name for name in shards_of(located)) if is_index(located) else (located,)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError when it can not be read."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can not be read as JSON: {error}. Download it again.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings. Download it again.")
    return settings


def locate(path: Path) -> Path:
    """The weight file or index that a path stands for."""
    if not os.path.isdir(path):
        return path
    for extension in EXTENSIONS:
        for name in CANONICAL_NAMES:
            for file in (path / (name + extension), path / (name + extension + ".index.json")):
                if os.path.lexists(file):
                    return file
    return _only_weights(path)


def _only_weights(folder: Path) -> Path:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"The folder {folder} can not be read: {error.strerror}.") from error
    indexes = [name for name in names if name.endswith(".index.json")]
    if len(indexes) == 1:
        return folder / indexes[0]
    for extension in EXTENSIONS:
        found = [name for name in names if name.endswith(extension)]
        whole = [name for name in found if not SHARD.search(name)]
        if found and not whole:
            raise CheckpointError(
                f"{folder} has shards ({found[0]}) but no index: get *.index.json beside them."
            )
        if len(whole) > 1:
            raise CheckpointError(
                f"{folder} has several weight files ({', '.join(whole)}): choose one of them."
            )
        if whole:
            return folder / whole[0]
    held = ", ".join(names[:5]) if names else "nothing"
    raise CheckpointError(f"{folder} has no model in it, only {held}. Choose a folder or file with weights.")


def is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def shards_of(index: Path) -> dict[str, list[str]]:
    """The keys that each shard should have, by its file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{index} has no weight_map, so it is not an index of shards. Download it again."
        )
    shards: dict[str, list[str]] = {}
    for key, name in sorted(weight_map.items(), key=lambda item: item[1]):
        shards.setdefault(name, []).append(key)
    for name in shards:
        # An index from the net may not reach outside its own folder.
        if name != Path(name).name or "\\" in name or not name.endswith(EXTENSIONS):
            raise CheckpointError(f"{index} names {name!r}, which is not a weight file beside it.")
        if not os.path.isfile(index.parent / name):
            raise CheckpointError(
                f"The shard {index.parent / name} is missing: download it, {index.name} lists it."
            )
    if not shards:
        raise CheckpointError(f"{index} lists no shards. Download it again.")
    return shards
