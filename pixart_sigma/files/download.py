"""The official files, and where they go: one whole pipeline folder per variant under ComfyUI's models.

Only the 1024 repository is a whole pipeline. The others hold a transformer alone, so that their tokenizer,
text encoder, VAE and scheduler come from the 1024 repository, which trained with the same ones.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import SigmaError
from .writing import say

BASE = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
# The commits that are fetched, whatever is published there later. Those of 256 and 2K could not be looked
# up: of them the newest transformer is taken.
REVISIONS = {
    BASE: "e102b3591cc82e97071b8b4cb90d834d0c487207",
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "76fb7eb5a9314bc1e4e479d2f13447517fca9be4",
}
REPOSITORIES = {
    "256": "PixArt-alpha/PixArt-Sigma-XL-2-256x256",
    "512": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
    "1024": BASE,
    "2K": "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
}

# Published sizes in bytes. Those that are round are known to three digits; None is a text of a few kB.
_SHARED = {
    "model_index.json": 400,
    "scheduler/scheduler_config.json": 655,
    "tokenizer/special_tokens_map.json": None,
    "tokenizer/tokenizer_config.json": None,
    "tokenizer/spiece.model": 792_000,
    "vae/config.json": 631,
    "vae/diffusion_pytorch_model.safetensors": 335_000_000,
    "text_encoder/config.json": 747,
    "text_encoder/model.safetensors.index.json": None,
    "text_encoder/model-00001-of-00002.safetensors": 9_990_000_000,
    "text_encoder/model-00002-of-00002.safetensors": 9_060_000_000,
}
_TRANSFORMER_CONFIG = {"256": 748, "512": 746, "1024": 785, "2K": 786}
_TRANSFORMER_WEIGHTS = 2_443_492_488


@dataclass(frozen=True)
class PlannedFile:
    """One file: `path` is the same inside `repository` and inside the pipeline folder; `size` in bytes."""

    repository: str
    path: str
    size: int | None

    @property
    def component(self) -> str:
        """The folder it belongs to, or the file itself for `model_index.json`."""
        return self.path.partition("/")[0]


def plan(variant: str) -> list[PlannedFile]:
    """Every file of a whole pipeline for "256", "512", "1024" or "2K"; SigmaError for another name."""
    variant = _known(variant)
    repository = REPOSITORIES[variant]
    transformer = {
        "transformer/config.json": _TRANSFORMER_CONFIG[variant],
        "transformer/diffusion_pytorch_model.safetensors": _TRANSFORMER_WEIGHTS,
    }
    files = [PlannedFile(BASE, path, size) for path, size in _SHARED.items()]
    files += [PlannedFile(repository, path, size) for path, size in transformer.items()]
    # Small ones first: a repository that cannot be read is noticed before the gigabytes.
    return sorted(files, key=lambda file: file.size or 0)


def pipeline_folder(variant: str, models: str | Path | None = None) -> Path:
    """Where a variant goes: MODELS/diffusers/NAME; `models` defaults to ComfyUI's or to ./models.

    ComfyUI's is the `models` folder in $COMFYUI_PATH; SigmaError when that names no folder.
    """
    variant = _known(variant)
    if models is None:
        host = os.environ.get("COMFYUI_PATH")
        if host and not Path(host).is_dir():
            raise SigmaError(f"COMFYUI_PATH is {host!r}, which is no folder. Correct it, or name a target.")
        models = Path(host or ".") / "models"
    return Path(models) / "diffusers" / REPOSITORIES[variant].rpartition("/")[2]


def describe(variant: str, models: str | Path | None = None) -> str:
    """The plan for people: what comes from where, how large it is, and what is here already."""
    folder = pipeline_folder(variant, models)
    files = plan(variant)
    rows = []
    for component in sorted({file.component for file in files}):
        parts = [file for file in files if file.component == component]
        here = all(_found(file, folder) for file in parts)
        size = _readable(sum(file.size or 0 for file in parts))
        rows.append(f"  {component:<17}{size:>9}  {parts[0].repository}{'  (here already)' if here else ''}")
    total = _readable(_missing_bytes(files, folder))
    return "\n".join(
        [f"PixArt-Sigma {_known(variant)} to {folder}:", *rows, f"  to download      {total:>9}"]
    )


def download(
    variant: str,
    target: str | Path | None = None,
    ask: bool = True,
    fetch: Callable[..., str] | None = None,
    answer: Callable[[str], str] = input,
) -> Path | None:
    """Get a whole pipeline folder and return it, or None when the answer is not yes.

    `target` is a models folder (default: see `pipeline_folder`). The text of `describe` is printed first,
    and `ask` waits for an answer before anything is written. `fetch` is `huggingface_hub.hf_hub_download`
    by default, which resumes what was interrupted and checks what is there; `REVISIONS` says which commit
    it is asked for. Files of the 1024 repository
    that another variant already brought are linked. SigmaError when nobody can answer, the disk is too
    small or a file cannot be had.
    """
    folder = pipeline_folder(variant, target)
    files = plan(variant)
    needed = _missing_bytes(files, folder)
    say(describe(variant, target))
    if ask:
        try:
            agreed = answer("Download? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            raise SigmaError(
                "There is no terminal to answer on. Add --yes to download without asking."
            ) from None
        if not agreed:
            return None
    if fetch is None:
        from huggingface_hub import hf_hub_download

        fetch = hf_hub_download
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise SigmaError(f"Cannot write to {folder}: {error.strerror}. Name another target.") from error
    if free < needed:
        raise SigmaError(
            f"{folder} needs {_readable(needed)} more, but its disk has {_readable(free)} free. "
            "Make room or name another target."
        )
    for file in files:
        if not _link(file, folder):
            _get(fetch, file, folder)
    return folder


def _get(fetch: Callable[..., str], file: PlannedFile, folder: Path) -> None:
    try:
        fetch(
            repo_id=file.repository,
            filename=file.path,
            revision=REVISIONS.get(file.repository),
            local_dir=str(folder),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is there stays, and the same command goes on.") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise SigmaError(
            f"Could not get {file.path} from {file.repository}: {reason[0]} "
            "Run the same command again; it goes on where it stopped."
        ) from error


def _known(variant: str) -> str:
    name = str(variant).upper()
    if name not in REPOSITORIES:
        raise SigmaError(f"There is no variant {variant!r}. Use one of {', '.join(REPOSITORIES)}.")
    return name


def _found(file: PlannedFile, folder: Path) -> Path | None:
    """The file in its folder, or the same file in another variant's folder beside it."""
    places = [folder]
    if file.repository == BASE and file.component != "transformer":
        places += [folder.parent / name.rpartition("/")[2] for name in REPOSITORIES.values()]
    return next((place / file.path for place in places if (place / file.path).is_file()), None)


def _missing_bytes(files: list[PlannedFile], folder: Path) -> int:
    return sum(file.size or 0 for file in files if not _found(file, folder))


def _link(file: PlannedFile, folder: Path) -> bool:
    """Whether the file was linked from another variant's folder instead of being downloaded."""
    found, wanted = _found(file, folder), folder / file.path
    if found is None or found == wanted:
        return False
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        os.link(found, wanted)
    except OSError:
        # Another disk, or a file system without links.
        return False
    return True


def _readable(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"
