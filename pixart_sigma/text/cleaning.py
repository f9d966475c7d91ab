"""Prompt text as PixArt-Sigma was trained on it: lower case, optionally cleaned like its captions."""

from importlib.util import find_spec

from ..errors import SigmaError


def prepare_prompt(text: str, clean_caption: bool = False) -> str:
    """Return the prompt lower-cased and stripped, or cleaned twice when clean_caption is set.

    The cleaning is the reference's (diffusers PixArtSigmaPipeline, from DeepFloyd IF): it removes URLs, HTML,
    CJK characters, hashtags and file names. Raises SigmaError when ftfy or beautifulsoup4 is missing, where
    the reference silently leaves the caption as it is.
    """
    if not isinstance(text, str):
        raise SigmaError(f"The prompt must be a text, not {type(text).__name__}. Pass one prompt at a time.")
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
