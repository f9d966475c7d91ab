"""Prompt text as PixArt-Sigma was trained on it: lower case, optionally cleaned like its captions."""

import re
from importlib.util import find_spec

from ..errors import SigmaError
from ..setting_checks import check_text

# A word that names a textual-inversion embedding, as ComfyUI writes it: at the start, after a space, or in
# brackets.
EMBEDDING = re.compile(r"(?:(?<=[\s()])|^)embedding:\s*\S+")


def prepare_prompt(text: str, clean_caption: bool = False) -> str:
    """Return the prompt lower-cased and stripped, or cleaned twice when clean_caption is set.

    The cleaning is the reference's (diffusers PixArtSigmaPipeline, from DeepFloyd IF): it removes URLs, HTML,
    CJK characters, hashtags and file names. Raises SigmaError when ftfy or beautifulsoup4 is missing, where
    the reference silently leaves the caption as it is.
    """
    if not isinstance(text, str):
        raise SigmaError(f"The prompt must be a text, not {type(text).__name__}. Pass one prompt at a time.")
    check_text("prompt", text)
    if not clean_caption:
        return text.lower().strip()

    for module, package in (("ftfy", "ftfy"), ("bs4", "beautifulsoup4")):
        if find_spec(module) is None:
            raise SigmaError(
                f"clean_caption needs {package}: pip install {package}, or turn clean_caption off."
            )
    from diffusers import PixArtSigmaPipeline

    # The method reads one class attribute and no state, so the class stands in for a pipeline.
    once = PixArtSigmaPipeline._clean_caption(PixArtSigmaPipeline, text)
    return PixArtSigmaPipeline._clean_caption(PixArtSigmaPipeline, once)


def prepare_around_embeddings(text: str, clean_caption: bool = False) -> str:
    """The prompt as `prepare_prompt` makes it, but for words that name embeddings: files have any case."""
    named = EMBEDDING.findall(text) if isinstance(text, str) else []
    if not named:
        return prepare_prompt(text, clean_caption)
    between = EMBEDDING.split(text)
    if clean_caption:
        between = [f" {prepare_prompt(words, True)} " for words in between]
    else:
        between = [words.lower() for words in between]
    pieces = [piece for pair in zip(between, [*named, ""], strict=True) for piece in pair]
    return "".join(pieces).strip()


def refuse_embeddings(text: str) -> None:
    """Raise SigmaError for a prompt that names an embedding, which would be encoded as the letters."""
    for named in EMBEDDING.findall(text) if isinstance(text, str) else ():
        if len(named.split()) == 1:  # "embedding: a word" may be a sentence
            raise SigmaError(
                f"The prompt names {named!r}, and embeddings are read only in ComfyUI: encode the prompt "
                "there and keep it with Save Σ Prompt Embeddings, or leave that word out."
            )
