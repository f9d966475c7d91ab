"""What the terminal's commands check and read before anything is loaded. Each raises SigmaError."""

import math
import os
from pathlib import Path

from ..errors import SigmaError
from .options import T5_PRECISIONS


def check_settings(arguments):
    """What can be known to be wrong before torch is imported."""
    check_count(arguments.count)
    if arguments.budget and (arguments.decode != "auto" or arguments.decode_budget):
        raise SigmaError("--budget plans the decode too; give it, or --decode and --decode-budget.")
    check_steps(arguments.steps)
    check_guidance(arguments.guidance)
    if arguments.size and arguments.aspect:
        raise SigmaError("--size and --aspect both choose the size; give one of them.")
    check_seed(arguments.seed)


def check_count(count: int):
    if count < 1:
        raise SigmaError(f"--count is {count}; give 1 or more.")


def check_prompt(arguments):
    """One of PROMPT and --embeddings, and with the latter nothing that it already decides."""
    if arguments.embeddings is None:
        if arguments.prompt is None:
            raise SigmaError("There is nothing to draw; give a PROMPT, or --embeddings and a file of encode.")
        return
    decided = {
        "PROMPT": arguments.prompt is not None,
        "--negative": arguments.negative,
        "--clean-caption": arguments.clean_caption,
        "--text-encoder": arguments.text_encoder,
        "--t5-precision": arguments.t5_precision,
    }
    given = [name for name, value in decided.items() if value]
    if given:
        raise SigmaError(f"--embeddings brings encoded prompts; leave {' and '.join(given)} out.")


def check_steps(steps: int):
    if steps < 1:
        raise SigmaError(f"--steps is {steps}; give 1 or more.")


def check_seed(seed: int):
    if not 0 <= seed < 2**64:
        raise SigmaError(f"--seed is {seed}; give a whole number from 0 to 2^64 - 1.")


def check_guidance(guidance: float | None):
    if guidance is not None and not math.isfinite(guidance):
        raise SigmaError(f"--guidance is {guidance}; give a number such as 4.5.")


def parse_share(text: str) -> float:
    """0.05 from "5%" or "0.05"."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise SigmaError(f"--budget is {text!r}; give a share such as 5% or 0.05.")
    return share


def parse_precisions(text: str) -> tuple[str, str]:
    """("bf16", "int8") from "bf16,int8"."""
    names = tuple(part.strip() for part in text.split(","))
    if len(names) != 2 or names[0] == names[1] or not set(names) <= set(T5_PRECISIONS):
        raise SigmaError(
            f"--precisions is {text!r}; give two different ones of {', '.join(T5_PRECISIONS)}, such as "
            "bf16,int8."
        )
    return names


def read_prompts(path: str) -> tuple[str, ...]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SigmaError(f"{path} holds no prompt; write one in each line.")
    return prompts


def check_writable(path: Path):
    if path.is_dir():
        raise SigmaError(f"{path} is a folder; give a file name to write to.")
    if not path.parent.is_dir():
        raise SigmaError(f"{path.parent} is not a folder; make it first, or write elsewhere.")
    if not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise SigmaError(f"{path.parent} cannot be written to; choose another place with --out.")


def parse_timesteps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SigmaError(f"--timesteps is {text!r}; give whole numbers such as 999,749,499,249.") from None


def read_picture(path: str):
    """The picture as (3, H, W) in [0, 1], float32."""
    import numpy
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255
    except UnidentifiedImageError:
        raise SigmaError(
            f"{path} is not a picture that can be read; give a PNG, JPEG or WebP file."
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
