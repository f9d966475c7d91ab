"""T5's tokenizer: where it lies, and how it is read."""

import shutil
import tempfile
from pathlib import Path

from ..errors import SigmaError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def find_tokenizer(path: Path, tokenizer=None) -> Path:
    """Return the tokenizer file to use for the encoder at `path`. Raises SigmaError saying what to pass."""
    if tokenizer is not None:
        tokenizer = Path(tokenizer)
        if tokenizer.is_file():
            return tokenizer
        if not tokenizer.exists():
            raise SigmaError(f"The tokenizer {tokenizer} does not exist.")
        folders = [tokenizer, tokenizer / "tokenizer"]
    else:
        folder = path if path.is_dir() else path.parent
        folders = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    for folder in folders:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    raise SigmaError(
        f"No tokenizer in {', '.join(map(str, folders))}. Pass `tokenizer`: a spiece.model or "
        "tokenizer.json, or the `tokenizer` folder of PixArt-Sigma-XL-2-1024-MS."
    )


def load_tokenizer(file: Path, vocab_size: int):
    """Load a T5 tokenizer from tokenizer.json, as it was saved, or from a SentencePiece model.

    Sentinel tokens (`extra_ids`) are the saved ones; a SentencePiece model without tokenizer_config.json gets
    the 100 of T5 where the encoder's vocabulary has room for them. Raises SigmaError when it is no T5
    tokenizer, or has more tokens than the encoder.
    """
    from transformers import PreTrainedTokenizerFast, T5Tokenizer

    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    try:
        if file.suffix == ".json":
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        else:
            with tempfile.TemporaryDirectory() as folder:  # the name and nothing else decides how it is read
                shutil.copyfile(file, Path(folder) / "spiece.model")
                settings = file.parent / "tokenizer_config.json"
                if settings.is_file():
                    shutil.copyfile(settings, Path(folder) / settings.name)
                tokenizer = T5Tokenizer.from_pretrained(folder)
                if not settings.is_file() and len(tokenizer) > vocab_size:
                    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
        empty = tokenizer("")["input_ids"]
    except Exception as error:  # the parsers raise bare Exception for a broken file
        raise SigmaError(f"{file} can not be read as a tokenizer: {error}. Download it again.") from error
    if empty != [tokenizer.eos_token_id]:
        raise SigmaError(
            f"{file} is not a T5 tokenizer: it encodes an empty prompt as {empty}, not as one end token."
        )
    if len(tokenizer) > vocab_size:
        raise SigmaError(
            f"The tokenizer {file} has {len(tokenizer)} tokens, but the encoder knows {vocab_size}. "
            "Pass the tokenizer that belongs to the encoder."
        )
    return tokenizer
