"""Which of the four sizes a checkpoint was trained for: all have the same weights but for their values."""

import math
import os
import re
from math import prod
from pathlib import Path

from ..choices import VARIANTS
from ..errors import CheckpointError

PIXELS = {name: sample_size * 8 for name, (sample_size, _) in VARIANTS.items()}
# In a name: the number of pixels of a side or thousands of them, also inside of a word.
SIZES = {"256": "256", "512": "512", "1024": "1024", "1k": "1024", "2048": "2K", "2k": "2K"}
# Words whose number is something else, before and behind it.
COUNTED = r"(?:steps?|epochs?|iters?|iterations?|ranks?|dims?|batch|bs|seeds?|runs?|ckpt|checkpoints?|lr)"
# What OneTrainer writes into each file of PixArt-Sigma, with positions of one shape for all sizes.
ONETRAINER = {
    "modelspec.architecture": "pixart-sigma",
    "modelspec.implementation": "https://github.com/PixArt-alpha/PixArt-sigma",
}


def find_variant(
    chosen: str | None, settings: dict, positions: tuple | None, metadata: dict, source: Path, file: Path
) -> tuple[str, str]:
    """A variant and what said so: "user", "config", "pos_embed", "metadata", "file name" or "default".

    settings: a config.json. positions: the shape of `pos_embed`. metadata: a safetensors file's. Raises
    CheckpointError for a config.json of another size.
    """
    if chosen is not None:
        return chosen, "user"
    if settings.get("sample_size") is not None:
        for name, (sample_size, _) in VARIANTS.items():
            if settings["sample_size"] == sample_size:
                return name, "config"
        known = ", ".join(str(sample_size) for sample_size, _ in VARIANTS.values())
        raise CheckpointError(
            f"The config of {source} says sample_size {settings['sample_size']!r}; "
            f"PixArt-Sigma has {known}. Choose the variant ({', '.join(VARIANTS)}) yourself."
        )
    if positions is not None and not ONETRAINER.items() <= metadata.items():
        patches = prod(positions[:-1])
        for name, (sample_size, _) in VARIANTS.items():
            if patches == (sample_size // 2) ** 2:
                return name, "pos_embed"
    if trained := variant_in_metadata(metadata):
        return trained, "metadata"
    named = variant_in_name(file.stem) or variant_in_name(source.name)
    if named is None and (os.path.isdir(source) or file.name.startswith("diffusion_pytorch_model")):
        named = variant_in_name(source.absolute().parent.name)
    return (named, "file name") if named else ("1024", "default")


def variant_in_metadata(metadata: dict[str, str]) -> str | None:
    """The variant of a resolution such as "1024x1024", "512" or "(512, 512)" (modelspec, sd-scripts)."""
    for key in ("modelspec.resolution", "ss_resolution"):
        sides = [int(side) for side in re.findall(r"\d+", metadata.get(key, ""))][:2]
        if sides and min(sides) > 0:
            side = math.sqrt(sides[0] * sides[-1])
            for name, pixels in PIXELS.items():
                if abs(side / pixels - 1) < 0.1:
                    return name
    return None


def variant_in_name(name: str) -> str | None:
    """The one variant that a name speaks of; a count of steps or epochs is none."""
    spaced = re.sub(r"(?<=[a-z\d])(?=[A-Z][a-z])", "_", name).lower()  # pixartSigma_2kFp16
    for count in (rf"(?<![a-z]){COUNTED}[-_= ]?\d+k?", rf"\d+k?[-_ ]?{COUNTED}(?![a-z])"):
        spaced = re.sub(count, " ", spaced)
    sizes = re.findall(
        r"(?<![\d.])(?:(?:256|512|1024|2048)(?!\d)|[12]k(?=fp|bf|px|pix|ms|x|[^a-z\d]|$))", spaced
    )
    found = {SIZES[size] for size in sizes}
    return found.pop() if len(found) == 1 else None
