"""Models that are taken for PixArt-Sigma, and what to tell their owner."""

import os
from pathlib import Path

from ..errors import CheckpointError
from ..files.locating import read_json

ALPHA_KEYS = (
    "csize_embedder.",
    "ar_embedder.",
    "adaln_single.emb.resolution_embedder.",
    "adaln_single.emb.aspect_ratio_embedder.",
)
ALPHA_VAE_SCALE = 0.18215
ALPHA_PROMPT_TOKENS = 120  # PixArt-Sigma has 300
# In this order: a part of a key, and what has it.
MARKS = (
    ("lora_", "a LoRA"),
    (".lora_A.", "a LoRA"),
    ("encoder.block.0.layer.0.SelfAttention", "a T5 text encoder"),
    ("shared.weight", "a T5 text encoder"),
    ("text_model.encoder.", "a CLIP text encoder"),
    ("label_emb.0.0.weight", "SDXL"),
    ("add_embedding.linear_1", "SDXL"),
    ("input_blocks.0.0.weight", "Stable Diffusion"),
    ("down_blocks.0.attentions", "Stable Diffusion"),
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("double_blocks.0.", "Flux or a model like it"),
    ("decoder.conv_in.weight", "a VAE"),
    ("decoder.conv_out.weight", "a VAE"),
)


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


def refuse_alpha_prompt(null_caption, source: Path) -> None:
    """Raise CheckpointError when the training's null caption, (shape, dtype) or None, is PixArt-alpha's."""
    if null_caption is not None and null_caption[0][:1] == (ALPHA_PROMPT_TOKENS,):
        raise _alpha(f"it was trained on prompts of {ALPHA_PROMPT_TOKENS} tokens", source)


def _alpha(reason: str, source: Path) -> CheckpointError:
    return CheckpointError(f"{source} is PixArt-alpha ({reason}), another model. Choose a PixArt-Sigma one.")


def refuse_other_model(keys, source: Path) -> None:
    """Raise CheckpointError for a file without a PixArt transformer, by what its keys make it."""
    for mark, name in MARKS:
        if any(mark in key for key in keys):
            raise CheckpointError(f"{source} is {name}, not a PixArt-Sigma transformer. Choose another file.")
    first = next(iter(keys), None)
    held = f"its first weight is {first}" if first else "it holds no weights"
    raise CheckpointError(f"{source} is not a PixArt-Sigma transformer: {held}. Choose another file.")
