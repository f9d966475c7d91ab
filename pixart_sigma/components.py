"""What a pipeline is made of: the files of its models."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import BUILT_IN, DEMO
from .adapter_files import AdapterFile
from .errors import CheckpointError
from .files.fingerprint import fingerprint
from .files.locating import resolve
from .files.metadata import UsedAdapter
from .files.parts import models
from .files.weight_files import read_header, read_state_dict
from .noise_schedule import NoiseSchedule
from .text.changes import WeightChanges
from .text_adapters import text_changes
from .transformer.checkpoint import (
    COMPONENTS,
    Checkpoint,
    find_components,
    inspect,
    read_noise_schedule,
)
from .transformer.lora import Adapter, read_adapter
from .vae.loading import read_vae


@dataclass(frozen=True)
class Components:
    """Where the models are on disk. `text_encoder` and `tokenizer` are None where there is none, or where the
    tokenizer is looked for beside the encoder and with other models. `adapters`, each with its strength, act
    in this order; `text_changes` is what they do to T5, and `text_notices` what of that is not done."""

    checkpoint: Checkpoint
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path
    adapters: tuple[tuple[Adapter, float], ...] = ()
    text_changes: WeightChanges | None = None
    text_notices: tuple[str, ...] = ()

    @classmethod
    def find(
        cls,
        folder: Path,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        variant: str | None = None,
        noise_schedule: NoiseSchedule | None = None,
        needs_text_encoder: bool = True,
    ) -> "Components":
        """The components of a pipeline folder, or of one file that holds them all; one given by itself goes
        first. A transformer may be one of BUILT_IN, such as "demo-kv".

        A transformer given by itself brings its noise schedule; where neither it nor its folder says one, the
        pipeline folder's scheduler decides, as in diffusers. `noise_schedule` takes the place of all of them.
        Raises CheckpointError where a component is missing or is something else.
        """
        transformer = BUILT_IN.get(str(transformer), transformer)
        folder = resolve(folder)
        found = find_components(folder) or _parts_of(folder)
        given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        _check_complete(folder, found, given, needs_text_encoder)
        checkpoint = inspect(transformer or folder, variant=variant)
        if noise_schedule is None and not checkpoint.noise_schedule.source:
            noise_schedule = read_noise_schedule(folder)
        if noise_schedule is not None:
            checkpoint = replace(checkpoint, noise_schedule=noise_schedule)
        own_tokenizer = found.get("tokenizer")
        # The demo's tokenizer knows 128 words, and no other encoder means them.
        if text_encoder and (folder == DEMO or _has_tokenizer(Path(text_encoder))):
            own_tokenizer = None
        return cls(
            checkpoint=checkpoint,
            text_encoder=resolve(text_encoder) if text_encoder else found.get("text_encoder"),
            tokenizer=Path(tokenizer) if tokenizer else own_tokenizer,
            vae=resolve(vae) if vae else found["vae"],
        )

    def with_adapters(self, chosen: Iterable[AdapterFile | str | Path]) -> "Components":
        """These with adapters. Raises CheckpointError for one that does not fit the transformer, or T5."""
        files = [file if isinstance(file, AdapterFile) else AdapterFile(file) for file in chosen]
        read = [(read_adapter(file.path, self.checkpoint.config), file.strength) for file in files]
        changes, notices = text_changes(read, self.text_encoder)
        return replace(self, adapters=tuple(read), text_changes=changes, text_notices=notices)

    @property
    def used_adapters(self) -> tuple[UsedAdapter, ...]:
        """What a picture says of the adapters."""
        return tuple(
            UsedAdapter(adapter.source.name, strength, adapter.fingerprint)
            for adapter, strength in self.adapters
        )

    @property
    def said_of_transformer(self) -> dict[str, Any]:
        """What a picture says of the transformer beside its name and fingerprint, for `Metadata`."""
        return {
            "variant": self.checkpoint.variant,
            "noise_schedule": self.checkpoint.noise_schedule,
            "adapters": self.used_adapters,
        }

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of the transformer's and the VAE's weights, see `fingerprint`."""
        return {
            "transformer": fingerprint(
                read_state_dict(self.checkpoint.components["transformer"], part="transformer")
            ),
            "vae": fingerprint(read_vae(self.vae)[0]),
        }

    def names(self) -> dict[str, str]:
        """What people call the files: the last part of their paths."""
        paths = {"transformer": self.checkpoint.path, "text_encoder": self.text_encoder, "vae": self.vae}
        return {name: _name(path) for name, path in paths.items() if path is not None}


def _parts_of(file: Path) -> dict[str, Path]:
    """The models in a checkpoint of several, as ComfyUI saves them; {} for a file of one."""
    if not file.is_file():
        return {}
    held = models(read_header(file)).keys() & {"transformer", "text_encoder", "vae"}
    return {name: file for name in COMPONENTS if name in held} if len(held) > 1 else {}


def _check_complete(folder: Path, found: dict[str, Path], given: dict, needs_text_encoder: bool) -> None:
    """CheckpointError where a model is neither in the folder nor given, naming all of them at once."""
    if not folder.exists():
        raise CheckpointError(f"There is no file or folder {folder}.")
    missing = [name for name, path in given.items() if path is None and name not in found]
    if not found and "transformer" in missing:
        missing.remove("transformer")  # the path is one itself, or `inspect` says what it is
    if not needs_text_encoder and "text_encoder" in missing:
        missing.remove("text_encoder")
    if not missing:
        return
    options = " and ".join("--" + name.replace("_", "-") for name in missing)
    holds = f"holds {', '.join(found)}, " if found else ""
    if not found:
        inspect(folder)  # what is no transformer is named by what it is
        holds = "is a transformer alone, "
    raise CheckpointError(
        f"{folder} {holds}with no {' and no '.join(missing)}: name the file or folder with {options}, or "
        "give a whole pipeline folder, such as `pixart-sigma download 1024` makes."
    )


def _name(path: Path) -> str:
    """The model's name: of a component's folder in a pipeline folder that of the pipeline, in Hugging Face's
    cache that of the repository."""
    folder = path.parent if path.name in COMPONENTS else path
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in ("tokenizer", "spiece.model", "tokenizer.json"))
