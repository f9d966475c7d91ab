"""What a smaller T5 costs: the same prompts through two precisions, token by token and as pictures.

Where both embeddings of a token point is compared by their cosine, a whole prompt by its signal-to-noise
ratio, and the two pictures of the same noise by their peak signal-to-noise ratio.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageChops, ImageStat

from ..aspect_ratio import check_size
from ..errors import SigmaError
from ..memory.stages import readable
from ..sampling.denoise import Step, check_settings
from ..text.embeddings import EmbeddingCache, PromptEmbeddings
from ..text.encoder import describe_encoder, read_encoder
from ..text.model import check_4bit_widths, check_packages

if TYPE_CHECKING:
    from ..pipeline import SigmaPipeline

# Words of several kinds: plain ones, names and numbers, a relation, and a long sentence.
PROMPTS = (
    "a portrait of an old fisherman with a grey beard, soft window light",
    "three green apples to the left of a glass vase, still life, oil on canvas",
    "an isometric drawing of a tiny bookshop on a rainy evening, warm light in the windows, a cat asleep "
    "beside the door, many small details",
)
DEMO_PROMPTS = (
    "a red circle on a blue background",
    "a small yellow star in the top right on a black background",
    "a pink square above a cyan star on white",
)
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
            psnr = (decibels(prompt.psnr),) if self.pictures else ()
            shown = prompt.prompt if len(prompt.prompt) <= 40 else prompt.prompt[:37] + "..."
            rows.append((shown, f"{prompt.cosine:.5f}", f"{least:.5f}", word, decibels(prompt.snr), *psnr))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([self.summary(), *lines])

    def as_dict(self) -> dict:
        """All figures, ready for JSON."""
        return {
            "precisions": list(self.precisions),
            "bytes": list(self.nbytes),
            "prompts": [prompt.as_dict() for prompt in self.prompts],
            "settings": self.settings,
        }


def compare_t5(
    pipeline: "SigmaPipeline",
    prompts: tuple[str, ...],
    precisions: tuple[str, str] = ("bf16", "int8"),
    *,
    negative: str = "",
    pictures: bool = True,
    width: int | None = None,
    height: int | None = None,
    steps: int = 20,
    guidance_scale: float = 4.5,
    seed: int = 0,
    clean_caption: bool = False,
    embedding_cache: EmbeddingCache | None = None,
    on_stage: Callable[[str], None] = lambda name: None,
    callback: Callable[[Step], bool | None] | None = None,
) -> PrecisionComparison:
    """Encode the prompts with the pipeline's T5 in both precisions, the reference first, and draw with each.

    The settings are those of `SigmaPipeline.generate`; with `pictures` False only T5 is loaded. One model is
    in memory at a time, each released before the next, whatever the pipeline does in its own runs.
    Raises SigmaError before anything is loaded for what `check_comparison` says and for wrong settings.
    """
    text = pipeline.text
    if text.text_encoder is None:
        raise SigmaError("This pipeline has no text encoder to compare; give it one.")
    tokenizer, nbytes = check_comparison(
        prompts,
        precisions,
        text.text_encoder,
        tokenizer=text.tokenizer,
        device="cpu" if text.place == "cpu" else pipeline.device,
        stream=text.place == "stream",
        caption_channels=pipeline.checkpoint.config.caption_channels if pictures else None,
    )
    base = pipeline.base_size
    size = {"width": base if width is None else width, "height": base if height is None else height}
    if pictures:
        check_size(**size)
        check_settings("dpmpp_2m", steps, guidance_scale)

    pipeline = pipeline.apart()
    encoded = []
    for precision in precisions:
        on_stage(f"T5 in {precision}")
        texts = (*prompts, negative)
        found, _ = pipeline.text.encode(texts, clean_caption, embedding_cache, precision)
        encoded.append([(one.prompt_embeds.cpu(), one.truncated) for one in found])

    settings = {}
    if pictures:
        settings = size | {"steps": steps, "guidance_scale": guidance_scale, "seed": seed}
    compared, drawn = [], []
    for index, prompt in enumerate(prompts):
        pair = []
        for precision, found in zip(precisions, encoded, strict=True) if pictures else ():
            on_stage(f"{prompt[:20]!r} in {precision}")
            embeddings = PromptEmbeddings(found[index][0], found[-1][0], prompt, negative, precision)
            made = pipeline.generate(embeddings, callback=callback, **settings)
            pair.append(made.images[0])
        if pair:
            drawn.append(tuple(pair))
        (reference, truncated), (other, _) = (found[index] for found in encoded)
        tokens = read_tokens(tokenizer, prompt, reference.shape[1], clean_caption)
        compared.append(compare_prompt(prompt, tokens, reference, other, tuple(pair), truncated))
    return PrecisionComparison(tuple(precisions), nbytes, tuple(compared), settings, tuple(drawn))


def check_comparison(
    prompts: tuple[str, ...],
    precisions: tuple[str, str],
    text_encoder: Path,
    *,
    tokenizer: Path | None = None,
    device: str | torch.device = "cpu",
    stream: bool = False,
    caption_channels: int | None = None,
) -> tuple:
    """(tokenizer, bytes on the device in each precision) of a T5 whose weights are not loaded.

    The arguments are those of TextEncoder.load; caption_channels: the width that the transformer reads, if
    pictures are to be drawn.
    Raises SigmaError without a prompt, for precisions that are not two different ones that this encoder can
    be loaded in, and for an encoder that is not the transformer's.
    """
    if not prompts:
        raise SigmaError("There is no prompt to compare with; give at least one.")
    if len(precisions) != 2 or precisions[0] == precisions[1]:
        raise SigmaError(
            f"The precisions are {' and '.join(map(repr, precisions))}; give two different ones, such as "
            "bf16 and int8."
        )
    nbytes = []
    for precision in precisions:
        _, config, _, _ = read_encoder(text_encoder, precision)
        if caption_channels not in (None, config.d_model):
            raise SigmaError(
                f"{text_encoder} makes embeddings {config.d_model} wide, and the transformer reads "
                f"{caption_channels}. Choose the encoder that belongs to it, or compare without pictures."
            )
        check_packages(precision)
        if precision in ("nf4", "fp4"):
            check_4bit_widths(config, precision)
        loaded_tokenizer, size = describe_encoder(text_encoder, tokenizer, precision, device, stream)
        nbytes.append(size)
    return loaded_tokenizer, tuple(nbytes)


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
    from ..text.cleaning import prepare_prompt

    ids = tokenizer(prepare_prompt(prompt, clean_caption), verbose=False)["input_ids"]
    return [*tokenizer.convert_ids_to_tokens(ids[: count - 1]), END]


def decibels(ratio: float) -> str:
    return "equal" if ratio == math.inf else f"{ratio:.1f} dB"


def _decibels_of(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf


def _finite(ratio: float) -> float | None:
    return None if ratio == math.inf else ratio
