"""T5 written once in 8 or 4 bit, to be loaded as it is from then on."""

from pathlib import Path

from safetensors import SafetensorError

from ..choices import DEFAULT_T5_PRECISION, QUANTIZED
from ..errors import SigmaError
from ..files.writing import folder_beside
from .encoder import TextEncoder


def quantize_t5(source, out, precision: str = DEFAULT_T5_PRECISION, tokenizer=None) -> None:
    """Quantise a T5 encoder once and write it as a folder that TextEncoder.load(out) reads as it is.

    out holds config.json and model*.safetensors, out/tokenizer the tokenizer. It is written whole or not at
    all; 4-bit weights are saved before they ever run, because a CPU call repacks them. Raises SigmaError
    when out exists and is not an empty folder or cannot be written, when the precision is not int8, nf4 or
    fp4, or when source is already quantised in another one.
    """
    out = Path(out)
    if precision not in QUANTIZED:
        raise SigmaError(f"Can not quantise to {precision!r}: use one of {', '.join(QUANTIZED)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SigmaError(
            f"{out} already exists and is not an empty folder. Choose another name or remove it."
        )

    encoder = TextEncoder.load(source, tokenizer, precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with folder_beside(out) as made:
            encoder.model.save_pretrained(made)
            encoder.tokenizer.save_pretrained(made / "tokenizer")
    except SafetensorError as error:  # which is no OSError, also of a full disk
        raise SigmaError(f"{out} cannot be written: {error}") from error
