"""Which model files and folders a loader offers, and where a chosen one is.

A choice comes out of a workflow, so it is never joined to a path: it must be one that is offered.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

import folder_paths

from ...pixart_sigma import DEMO, DEMO_KV, DEMO_PHASED
from ...pixart_sigma.errors import CheckpointError
from ...pixart_sigma.files.locating import EXTENSIONS, is_index, parts_of_shard, resolve

DEMO_CHOICE = "demo (built in)"
DEMO_KV_CHOICE = "demo with KV compression (built in)"
DEMO_PHASED_CHOICE = "demo for four steps (built in)"
# Loader -> the folders of ComfyUI it reads, the first one without its name in front. The host adds
# models/clip to text_encoders, models/unet to diffusion_models, and to each what extra_model_paths.yaml has.
CATEGORIES = {
    "transformer": ("diffusion_models", "checkpoints", "diffusers"),
    "text_encoder": ("text_encoders", "t5", "checkpoints", "diffusers"),
    "vae": ("vae", "checkpoints", "diffusers"),
    "controlnet": ("controlnet",),
    "lora": ("loras",),
}
WITHOUT_DEMO = ("controlnet", "lora")
# The host's own lists leave GGUF out; these are of the same folders, under the names of ComfyUI-GGUF.
GGUF = {"diffusion_models": "unet_gguf", "text_encoders": "clip_gguf"}
# Of a whole pipeline in one file: how the keys of the parts beside the transformer begin, and what only
# PixArt's transformer has.
PARTS = {
    "text_encoder": (b'"text_encoders.t5xxl.', b'"text_encoder.'),
    "vae": (b'"vae.', b'"first_stage_model.'),
}
TRANSFORMER = (b"t_block.1.weight", b"adaln_single.linear.weight")
MOST_HEADER = 100_000_000  # bytes, safetensors' own limit

# Other packs keep T5 there too; the host knows it only where somebody says so.
folder_paths.add_model_folder_path("t5", os.path.join(folder_paths.models_dir, "t5"))
for _category, _listed in GGUF.items():
    _folders_of_it = folder_paths.folder_names_and_paths[_category][0]
    folder_paths.folder_names_and_paths.setdefault(_listed, (_folders_of_it, {".gguf"}))


def choices(kind: str) -> list[str]:
    """What the loader of a kind of CATEGORIES offers, the demo last where it has one."""
    return [*_offered(kind), *_built_in(kind)]


def find(kind: str, choice: str) -> Path:
    """The file or folder of a choice; ValueError for one that is not offered (any more)."""
    offered = _offered(kind) | _built_in(kind)
    for name in (choice, *_as_others_write(kind, choice)):
        if name in offered:
            return offered[name]
    if parts := parts_of_shard(choice):
        raise ValueError(
            f"{choice!r} is one of {parts} parts of a model. Choose the folder that they are in, which is "
            "offered too."
        )
    folders = ", ".join(f"models/{category}" for category in CATEGORIES[kind])
    raise ValueError(
        f"There is no model {choice!r}. Put the file or folder into {folders}, press R to refresh, "
        "and choose it again."
    )


def check(kind: str, choice: str | None) -> bool | str:
    """For a node's `validate_inputs`: True, or what `find` would say. None is a choice that another node
    makes."""
    try:
        return choice is None or find(kind, choice) is not None
    except ValueError as error:
        return str(error)


def _as_others_write(kind: str, choice: str) -> Iterator[str]:
    """What a choice of a node that ours replaces can mean: a file by its name in models/checkpoints or
    models/t5, and a shard for the folder that it is in, or for the index beside it."""
    for category in CATEGORIES[kind][1:-1]:
        yield f"{category}/{choice}"
        if not parts_of_shard(choice):
            continue
        inside = PurePath(choice).parent
        if inside != PurePath():
            yield f"{category}/{inside}"
        else:
            indexes = [name for name in _offered(kind) if is_index(PurePath(name))]
            yield from (name for name in indexes if PurePath(name).parent == PurePath(category))


def _built_in(kind: str) -> dict[str, Path]:
    if kind in WITHOUT_DEMO:
        return {}
    others = {DEMO_KV_CHOICE: DEMO_KV, DEMO_PHASED_CHOICE: DEMO_PHASED}
    return {DEMO_CHOICE: DEMO} | (others if kind == "transformer" else {})


def _offered(kind: str) -> dict[str, Path]:
    offered: dict[str, Path] = {}
    for category in CATEGORIES[kind]:
        prefix = "" if category == CATEGORIES[kind][0] else f"{category}/"
        if category != "diffusers":
            for name, path in _files(category, kind):
                offered.setdefault(prefix + name, path)
        for root in folder_paths.get_folder_paths(category):
            for name, path in _model_folders(Path(root), kind):
                offered.setdefault(prefix + name, path)
    return offered


def _files(category: str, kind: str) -> Iterator[tuple[str, Path]]:
    """The host's files of a category as (name, path); in place of shards the folder that they are in, or
    their index where that is the category's own."""
    listed = [(name, category) for name in folder_paths.get_filename_list(category)]
    if category in GGUF:
        listed += [(name, GGUF[category]) for name in folder_paths.get_filename_list(GGUF[category])]
    for name, where in listed:
        path = folder_paths.get_full_path(where, name)
        hidden = any(part.startswith(".") for part in PurePath(name).parts)
        if path is None or hidden or category == "t5" and not name.endswith(EXTENSIONS):
            continue
        if parts_of_shard(name):
            inside = PurePath(name).parent
            if inside != PurePath():
                yield str(inside), Path(path).parent
            else:
                indexes = [file for file in Path(path).parent.iterdir() if is_index(file)]
                yield from ((index.name, index) for index in sorted(indexes))
        elif category != "checkpoints" or kind == "transformer" or _has_part(path, kind):
            yield name, Path(path)


def _model_folders(root: Path, kind: str) -> Iterator[tuple[str, Path]]:
    """Folders in diffusers' or transformers' layout in `root`, as (name, path): NAME, OWNER/NAME, and
    repositories of Hugging Face's cache, models--OWNER--NAME."""
    for folder in _folders(root):
        if (folder / "snapshots").is_dir():
            try:
                found = resolve(folder)
            except CheckpointError:  # nobody can choose among its snapshots here
                continue
            if _has_model(found, kind):
                yield folder.name, found
        elif _has_model(folder, kind):
            yield folder.name, folder
        else:
            for inner in _folders(folder):
                if _has_model(inner, kind):
                    yield f"{folder.name}/{inner.name}", inner


def _has_model(folder: Path, kind: str) -> bool:
    """Whether it is a model's own folder, or a pipeline's with that component."""
    if kind == "lora":
        from ...pixart_sigma.transformer.lora import is_adapter_folder

        return is_adapter_folder(folder)
    return (folder / kind).is_dir() or (folder / "config.json").is_file()


def _folders(root: Path) -> list[Path]:
    """Those of a folder but the hidden ones, which are not written to their end."""
    try:
        entries = [entry for entry in os.scandir(root) if entry.is_dir()]
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith("."))
    except OSError:  # it is not there, or may not be read
        return []


def _has_part(path: str, kind: str) -> bool:
    try:
        found = os.stat(path)
        return kind in _parts(path, found.st_mtime_ns, found.st_size)
    except OSError:
        return False


@functools.lru_cache(maxsize=4096)
def _parts(path: str, changed: int, size: int) -> frozenset[str]:
    """What a file of a whole PixArt pipeline holds beside the transformer, by its header; of other files
    nothing. `changed` and `size` are for the cache: lists are made often, and headers are read once."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= min(MOST_HEADER, size) else b""
    if not any(mark in header for mark in TRANSFORMER):
        return frozenset()
    return frozenset(part for part, starts in PARTS.items() if any(start in header for start in starts))
