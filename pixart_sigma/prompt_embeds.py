"""What passes from the text encoder to the transformer: embeddings of prompts, trimmed to their real
tokens."""

from dataclasses import dataclass

import torch

from .errors import SigmaError


@dataclass(frozen=True)
class Encoded:
    """A prompt's embeddings and the words that did not fit.

    prompt_embeds: (1, n, C), trimmed to the n real tokens. truncated: words beyond, or "".
    """

    prompt_embeds: torch.Tensor
    truncated: str = ""


@dataclass(frozen=True, eq=False)
class Prompts:
    """The embeddings of a run: of the prompts, and of the negative prompts where there is guidance.

    prompt_embeds, negative_embeds: (B or 1, tokens, C), of any two lengths; one row serves all pictures.
    masks: (B or 1, tokens), True or 1 for real tokens; None when all are.
    """

    prompt_embeds: torch.Tensor
    prompt_mask: torch.Tensor | None = None
    negative_embeds: torch.Tensor | None = None
    negative_mask: torch.Tensor | None = None


def pad_embeds(embeds: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Batch embeddings (1, n, C) of different lengths into (prompt_embeds, prompt_mask).

    prompt_embeds is (B, L, C), padded with zeros. prompt_mask is (B, L) bool, True at real tokens, or None
    when all lengths are equal. Raises SigmaError for an empty list or for embeddings of different widths.
    """
    if not embeds:
        raise SigmaError("There are no prompt embeddings to batch. Pass at least one.")
    for embed in embeds:
        if embed.ndim != 3 or embed.shape[0] != 1 or embed.shape[2] != embeds[0].shape[-1]:
            raise SigmaError(
                f"Prompt embeddings must all be (1, tokens, {embeds[0].shape[-1]}); one is "
                f"{tuple(embed.shape)}. Encode all prompts with the same text encoder."
            )
    lengths = torch.tensor([embed.shape[1] for embed in embeds])
    longest = int(lengths.max())
    padded = torch.cat(
        [torch.nn.functional.pad(embed, (0, 0, 0, longest - embed.shape[1])) for embed in embeds]
    )
    if bool((lengths == longest).all()):
        return padded, None
    mask = torch.arange(longest)[None] < lengths[:, None]
    return padded, mask.to(padded.device)
