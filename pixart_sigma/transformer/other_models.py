"""Models that are taken for PixArt-Sigma, and what to tell their owner."""

import os
from pathlib import Path

from ..errors import CheckpointError
from ..files.reading import read_json

ALPHA_KEYS = (
    "csize_embedder.",
    "ar_embedder.",
    "adaln_single.emb.resolution_embedder.",
    "adaln_single.emb.aspect_ratio_embedder.",
)
ALPHA_VAE_SCALE = 0.18215


def refuse_alpha(found: dict | str, source: Path) -> None:
    """Raise CheckpointError when a transformer's settings, or one of its keys, are those of PixArt-alpha."""
    if isinstance(found, str):
        if found.startswith(ALPHA_KEYS):
            raise _alpha(f"it has {found}", source)
    elif found.get("use_additional_conditions"):
        raise _alpha("its config.json says use_additional_conditions", source)


def refuse_alpha_pipeline(folder: Path) -> None:
    """Raise CheckpointError for a PixArt-alpha pipeline folder.

    Its class alone does not tell, early Sigma folders have it too; the VAE of Stable Diffusion 1 does.
    """
    index, vae = folder / "model_index.json", folder / "vae" / "config.json"
    if os.path.isfile(index) and os.path.isfile(vae):
        named, scale = read_json(index).get("_class_name"), read_json(vae).get("scaling_factor")
        if named == "PixArtAlphaPipeline" and scale == ALPHA_VAE_SCALE:
            raise _alpha(f"it has a VAE of scaling factor {scale}", folder)


def _alpha(reason: str, source: Path) -> CheckpointError:
    return CheckpointError(f"{source} is PixArt-alpha ({reason}), another model. Choose a PixArt-Sigma one.")


def refuse_quantized(quantization: str, source: Path) -> None:
    """Raise CheckpointError when a transformer is quantised; `quantization` says how, "" for plain."""
    if quantization:
        raise CheckpointError(
            f"{source} is a quantised PixArt-Sigma transformer ({quantization}), which is not read here. Use "
            "its weights in GGUF, in ComfyUI's scaled fp8, int8, mxfp8 or nvfp4, or in float32, float16 or "
            "bfloat16."
        )


def refuse_other_model(keys, source: Path) -> None:
    """Raise CheckpointError for weights that are not a PixArt transformer's nor known to be another's."""
    first = next(iter(keys), None)
    held = f"its first weight is {first}" if first else "it holds no weights"
    raise CheckpointError(f"{source} is not a PixArt-Sigma transformer: {held}. Choose another file.")
