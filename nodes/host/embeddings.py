"""Prompt embeddings on the host's disk: CONDITIONING as files, and what T5 made, kept across restarts."""

import functools
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import folder_paths
import torch

from ...pixart_sigma import DEMO
from ...pixart_sigma.errors import SigmaError
from .folders import DEMO_CHOICE

FOLDER = "prompt_embeddings"
DEMO_FILE = DEMO / "prompt_embeddings.safetensors"
SOURCE = "pixart_sigma_source"  # in a conditioning's settings


@dataclass(frozen=True)
class Source:
    """Where a conditioning's embeddings come from. `embeds` are those that were made: nodes that change a
    conditioning copy its settings, and the words are not those of changed embeddings."""

    embeds: torch.Tensor = field(repr=False)
    text: str
    clean_caption: bool = False
    precision: str = ""
    fingerprint: str = ""
    truncated: str = ""


def encode(clip, text: str, clean_caption: bool) -> list:
    """The host's conditioning of a prompt by our CLIP, which loads T5 only for a prompt not seen before."""
    from ...pixart_sigma.prompt_embeds import Encoded

    tokens = clip.tokenize(text, clean_caption=clean_caption)
    encoder, hooked = clip.cond_stage_model.identify(), _is_hooked(clip)
    plain = clip.layer_idx is None and not hooked and clip.tokenizer.is_plain(text, clean_caption, tokens)
    key = None if hooked else _key(clip, encoder, tokens)
    if key is None:
        conditioning = clip.encode_from_tokens_scheduled(tokens)
    else:
        found = _cache(_cache_folder()).get(key)
        if found is None:
            conditioning = clip.encode_from_tokens_scheduled(tokens)
            _cache(_cache_folder()).put(key, Encoded(conditioning[0][0], ""))
        else:
            embeds = found.prompt_embeds.to(comfy.model_management.intermediate_device())
            conditioning = [[embeds, {"pooled_output": None}]]
    return with_source(
        conditioning,
        text=text,
        clean_caption=clean_caption,
        precision=encoder.precision if encoder else "",
        # Whose words alone would not do is known by its numbers.
        fingerprint=encoder.fingerprint if encoder and plain else "",
        truncated=clip.tokenizer.truncated(text, clean_caption),
    )


def encoded_ahead(clip, texts: Iterable[str], clean_caption: bool) -> AbstractContextManager:
    """Within this block `encode` has those of the prompts that are not cached: a streamed T5 reads its blocks
    once for them all. Any other T5 encodes each in its turn."""
    model = clip.cond_stage_model
    if not model.stream or _is_hooked(clip):
        return nullcontext()
    encoder, missing = model.identify(), []
    for text in texts:
        tokens = clip.tokenize(text, clean_caption=clean_caption)
        key = _key(clip, encoder, tokens)
        if key is None or _cache(_cache_folder()).get(key) is None:
            missing.append(tokens)
    if not missing:
        return nullcontext()
    clip.load_model()
    return model.encoded_ahead(missing, clip.layer_idx or -1)


def _is_hooked(clip) -> bool:
    return clip.patcher.forced_hooks is not None or clip.apply_hooks_to_conds is not None


def _key(clip, encoder, tokens) -> str | None:
    """What the tokens' embeddings are cached by; None where it is not known which encoder makes them."""
    from ...pixart_sigma.text.cache import cache_key
    from .tokenizer import by_value

    if encoder is None:
        return None
    # Tokens, not the text: a clone of the CLIP may have tokenizer options and a layer of its own.
    return cache_key(encoder, clip.patcher.load_device, tokens=by_value(tokens), layer=clip.layer_idx)


def with_source(conditioning: list, **known) -> list:
    """The conditioning, telling where its embeddings are from."""
    return [[embeds, settings | {SOURCE: Source(embeds, **known)}] for embeds, settings in conditioning]


def to_file(positive: list, negative: list, filename_prefix: str) -> str:
    """Save two conditionings in output/prompt_embeddings; the choice under which `find` has the file.

    Raises SigmaError for a prefix that leads elsewhere, and for a conditioning that is more than one prompt's
    embeddings, since the rest would be lost.
    """
    from ...pixart_sigma.text.embeddings import PromptEmbeddings

    sources = {"positive": _source_of("positive", positive), "negative": _source_of("negative", negative)}
    shown, unwanted = sources["positive"], sources["negative"]
    embeddings = PromptEmbeddings(
        positive=shown.embeds,
        negative=unwanted.embeds,
        positive_text=shown.text,
        negative_text=unwanted.text,
        precision=shown.precision if shown.precision == unwanted.precision else "",
        clean_caption=shown.clean_caption,
        fingerprint=shown.fingerprint if shown.fingerprint == unwanted.fingerprint else "",
        positive_truncated=shown.truncated,
        negative_truncated=unwanted.truncated,
    )
    root = _output_folder()
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, str(root))
    except Exception as error:  # the host raises a bare Exception for a place outside
        raise SigmaError(
            f"filename_prefix is {filename_prefix!r}, which is no place in output/{FOLDER}. Choose a plain "
            "name."
        ) from error
    if name.startswith("."):
        raise SigmaError(f"filename_prefix is {filename_prefix!r}; choose a name that begins with no dot.")
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    embeddings.save(path)
    return f"output/{path.relative_to(root).as_posix()}"


def choices() -> list[str]:
    """The files that can be loaded: saved ones, those in input/prompt_embeddings, and the demo's."""
    return [*_offered(), DEMO_CHOICE]


def find(choice: str) -> Path:
    """The file of a choice. A workflow is not trusted: SigmaError for one that is not offered (any more)."""
    path = DEMO_FILE if choice == DEMO_CHOICE else _offered().get(choice)
    if path is None:
        raise SigmaError(
            f"There are no prompt embeddings {choice!r}. Save them, or put the file into input/{FOLDER}; "
            "press R to refresh, and choose it again."
        )
    return path


def from_file(path: Path) -> tuple[list, list]:
    """The positive and negative conditioning of a file. Raises CheckpointError for a damaged one."""
    from ...pixart_sigma.text.embeddings import PromptEmbeddings

    loaded = PromptEmbeddings.load(path)
    device = comfy.model_management.intermediate_device()

    def conditioning(embeds, text, truncated):
        return with_source(
            [[embeds.float().to(device), {"pooled_output": None}]],
            text=text,
            clean_caption=loaded.clean_caption,
            precision=loaded.precision,
            fingerprint=loaded.fingerprint,
            truncated=truncated,
        )

    return (
        conditioning(loaded.positive, loaded.positive_text, loaded.positive_truncated),
        conditioning(loaded.negative, loaded.negative_text, loaded.negative_truncated),
    )


def _source_of(name: str, conditioning: list) -> Source:
    if len(conditioning) != 1:
        raise SigmaError(
            f"The {name} conditioning has {len(conditioning)} parts, and a file keeps one prompt. Save each "
            "before they are combined."
        )
    embeds, settings = conditioning[0]
    lost = sorted(key for key, value in settings.items() if key != SOURCE and value is not None)
    if lost:
        raise SigmaError(
            f"The {name} conditioning also carries {', '.join(lost)}, which a file does not keep. Save it "
            "before that is added."
        )
    source = settings.get(SOURCE)
    return source if source is not None and source.embeds is embeds else Source(embeds, "")


def _offered() -> dict[str, Path]:
    offered = {}
    for place, root in (
        ("output", _output_folder()),
        ("input", Path(folder_paths.get_input_directory()) / FOLDER),
    ):
        for folder, _, names in os.walk(root):
            for name in names:
                # Hidden ones are not written to their end.
                if name.endswith(".safetensors") and not name.startswith("."):
                    path = Path(folder) / name
                    offered[f"{place}/{path.relative_to(root).as_posix()}"] = path
    return dict(sorted(offered.items()))


def _output_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def _cache_folder() -> Path:
    # The host serves neither this folder nor what is in it, and does not empty it when it starts.
    return Path(folder_paths.get_system_user_directory("pixart_sigma")) / "embeddings"


@functools.cache
def _cache(folder: Path):
    from ...pixart_sigma.text.cache import EmbeddingCache

    return EmbeddingCache(folder)
