"""How far two precisions of T5 are from each other: figures of each prompt, and of all.

Where both embeddings of a token point is compared by their cosine, a whole prompt by its signal-to-noise
ratio, and the two pictures of the same noise by their peak signal-to-noise ratio.
"""

import math
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageChops, ImageStat

from ..memory.measure import readable
from ..table import align
from ..text.cleaning import prepare_prompt

END, END_NAME = "</s>", "(end)"


@dataclass(frozen=True)
class PromptComparison:
    """One prompt in both precisions.

    tokens: n SentencePiece pieces as T5 read them, the last one its end token; cosines: (n,) in [-1, 1]. snr:
    10 log10(|reference|² / |difference|²) of the embeddings, in dB. psnr: of the two pictures, in dB; None
    without pictures. Where nothing differs the ratios are infinite. truncated: words that did not fit.
    """

    prompt: str
    tokens: tuple[str, ...]
    cosines: tuple[float, ...]
    snr: float
    psnr: float | None = None
    truncated: str = ""

    @property
    def cosine(self) -> float:
        """The mean of the tokens'."""
        return sum(self.cosines) / len(self.cosines)

    @property
    def least(self) -> tuple[str, float]:
        """The word with the token that differs most, and that token's cosine."""
        return min(self.words(), key=lambda word: word[1])

    def words(self) -> list[tuple[str, float]]:
        """The words of the prompt, each with the least cosine of its tokens."""
        words: list[tuple[str, float]] = []
        for token, cosine in zip(self.tokens, self.cosines, strict=True):
            if token.startswith("▁") or token == END or not words:
                words.append((END_NAME if token == END else token.removeprefix("▁"), cosine))
            else:
                word, least = words[-1]
                words[-1] = (word + token, min(least, cosine))
        return words

    def as_dict(self) -> dict:
        """Ready for JSON, which has no infinity: null stands for it. There is no psnr_db without pictures."""
        word, least = self.least
        psnr = {} if self.psnr is None else {"psnr_db": _finite(self.psnr)}
        return {
            "prompt": self.prompt,
            "cosine": self.cosine,
            "least_cosine": least,
            "least_word": word,
            "snr_db": _finite(self.snr),
            **psnr,
            "tokens": [list(pair) for pair in zip(self.tokens, self.cosines, strict=True)],
        }


@dataclass(frozen=True)
class PrecisionComparison:
    """Several prompts in the reference's precision and in another one.

    nbytes: what each encoder takes on its device. pictures: of each prompt one in each precision; settings:
    what they were made with. Both are empty without pictures.
    """

    precisions: tuple[str, str]
    nbytes: tuple[int, int]
    prompts: tuple[PromptComparison, ...]
    settings: dict = field(default_factory=dict)
    pictures: tuple[tuple[Image.Image, Image.Image], ...] = field(default=(), repr=False)

    @property
    def worst(self) -> PromptComparison:
        """The prompt with the lowest signal-to-noise ratio."""
        return min(self.prompts, key=lambda prompt: prompt.snr)

    def summary(self) -> str:
        """One sentence: what is saved, and what it costs at worst."""
        reference, other = self.precisions
        large, small = (readable(size) for size in self.nbytes)
        word, least = min((prompt.least for prompt in self.prompts), key=lambda found: found[1])
        return (
            f"T5 in {other} takes {small}, in {reference} {large}. At worst: SNR {decibels(self.worst.snr)}, "
            f'cosine {least:.5f} at "{word}".'
        )

    def table(self) -> str:
        """All figures as text for people; GB are 10^9 bytes."""
        rows = [("prompt", "cosine", "least", "at", "SNR", *(("PSNR",) if self.pictures else ()))]
        for prompt in self.prompts:
            word, least = prompt.least
            psnr = () if prompt.psnr is None else (decibels(prompt.psnr),)
            shown = prompt.prompt if len(prompt.prompt) <= 40 else prompt.prompt[:37] + "..."
            rows.append((shown, f"{prompt.cosine:.5f}", f"{least:.5f}", word, decibels(prompt.snr), *psnr))
        return "\n".join([self.summary(), align(rows)])

    def as_dict(self) -> dict:
        """All figures, ready for JSON."""
        return {
            "precisions": list(self.precisions),
            "bytes": list(self.nbytes),
            "prompts": [prompt.as_dict() for prompt in self.prompts],
            "settings": self.settings,
        }


def compare_prompt(
    prompt: str,
    tokens: list[str],
    reference: torch.Tensor,
    other: torch.Tensor,
    pictures: tuple[Image.Image, ...] = (),
    truncated: str = "",
) -> PromptComparison:
    """Compare embeddings (1, n, C) of n tokens, and two pictures of one size if there are any."""
    reference, other = reference[0].cpu().double(), other[0].cpu().double()
    cosines = torch.nn.functional.cosine_similarity(reference, other, dim=-1)
    signal, noise = float(reference.square().sum()), float((reference - other).square().sum())
    return PromptComparison(
        prompt=prompt,
        tokens=tuple(tokens),
        cosines=tuple(cosines.tolist()),
        snr=_decibels_of(signal, noise),
        psnr=peak_signal_to_noise(*pictures) if pictures else None,
        truncated=truncated,
    )


def peak_signal_to_noise(reference: Image.Image, other: Image.Image) -> float:
    """10 log10(255² / mean squared difference) of two RGB pictures of one size, in dB."""
    squares = ImageStat.Stat(ImageChops.difference(reference, other)).sum2
    return _decibels_of(255**2, sum(squares) / (3 * reference.width * reference.height))


def read_tokens(tokenizer, prompt: str, count: int, clean_caption: bool = False) -> list[str]:
    """The pieces of the `count` tokens, end token included, that T5 reads of a prompt."""
    ids = tokenizer(prepare_prompt(prompt, clean_caption), verbose=False)["input_ids"]
    return [*tokenizer.convert_ids_to_tokens(ids[: count - 1]), END]


def decibels(ratio: float) -> str:
    return "equal" if ratio == math.inf else f"{ratio:.1f} dB"


def _decibels_of(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf


def _finite(ratio: float) -> float | None:
    return None if ratio == math.inf else ratio
