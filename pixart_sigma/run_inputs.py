"""What a run is given beside its settings: prompts, as they were encoded, and pictures."""

from dataclasses import dataclass, replace

import torch

from .choices import T5_PRECISIONS
from .errors import SigmaError
from .files.fingerprint import digest
from .prompt_embeds import Encoded
from .settings import Settings, Ways
from .text.embeddings import PromptEmbeddings
from .transformer.checkpoint import Checkpoint
from .transformer.control_pictures import ControlPicture


@dataclass(frozen=True)
class Prompted:
    """The prompts of a run as the text encoder made them, or as they were given."""

    positive: Encoded
    negative: Encoded | None
    fingerprint: str
    tokenizer: str = ""  # its name, where it is not the encoder's own
    digest: str = ""  # of embeddings that were given, where nobody knows who made them


@dataclass(frozen=True)
class GivenPictures:
    """What pictures a run is given: latents (count, 4, h, w) to start from, where they are painted anew
    (1, H, W), and what ControlNets follow, with its latents (1, 4, h, w)."""

    image_latents: torch.Tensor | None
    mask: torch.Tensor | None
    controls: tuple[tuple[ControlPicture, torch.Tensor], ...]


NOTHING_GIVEN = GivenPictures(None, None, ())


def as_prompted(
    embeddings: PromptEmbeddings, settings: Settings, ways: Ways
) -> tuple[Prompted, Settings, Ways]:
    """Prompts that are encoded already, and what they decide."""
    unknown = "" if embeddings.fingerprint else digest(embeddings.positive, embeddings.negative)
    prompted = Prompted(
        Encoded(embeddings.positive, embeddings.positive_truncated),
        Encoded(embeddings.negative, embeddings.negative_truncated) if settings.uses_negative else None,
        embeddings.fingerprint,
        digest=unknown,
    )
    settings = replace(
        settings,
        prompt=embeddings.positive_text,
        negative=embeddings.negative_text,
        clean_caption=embeddings.clean_caption,
        max_sequence_length=embeddings.max_sequence_length,
    )
    precision = embeddings.precision if embeddings.precision in T5_PRECISIONS else None
    return prompted, settings, replace(ways, t5_precision=precision)


def check_embeddings(embeddings: PromptEmbeddings, settings: Settings, checkpoint: Checkpoint) -> None:
    """Raise SigmaError for anything else, for settings that have prompts too, and for embeddings of another
    width than the checkpoint reads."""
    if not isinstance(embeddings, PromptEmbeddings):
        raise SigmaError(
            f"embeddings is a {type(embeddings).__name__}; give PromptEmbeddings, such as "
            "PromptEmbeddings.load(file)."
        )
    if settings != settings.without_prompts():
        raise SigmaError(
            "Encoded prompts bring their words, cleaned or not and cut already; leave prompt, negative, "
            "clean_caption and max_sequence_length out."
        )
    expected = checkpoint.config.caption_channels
    if embeddings.width != expected:
        raise SigmaError(
            f"The prompt embeddings are {embeddings.width} wide, and {checkpoint.path} reads "
            f"{expected}. Encode the prompt with the text encoder that belongs to the transformer."
        )
