"""What a pipeline is made of: the files of its models."""

from dataclasses import dataclass
from pathlib import Path

from . import DEMO, DEMO_KV
from .errors import CheckpointError
from .files.fingerprint import fingerprint
from .files.weight_files import read_state_dict
from .transformer.checkpoint import COMPONENTS, Checkpoint, find_components, inspect
from .vae.loading import read_vae


@dataclass(frozen=True)
class Components:
    """Where the models are on disk. `text_encoder` and `tokenizer` are None where there is none, or where the
    encoder's own folder has the tokenizer."""

    checkpoint: Checkpoint
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path

    @classmethod
    def find(
        cls,
        folder: Path,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        variant: str | None = None,
        needs_text_encoder: bool = True,
    ) -> "Components":
        """The components of a pipeline folder; one given by itself goes first. A transformer "demo-kv" is the
        demo's, trained with KV compression.

        Raises CheckpointError where a component is missing or is something else.
        """
        transformer = DEMO_KV if str(transformer) == "demo-kv" else transformer
        checkpoint = inspect(transformer or folder, variant=variant)
        found = find_components(folder)
        needed = [("text_encoder", text_encoder)] if needs_text_encoder else []
        for name, given in (*needed, ("vae", vae)):
            if given is None and name not in found:
                option = "--" + name.replace("_", "-")
                raise CheckpointError(
                    f"{folder} has no {name}: give a whole pipeline folder, or the file with {option}."
                )
        tokenizer = found.get("tokenizer")
        # The demo's tokenizer knows 128 words, and no other encoder means them.
        if text_encoder and (folder == DEMO or _has_tokenizer(Path(text_encoder))):
            tokenizer = None
        return cls(
            checkpoint=checkpoint,
            text_encoder=Path(text_encoder) if text_encoder else found.get("text_encoder"),
            tokenizer=tokenizer,
            vae=Path(vae) if vae else found["vae"],
        )

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


def _name(path: Path) -> str:
    """The model's name: of a component's folder in a pipeline folder that of the pipeline."""
    return path.parent.name if path.name in COMPONENTS else path.name


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in ("tokenizer", "spiece.model", "tokenizer.json"))
