"""What a smaller T5 costs: the same prompts through two precisions, token by token and as pictures.

`compare` is the driver. What encodes and draws is a `Subject`: a pipeline's is here, the host's with the
nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from ..choices import T5_PRECISIONS
from ..errors import SigmaError
from ..pipeline import SigmaPipeline
from ..prompt_embeds import Encoded
from ..sampling.denoise import Step
from ..settings import Settings
from ..text.cache import EmbeddingCache
from ..text.embeddings import PromptEmbeddings
from ..text.loading import describe_encoder, read_encoder
from ..text.model import check_4bit_widths, check_packages
from .precision_figures import PrecisionComparison, compare_prompt, read_tokens

# Of the settings, what pictures that are compared are said to be made with.
DRAWN_WITH = ("width", "height", "steps", "guidance_scale", "seed")
# Words of several kinds: plain ones, names and numbers, a relation, and a long sentence.
PROMPTS = (
    "a portrait of an old fisherman with a grey beard, soft window light",
    "three green apples to the left of a glass vase, still life, oil on canvas",
    "an isometric drawing of a tiny bookshop on a rainy evening, warm light in the windows, a cat asleep "
    "beside the door, many small details",
)
DEMO_PROMPTS = (
    "a red square on a blue background",
    "a small yellow star in the top right on a black background",
    "a pink square above a cyan star on white",
)


class Subject(Protocol):
    """What a comparison is made with: the encoder in each precision, and if there are pictures what draws
    them."""

    @property
    def settings(self) -> dict:
        """What the pictures are made with, ready for JSON; empty without pictures."""
        ...

    def encode(self, precision: str, texts: tuple[str, ...]) -> list[Encoded]:
        """The embeddings of each text; nothing of the encoder is left afterwards."""
        ...

    def tokens(self, prompt: str, count: int) -> list[str]:
        """The pieces of the `count` tokens, end token included, that T5 reads of a prompt."""
        ...

    def draw(self) -> list[tuple[Image.Image, Image.Image]]:
        """Both pictures of each prompt, from the same noise, once both precisions have encoded; or none at
        all."""
        ...


def compare(
    subject: Subject,
    prompts: tuple[str, ...],
    precisions: tuple[str, str],
    nbytes: tuple[int, int],
    negative: str = "",
) -> PrecisionComparison:
    """Compare prompts in both precisions, the reference first. nbytes: what each encoder takes on its
    device."""
    references, others = (subject.encode(precision, (*prompts, negative)) for precision in precisions)
    drawn = subject.draw()
    compared = []
    for index, prompt in enumerate(prompts):
        reference, other = references[index], others[index]
        tokens = subject.tokens(prompt, reference.prompt_embeds.shape[1])
        pair = drawn[index] if drawn else ()
        compared.append(
            compare_prompt(
                prompt, tokens, reference.prompt_embeds, other.prompt_embeds, pair, reference.truncated
            )
        )
    return PrecisionComparison(precisions, nbytes, tuple(compared), subject.settings, tuple(drawn))


@dataclass
class PipelineSubject:
    """A pipeline's T5, and its transformer and VAE where `pictures` are to be drawn."""

    pipeline: SigmaPipeline
    prompts: tuple[str, ...]
    chosen: Settings
    tokenizer: Any
    pictures: bool
    embedding_cache: EmbeddingCache | None
    on_stage: Callable[[str], None]
    callback: Callable[[Step], bool | None] | None
    encoded: dict[str, list[Encoded]] = field(default_factory=dict)

    @property
    def settings(self) -> dict:
        chosen = self.chosen.as_dict() if self.pictures else {}
        return {name: chosen[name] for name in DRAWN_WITH if name in chosen}

    def encode(self, precision: str, texts: tuple[str, ...]) -> list[Encoded]:
        self.on_stage(f"T5 in {precision}")
        ways = replace(self.pipeline.ways, t5_precision=precision)
        found, _, _ = self.pipeline.text.encode(texts, self.chosen, ways, self.embedding_cache)
        self.encoded[precision] = [Encoded(one.prompt_embeds.cpu(), one.truncated) for one in found]
        return self.encoded[precision]

    def tokens(self, prompt: str, count: int) -> list[str]:
        return read_tokens(self.tokenizer, prompt, count, self.chosen.clean_caption)

    def draw(self) -> list[tuple[Image.Image, Image.Image]]:
        if not self.pictures:
            return []
        settings = self.chosen.without_prompts()
        drawn = []
        for index, prompt in enumerate(self.prompts):
            pair = []
            for precision, found in self.encoded.items():
                self.on_stage(f"{prompt[:20]!r} in {precision}")
                positive, negative = found[index].prompt_embeds, found[-1].prompt_embeds
                embeddings = PromptEmbeddings(positive, negative, prompt, self.chosen.negative, precision)
                made = self.pipeline.generate(settings, embeddings=embeddings, callback=self.callback)
                pair.append(made.images[0])
            drawn.append((pair[0], pair[1]))
        return drawn


def compare_t5(
    pipeline: SigmaPipeline,
    prompts: tuple[str, ...],
    precisions: tuple[str, str] = ("bf16", "int8"),
    settings: Settings | None = None,
    *,
    pictures: bool = True,
    embedding_cache: EmbeddingCache | None = None,
    on_stage: Callable[[str], None] = lambda name: None,
    callback: Callable[[Step], bool | None] | None = None,
) -> PrecisionComparison:
    """Encode the prompts with the pipeline's T5 in both precisions, the reference first, and draw with each.

    The settings are those of `SigmaPipeline.generate`; with `pictures` False only T5 is loaded. One model is
    in memory at a time, each released before the next, whatever the pipeline does in its own runs.
    Raises SigmaError before anything is loaded for what `check_comparison` says.
    """
    text = pipeline.text
    if text.text_encoder is None:
        raise SigmaError("This pipeline has no text encoder to compare; give it one.")
    place = pipeline.ways.t5_device
    tokenizer, nbytes = check_comparison(
        prompts,
        precisions,
        text.text_encoder,
        tokenizer=text.tokenizer,
        device="cpu" if place == "cpu" else pipeline.device,
        stream=place == "stream",
        caption_channels=pipeline.checkpoint.config.caption_channels if pictures else None,
    )
    settings = (settings or Settings()).complete(pipeline.base_size)
    subject = PipelineSubject(
        pipeline=pipeline.apart(),
        prompts=prompts,
        chosen=settings,
        tokenizer=tokenizer,
        pictures=pictures,
        embedding_cache=embedding_cache,
        on_stage=on_stage,
        callback=callback,
    )
    return compare(subject, prompts, precisions, nbytes, settings.negative)


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
        _, config, _, _ = read_encoder(text_encoder, precision, outline=True)
        if caption_channels not in (None, config.d_model):
            raise SigmaError(
                f"{text_encoder} makes embeddings {config.d_model} wide, and the transformer reads "
                f"{caption_channels}. Choose the encoder that belongs to it, or compare without pictures."
            )
        check_packages(precision)
        if T5_PRECISIONS[precision].bits == 4:
            check_4bit_widths(config, precision)
        described = describe_encoder(text_encoder, tokenizer, precision, device, stream)
        nbytes.append(described.nbytes)
    return described.tokenizer, tuple(nbytes)
