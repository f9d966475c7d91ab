"""Which model files and folders a loader offers, and where a chosen one is.

A choice comes out of a workflow, so it is never joined to a path: it must be one that is offered.
"""

import os
from pathlib import Path

import folder_paths

from ...pixart_sigma import DEMO, DEMO_KV

DEMO_CHOICE = "demo (built in)"
DEMO_KV_CHOICE = "demo with KV compression (built in)"
# Loader -> the folders of ComfyUI it reads, the first one without its name in front.
CATEGORIES = {
    "transformer": ("diffusion_models", "checkpoints", "diffusers"),
    "text_encoder": ("text_encoders", "diffusers"),
    "vae": ("vae", "diffusers"),
}


def choices(kind: str) -> list[str]:
    """What the loader of "transformer", "text_encoder" or "vae" offers, the demo last."""
    return [*_offered(kind), *_built_in(kind)]


def find(kind: str, choice: str) -> Path:
    """The file or folder of a choice; ValueError for one that is not offered (any more)."""
    path = (_offered(kind) | _built_in(kind)).get(choice)
    if path is None:
        folders = ", ".join(f"models/{category}" for category in CATEGORIES[kind])
        raise ValueError(
            f"There is no model {choice!r}. Put the file or folder into {folders}, press R to refresh, "
            "and choose it again."
        )
    return path


def _built_in(kind: str) -> dict[str, Path]:
    return {DEMO_CHOICE: DEMO} | ({DEMO_KV_CHOICE: DEMO_KV} if kind == "transformer" else {})


def _offered(kind: str) -> dict[str, Path]:
    offered = {}
    for category in CATEGORIES[kind]:
        prefix = "" if category == CATEGORIES[kind][0] else f"{category}/"
        if category != "diffusers":
            for name in folder_paths.get_filename_list(category):
                path = folder_paths.get_full_path(category, name)
                if path is not None:
                    offered[prefix + name] = Path(path)
        for root in folder_paths.get_folder_paths(category):
            for name, path in _model_folders(Path(root)):
                offered.setdefault(prefix + name, path)
    return offered


def _model_folders(root: Path):
    """Folders in diffusers' or transformers' layout directly in `root`, as (name, path)."""
    if not root.is_dir():
        return
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir() and any((path / name).is_file() for name in ("model_index.json", "config.json")):
            yield entry.name, path
