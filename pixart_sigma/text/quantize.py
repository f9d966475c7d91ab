"""T5 written once in 8 or 4 bit, to be loaded as it is from then on."""

import shutil
import tempfile
from pathlib import Path

from ..choices import DEFAULT_T5_PRECISION, QUANTIZED
from ..errors import SigmaError
from .encoder import TextEncoder


def quantize_t5(source, out, precision: str = DEFAULT_T5_PRECISION, tokenizer=None) -> None:
    """Quantise a T5 encoder once and write it as a folder that TextEncoder.load(out) reads as it is.

    out holds config.json and model*.safetensors, out/tokenizer the tokenizer. It is written beside and then
    renamed; 4-bit weights are saved before they ever run, because a CPU call repacks them. Raises SigmaError
    when out exists and is not an empty folder, when the precision is not int8, nf4 or fp4, or when source is
    already quantised in another one.
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
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        encoder.model.save_pretrained(beside)
        encoder.tokenizer.save_pretrained(beside / "tokenizer")
        beside.chmod(0o755)
        if out.exists():
            out.rmdir()  # empty; Windows does not rename onto a folder
        beside.replace(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
