"""Prompts as T5's weighted tokens in the form of the host's tokenizers, and the embeddings they name."""

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import comfy.sd1_clip
import folder_paths
import torch

from ...pixart_sigma.choices import MAX_SEQUENCE_LENGTH
from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.files.fingerprint import raw_bytes
from ...pixart_sigma.text.cleaning import prepare_around_embeddings, prepare_prompt
from ...pixart_sigma.text.tokenizer import tokenize
from .notice import add_notice

SECTION = "t5xxl"  # the host's name for T5's tokens
PAD = 0
MOST_BRACKETS = 100  # in brackets; the host calls itself for each
LARGEST_WEIGHT = 1000
# ComfyUI ships T5's tokenizer, for encoders that come without.
T5_TOKENIZER = Path(comfy.sd1_clip.__file__).with_name("text_encoders") / "t5_tokenizer"
NAMED = re.compile(r"(?<!\S)embedding:\s*(\S+)")
USE_OURS = "Use Σ Text Encode, or the plain CLIP Text Encode."


class Tokens(dict):
    """The tokens by text encoder, of which there is one here."""

    def __missing__(self, encoder):
        raise SigmaError(
            f"This node asks for the prompt's tokens of {encoder!r}, a text encoder of another model; "
            f"PixArt-Sigma has T5 alone. {USE_OURS}"
        )


def sections_of(tokens) -> list[list[tuple]]:
    """T5's part of the tokens that a CLIP is given. Raises SigmaError for those of another model."""
    sections = tokens.get(SECTION) if isinstance(tokens, dict) else None
    if not sections or not all(sections):
        held = ", ".join(map(repr, tokens)) if isinstance(tokens, dict) else type(tokens).__name__
        raise SigmaError(
            f"There are no tokens for T5 (of {SECTION!r}) to encode, only {held or 'none'}: they were made "
            f"for another model. {USE_OURS}"
        )
    return sections


def by_value(tokens: dict) -> dict:
    """The tokens ready for JSON: an embedding by a digest of its numbers."""

    def plain(token):
        return hashlib.sha256(raw_bytes(token)).hexdigest() if isinstance(token, torch.Tensor) else token

    return {
        encoder: [[(plain(token), *rest) for token, *rest in section] for section in sections]
        for encoder, sections in tokens.items()
    }


class Named(NamedTuple):
    """What "embedding:NAME" stands for: vectors (n, C), or None and why. rest: what follows in its word."""

    name: str
    rest: str
    vectors: torch.Tensor | None
    remark: str = ""


def find_embedding(word: str, width: int) -> Named:
    """The embedding that a word names after "embedding:", in the folders where the host looks for it."""
    name, rest = word, ""
    if match := re.search(r"[<\[]", word):
        name, rest = word[: match.start()], word[match.start() :]
    found = _load(name, width)
    if found is None and name.endswith(","):
        stripped = name.rstrip(",")
        name, rest = stripped, name[len(stripped) :] + rest
        found = _load(name, width)
    if found is None:
        return Named(
            name, rest, None, f"There is no embedding {name!r} in models/embeddings; it is left out."
        )
    if not isinstance(found, torch.Tensor) or not found.ndim or found.shape[-1] != width:
        size = f"{found.shape[-1]} wide" if isinstance(found, torch.Tensor) and found.ndim else "no vector"
        return Named(
            name,
            rest,
            None,
            f"The embedding {name!r} is {size}, and this T5 reads {width}: it was made for another model, "
            "and is left out.",
        )
    return Named(name, rest, found.detach().float().cpu().reshape(-1, width))


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """The parts of a prompt with their weights, as the host reads them; its escapes are left in.

    Raises SigmaError for brackets too deep for the host, and for weights from which no embeddings follow.
    """
    steps = ((letter == "(") - (letter == ")") for letter in text)
    depth = max(itertools.accumulate(steps), default=0)
    if depth > MOST_BRACKETS:
        raise SigmaError(
            f"The prompt has brackets in brackets, {depth} deep, and at most {MOST_BRACKETS} are read. Write "
            "a weight as (words:1.2)."
        )
    parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    for words, weight in parts:
        if not abs(weight) <= LARGEST_WEIGHT:
            raise SigmaError(
                f"The prompt gives {words[:40]!r} the weight {weight:g}; give one from -{LARGEST_WEIGHT} "
                f"to {LARGEST_WEIGHT}, such as (words:1.2)."
            )
    return parts


def tell_left_out(text: str, width: int):
    """Say on the node which embeddings of a prompt the host will leave out: it says so in its log alone."""
    parts = weighted_parts(text)
    words = [word for part, _ in parts for word in NAMED.findall(comfy.sd1_clip.unescape_important(part))]
    found = [find_embedding(word, width) for word in words]
    add_notice("\n".join(named.remark for named in found if named.vectors is None))


def _load(name: str, width: int):
    folders = folder_paths.get_folder_paths("embeddings")
    return comfy.sd1_clip.load_embed(name, folders, width, SECTION) if name else None


@dataclass
class _Read:
    """What becomes of a prompt: (token or vector, weight, word id), the words that did not fit, and what
    there is to say about its embeddings."""

    room: int
    tokens: list[tuple] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, pieces: list, weight: float, word_id: int, cut_from: Callable[[int], str]):
        """Take what fits; cut_from(i): the text from piece i on."""
        room = self.room - len(self.tokens)
        self.tokens += [(piece, weight, word_id) for piece in pieces[:room]]
        if len(pieces) > room:
            self.cut.append(cut_from(room).strip())


class SigmaTokenizer:
    """Prompts to weighted tokens, in the form of the host's tokenizers."""

    def __init__(self, patcher):
        """patcher: the CLIP's, which knows the tokenizer and the width of its encoder."""
        self.patcher = patcher

    def tokenize_with_weights(
        self, text: str, return_word_ids=False, tokenizer_options=None, clean_caption=False, **kwargs
    ) -> Tokens:
        """One section of at most 300 (token, weight) or (token, weight, word id); what is cut is said.

        "(word:1.3)" sets weights as the host does, except in a cleaned caption. "embedding:name" stands for
        the vectors of a file in models/embeddings, each in the place of a token.
        """
        read = self._read(text, clean_caption, kwargs.get("disable_weights", False))
        remarks = list(read.remarks)
        if read.cut:
            remarks.append(
                f"The prompt is longer than the {MAX_SEQUENCE_LENGTH} tokens that PixArt-Sigma reads. Not "
                f"read: {' '.join(read.cut)!r}. Shorten the prompt."
            )
        for remark in remarks:
            logging.getLogger(__name__).warning(remark)
        add_notice("\n".join(remarks))
        tokens, options = read.tokens, tokenizer_options or {}
        tokens += [(PAD, 1.0, 0)] * options.get(f"{SECTION}_min_padding", 0)
        tokens += [(PAD, 1.0, 0)] * (options.get(f"{SECTION}_min_length", 0) - len(tokens))
        return Tokens({SECTION: [tokens if return_word_ids else [token[:2] for token in tokens]]})

    def is_plain(self, text: str, clean_caption: bool, tokens: dict) -> bool:
        """Whether the tokens are what the engine alone makes of the prompt's words: without weights,
        embeddings and options."""
        words = tokenize(self.patcher.tokenizer(), prepare_prompt(text, clean_caption))["input_ids"]
        words = words if len(words) <= MAX_SEQUENCE_LENGTH else [*words[: MAX_SEQUENCE_LENGTH - 1], words[-1]]
        return by_value(tokens) == {SECTION: [[(token, 1.0) for token in words]]}

    def truncated(self, text: str, clean_caption=False) -> str:
        """The words of a prompt that are cut off, or ""."""
        return " ".join(self._read(text, clean_caption, False).cut)

    def _read(self, text: str, clean_caption: bool, disable_weights: bool) -> _Read:
        text = prepare_around_embeddings(text, clean_caption)
        if clean_caption or disable_weights:
            parts = [(text, 1.0)]
        else:
            parts = weighted_parts(text)
        tokenizer = self.patcher.tokenizer()
        read = _Read(MAX_SEQUENCE_LENGTH - 1)  # one for the end token
        for word_id, (part, weight) in enumerate(parts, start=1):
            for piece in self._pieces(comfy.sd1_clip.unescape_important(part), read.remarks):
                if isinstance(piece, str):
                    self._add_words(read, piece, weight, word_id)
                else:
                    cut = f"embedding:{piece.name}"
                    read.add(list(piece.vectors), weight, word_id, lambda _, cut=cut: cut)
        read.tokens.append((tokenizer.eos_token_id, 1.0, 0))
        return read

    def _add_words(self, read: _Read, words: str, weight: float, word_id: int):
        tokenizer = self.patcher.tokenizer()
        found = tokenize(tokenizer, words, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in found["offset_mapping"]]
        read.add(found["input_ids"], weight, word_id, lambda room: words[starts[room] :])

    def _pieces(self, part: str, remarks: list[str]) -> Iterator["str | Named"]:
        """Words, and the embeddings between them; those that cannot be used are left out, with a remark."""
        start = 0
        for match in NAMED.finditer(part):
            yield part[start : match.start()].lower()
            found = find_embedding(match[1], self.patcher.width())
            start = match.end() - len(found.rest)
            if found.vectors is None:
                remarks.append(found.remark)
            else:
                yield found
        yield part[start:].lower()

    def untokenize(self, tokens):
        def name(token) -> str:
            if isinstance(token, torch.Tensor):
                return "embedding"
            return self.patcher.tokenizer().convert_ids_to_tokens(token)

        return [(token, name(token[0])) for token in tokens]

    def decode(self, token_ids, skip_special_tokens=True) -> str:
        return self.patcher.tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def state_dict(self):
        return {}
