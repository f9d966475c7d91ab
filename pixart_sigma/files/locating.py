"""Which files a path stands for: one file, an index of shards, or the weights in a folder. None is opened but
indexes and JSON."""

import os
import re
from pathlib import Path

from ..errors import CheckpointError
from .reading import read_bytes, read_json

CANONICAL_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
EXTENSIONS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
# As diffusers and transformers write it, and with the variant's name at its end or, of old, in front.
INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
# NAME.fp16.safetensors and NAME.safetensors.index.fp16.json, as save_pretrained(variant="fp16") writes them.
VARIANT = re.compile(
    rf"(?:{'|'.join(CANONICAL_NAMES)})(?:\.(?P<file>[\w-]+))?"
    rf"\.(?:{'|'.join(extension[1:] for extension in EXTENSIONS)})(?:\.index(?:\.(?P<index>[\w-]+))?\.json)?"
)


def find_weight_files(path: str | Path) -> tuple[Path, ...]:
    """The files that make up a file, an index (`*.index.json`) or a folder of weights, without opening them.

    In a folder the usual names go first, safetensors before pickles, and then the only variant, such as fp16.
    Raises CheckpointError for a folder without weights or with several to choose from, one shard by itself, a
    missing one and an index that can not be used.
    """
    located = locate(Path(path))
    return tuple(located.parent / name for name in shards_of(located)) if is_index(located) else (located,)


def resolve(path: str | Path) -> Path:
    """The folder that a repository in Hugging Face's cache (`models--owner--name`) stands for: the snapshot
    that `refs/main` names, else the only one. Any other path is itself.

    Raises CheckpointError where it can not be known which.
    """
    path = Path(path)
    snapshots = path / "snapshots"
    if not os.path.isdir(snapshots):
        return path
    found = sorted(entry.name for entry in os.scandir(snapshots) if entry.is_dir())
    try:
        main = read_bytes(path / "refs" / "main").decode("utf-8").strip()
    except ValueError:  # a CheckpointError is one
        main = ""
    if main in found or len(found) == 1:
        return snapshots / (main if main in found else found[0])
    held = f"{len(found)} snapshots, and refs/main names none of them" if found else "no snapshot"
    raise CheckpointError(
        f"{path} is a repository in Hugging Face's cache with {held}. Choose a folder in {snapshots}, or "
        "download it again."
    )


def locate(path: Path) -> Path:
    """The weight file or index that a path stands for."""
    path = resolve(path)
    if not os.path.isdir(path):
        if (parts := parts_of_shard(path.name)) and os.path.lexists(path):
            raise CheckpointError(
                f"{path} is one of {parts} parts of a model. Choose its folder, {path.parent}."
            )
        return path
    for extension in EXTENSIONS:
        for name in CANONICAL_NAMES:
            for file in (path / (name + extension), path / (name + extension + ".index.json")):
                if os.path.lexists(file):
                    return file
    return _only_weights(path)


def parts_of_shard(name: str) -> int:
    """How many parts the model has of which a file of this name is one; 0 for a file that is whole."""
    shard = SHARD.search(name)
    return int(shard[2]) if shard and int(shard[2]) > 1 else 0


def _only_weights(folder: Path) -> Path:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"The folder {folder} can not be read: {error.strerror}.") from error
    if variant := _only_variant(names, folder):
        return variant
    indexes = [name for name in names if INDEX.search(name)]
    if len(indexes) == 1:
        return folder / indexes[0]
    for extension in EXTENSIONS:
        found = [name for name in names if name.endswith(extension)]
        whole = [name for name in found if not parts_of_shard(name)]
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


def _only_variant(names: list[str], folder: Path) -> Path | None:
    """The file or index of the one variant under a usual name, safetensors before pickles."""
    variants: dict[str, list[str]] = {}
    for name in names:
        if not parts_of_shard(name) and (match := VARIANT.fullmatch(name)):
            variants.setdefault(match["file"] or match["index"], []).append(name)
    if len(variants) > 1:
        files = ", ".join(name for held in variants.values() for name in held)
        raise CheckpointError(
            f"{folder} has several variants ({', '.join(variants)}): choose one of its files {files}."
        )
    found = [name for held in variants.values() for name in held]
    return next((folder / name for extension in EXTENSIONS for name in found if extension in name), None)


def is_index(path: Path) -> bool:
    return INDEX.search(path.name) is not None


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
