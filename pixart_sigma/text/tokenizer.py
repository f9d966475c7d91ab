"""T5's tokenizer: where it lies, and how it is read."""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import SigmaError
from ..files.download import BASE
from ..files.reading import AGAIN, parsing, refuse_special
from ..files.weight_files import read_header
from .tokenizer_files import check_tokenizer_json, read_settings, write_for_transformers
from .tokenizer_places import TOKENIZER_FILES, beside, elsewhere, in_folders
from .weights import EMBEDDING_TABLES

# T5's vocabulary is filled up to a multiple of 128, and a tokenizer may lack the 100 sentinels.
MOST_SPARE_ROWS = 127 + 100


def find_tokenizer(path: Path, tokenizer=None, others: list[Path] | None = None) -> Path:
    """Return the tokenizer file to use for the encoder at `path`.

    tokenizer: a file, or a folder with one, that goes before all others. Without it, the encoder's own;
    where it has none, the first that fits its vocabulary in the folders of `others`, by default all places
    of `tokenizer_places`. Raises SigmaError saying what to pass.
    """
    if tokenizer is not None:
        return _given(Path(tokenizer))
    own = next(in_folders(beside(path)), None)
    if own is not None and path.is_dir():
        return own
    header = read_header(path, part="text_encoder")
    tables = [header[name][0] for name in EMBEDDING_TABLES if name in header]
    vocab_size = tables[0][0] if tables and tables[0] else 0
    # What lies beside a file may belong to another one in the same folder.
    for file in _candidates(own, in_folders(others) if others is not None else elsewhere(path)):
        if _fits(file, vocab_size, file.stat().st_mtime_ns):
            return file
    places = (
        ", ".join(map(str, others))
        if others is not None
        else ("a pipeline folder under ComfyUI's models, in the Hugging Face cache, or in a ComfyUI")
    )
    raise SigmaError(
        f"No tokenizer for the {vocab_size} tokens of {path}: there is none beside it, and none that fits in "
        f"{places}. Give T5's spiece.model or tokenizer.json with --tokenizer (in Python `tokenizer`), or "
        f'get it once with: hf download {BASE} --include "tokenizer/*"'
    )


def _given(tokenizer: Path) -> Path:
    refuse_special(tokenizer)
    if tokenizer.is_file():
        return tokenizer
    if not tokenizer.exists():
        raise SigmaError(f"The tokenizer {tokenizer} does not exist.")
    found = next(in_folders([tokenizer, tokenizer / "tokenizer"]), None)
    if found is None:
        raise SigmaError(f"{tokenizer} holds no tokenizer: neither {' nor '.join(TOKENIZER_FILES)} is there.")
    return found


def _candidates(own: Path | None, others: Iterator[Path]) -> Iterator[Path]:
    if own is not None:
        yield own
    yield from others


@functools.lru_cache(maxsize=64)
def _fits(file: Path, vocab_size: int, changed: int) -> bool:
    """Whether it is T5's and has the encoder's vocabulary. `changed` makes a replaced file another one."""
    try:
        load_tokenizer(file, vocab_size)
    except SigmaError:
        return False
    return True


def load_tokenizer(file: Path, vocab_size: int):
    """Load a T5 tokenizer from tokenizer.json, as it was saved, or from a SentencePiece model.

    Sentinel tokens (`extra_ids`) are the saved ones; a SentencePiece model without tokenizer_config.json gets
    the 100 of T5 where the encoder's vocabulary has room for them. Raises SigmaError when it is no T5
    tokenizer, or its tokens are not those of the encoder's vocabulary by their number.
    """
    from transformers import PreTrainedTokenizerFast, T5Tokenizer

    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    with parsing(file, "can not be read as a tokenizer", AGAIN):
        if file.suffix == ".json":
            check_tokenizer_json(file)
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        else:
            settings = read_settings(file.parent, vocab_size)
            with tempfile.TemporaryDirectory() as folder:  # the name and nothing else decides how it is read
                write_for_transformers(file, settings, Path(folder))
                tokenizer = T5Tokenizer.from_pretrained(folder)
                if not settings and len(tokenizer) > vocab_size:
                    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
        empty = tokenizer("")["input_ids"]
    if empty != [tokenizer.eos_token_id]:
        raise SigmaError(
            f"{file} is not a T5 tokenizer: it encodes an empty prompt as {empty}, not as one end token."
        )
    if not vocab_size - MOST_SPARE_ROWS <= len(tokenizer) <= vocab_size:
        raise SigmaError(
            f"The tokenizer {file} has {len(tokenizer)} tokens, but the encoder knows {vocab_size}. "
            "Pass the tokenizer that belongs to the encoder."
        )
    return tokenizer


def tokenize(tokenizer, text: str, **asked) -> dict:
    """What a loaded tokenizer makes of a text; asked: as transformers has it.

    Raises SigmaError where it fails, as one from a damaged file may, whose parser does not look at all of it.
    """
    with parsing("The text encoder's tokenizer", "can not read this prompt", "Download its files again."):
        return tokenizer(text, verbose=False, **asked)
