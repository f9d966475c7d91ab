"""What a tokenizer's files say, as far as it may reach the libraries that read them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SigmaError
from ..files.reading import AGAIN, parse_json, parsing, read_bytes, read_json

SETTINGS = "tokenizer_config.json"
# All of tokenizer_config.json that is passed on. The class is ours to choose, and so is everything that would
# fetch or run something.
KNOWN: dict[str, tuple[type, ...]] = {
    "extra_ids": (int,),
    "additional_special_tokens": (list, type(None)),
    "added_tokens_decoder": (dict,),
    "eos_token": (str, dict),
    "pad_token": (str, dict),
    "unk_token": (str, dict),
    "legacy": (bool, type(None)),
    "add_prefix_space": (bool, type(None)),
}
# Fields of sentencepiece_model.proto: a piece of the vocabulary, how it was trained, and how text is
# normalised. Each is there in a whole file, the pieces first.
PIECE, TRAINER, NORMALISER = 1, 2, 3
DELIMITED, FIXED_64, FIXED_32 = 2, 1, 5  # how the bytes of a field are laid out (protobuf's wire types)
# A pattern that may repeat once, and no more, cannot take longer than its text is long.
HARMLESS = re.compile(r"[^()|\\*+?{}\[\]]*(?:[*+]|\{\d{1,3},?\})?")


def read_settings(folder: Path, most_tokens: int) -> dict:
    """What the tokenizer_config.json of a folder says, as far as it is known; {} where there is none.

    Raises SigmaError for what is of another type, and for more special tokens than the encoder has tokens.
    """
    file = folder / SETTINGS
    if not file.is_file():
        return {}
    found = read_json(file)
    known = {name: found[name] for name in KNOWN if name in found}
    for name, value in known.items():
        if type(value) not in KNOWN[name]:
            raise SigmaError(f"{file} says {name} {value!r}, which is no setting of a T5 tokenizer.")
    extra = known.get("extra_ids", 0)
    counts = (len(known.get(name) or ()) for name in ("additional_special_tokens", "added_tokens_decoder"))
    if not 0 <= max(extra, *counts) <= most_tokens or extra < 0:
        raise SigmaError(f"{file} asks for {extra} extra tokens, and the encoder knows {most_tokens} in all.")
    return known


def write_for_transformers(file: Path, settings: dict, folder: Path) -> None:
    """Put a SentencePiece model and its settings where transformers reads them, under the names it knows.

    Raises SigmaError for a model that is cut off.
    """
    content = read_bytes(file)
    with parsing(file, "can not be read as a tokenizer", AGAIN):
        _check_sentencepiece(content)
    (folder / "spiece.model").write_bytes(content)
    if settings:
        (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def check_tokenizer_json(file: Path) -> None:
    """SigmaError for a tokenizer.json that is no JSON, or has a pattern that could take for ever."""
    content = read_bytes(file)
    with parsing(file, "can not be read as a tokenizer", AGAIN):
        for pattern in _patterns(parse_json(content)):
            if not isinstance(pattern, str) or not HARMLESS.fullmatch(pattern):
                raise ValueError(f"it has the pattern {pattern!r}, and none of T5's is like that")


def _patterns(said: Any) -> Iterator[Any]:
    level = [said]
    for value in level:
        if isinstance(value, dict):
            if "Regex" in value and len(value) == 1:
                yield value["Regex"]
            # The vocabulary is long, and has no patterns.
            level += [inner for name, inner in value.items() if name != "vocab"]
        elif isinstance(value, list):
            level += value


def _check_sentencepiece(content: bytes) -> None:
    """Raises ValueError unless the fields of the file end where it ends, and all are there: what is cut off
    would be read as a smaller vocabulary, by which words are unknown."""
    fields, at = set(), 0
    while at < len(content):
        tag, at = _number(content, at)
        fields.add(tag >> 3)
        layout = tag & 7
        if layout == DELIMITED:
            length, at = _number(content, at)
            at += length
        elif layout in (FIXED_64, FIXED_32):
            at += 8 if layout == FIXED_64 else 4
        elif layout == 0:
            _, at = _number(content, at)
        else:
            raise ValueError("it is no SentencePiece model")
    if at != len(content) or not fields >= {PIECE, TRAINER, NORMALISER}:
        raise ValueError("it is no whole SentencePiece model")


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A number in protobuf's bytes of seven bits, and where the next byte is."""
    number = shift = 0
    while shift < 64:
        if at >= len(content):
            raise ValueError("it is cut off")
        number |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 128:
            return number, at
    raise ValueError("it is no SentencePiece model")
