"""What a pipeline is made of: the files of its models, and the device and precision that they run in."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import DEMO, DEMO_KV
from .errors import CheckpointError, SigmaError
from .transformer.checkpoint import Checkpoint, find_components, inspect

# Where a model's weights are, in the words of the options; T5's also in those for people.
T5_PLACES = {"auto": "on the device", "stream": "streamed", "cpu": "on the CPU"}
TRANSFORMER_PLACES = ("auto", "stream")


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


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in ("tokenizer", "spiece.model", "tokenizer.json"))


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the first GPU, else the CPU. Raises SigmaError for one that cannot
    be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SigmaError(f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """What the transformer and the VAE compute in: float32 on a CPU, bfloat16 on a GPU that has it, else
    float16."""
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def check_place(option: str, place: str, places: Iterable[str]) -> str:
    """`place` if it is one of `places`, else SigmaError naming the option."""
    if place not in places:
        raise SigmaError(f"{option} is {place!r}; choose one of {', '.join(places)}.")
    return place
