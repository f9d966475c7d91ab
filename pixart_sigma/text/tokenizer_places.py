"""Where a T5 tokenizer may lie: beside its encoder, or with another model on this machine. All T5-XXL have
the same one."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import SigmaError
from ..files.reading import read_json

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
HOSTS_TOKENIZER = Path("comfy", "text_encoders", "t5_tokenizer")  # in a ComfyUI
PIPELINES = ("tokenizer*", "*/tokenizer*", "*/*/tokenizer*", "*/*/*/tokenizer*")  # in a models folder
REPOSITORIES = ("models--*/snapshots/*", "models--*/snapshots/*/tokenizer*")  # in Hugging Face's cache


def beside(path: Path) -> list[Path]:
    """The folders in which the encoder at `path` has a tokenizer of its own."""
    folder = path if path.is_dir() else path.parent
    return [folder, folder / "tokenizer", folder.parent / "tokenizer"]


def in_folders(folders: Iterable[Path]) -> Iterator[Path]:
    """The tokenizer files in these folders."""
    for folder in folders:
        found = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
        if found is not None:
            yield found


def elsewhere(path: Path) -> Iterator[Path]:
    """T5 tokenizers with other models: of pipeline folders under a models folder, in Hugging Face's cache,
    and ComfyUI's own. `path` is the encoder's, which tells where ComfyUI is."""
    hosts = _hosts(path)
    for models in _once([*(host / "models" for host in hosts), *_named_models(path), Path("models")]):
        yield from _of_t5(models, PIPELINES)
    yield from _of_t5(_hub_cache(), REPOSITORIES)
    yield from in_folders(host / HOSTS_TOKENIZER for host in hosts)


def name_of(file: Path) -> str:
    """A tokenizer's name for people: its folder, and whose it is."""
    for part in file.parts:
        if part.startswith("models--"):  # of Hugging Face's cache
            return part.removeprefix("models--").replace("--", "/")
    return "/".join(file.parent.parts[-2:])


def _hosts(path: Path) -> list[Path]:
    named = os.environ.get("COMFYUI_PATH")
    found = [Path(named)] if named else []
    found += [parent for parent in path.absolute().parents if (parent / HOSTS_TOKENIZER).is_dir()]
    try:
        found.append(Path.home() / "comfy" / "ComfyUI")
    except RuntimeError:  # this user has no home directory
        pass
    return list(_once(found))


def _named_models(path: Path) -> list[Path]:
    """Folders of models that the encoder lies in, as with extra_model_paths.yaml."""
    return [parent for parent in path.absolute().parents if parent.name == "models"]


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _of_t5(root: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Tokenizers in the folders that match, those that say that they are of another class left out."""
    if not root.is_dir():
        return
    for pattern in patterns:
        for file in in_folders(sorted(root.glob(pattern))):
            if file.name == "spiece.model" or _class_of(file.parent).startswith("T5"):
                yield file


def _class_of(folder: Path) -> str:
    try:
        return str(read_json(folder / "tokenizer_config.json").get("tokenizer_class"))
    except SigmaError:
        return ""


def _once(folders: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        resolved = folder.resolve()
        if resolved not in seen:
            seen.add(resolved)
            yield folder
