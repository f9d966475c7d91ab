"""Graphs in the way of ComfyUI_ExtraModels, without that pack: files, prompts, and the models they name."""

import shutil
from pathlib import Path

import torch
from prompts import to_prompt
from safetensors.torch import save_file
from server import PACK

OLD_GRAPHS = sorted((PACK / "tests" / "host" / "old_graphs").glob("*.json"))
# What the pack's sources declare, in their order: its models are not looked at here, nor ours.
_STRING, _COMBO, _FLOAT = ["STRING", {}], ["COMBO", {"options": []}], ["FLOAT", {}]
_DECLARED = {
    "PixArtCheckpointLoader": ({"ckpt_name": _COMBO, "model": _COMBO}, ["MODEL"]),
    "PixArtCheckpointLoaderSimple": ({"ckpt_name": _COMBO}, ["MODEL"]),
    "PixArtResolutionSelect": ({"model": _COMBO, "ratio": _COMBO}, ["INT", "INT"]),
    "PixArtLoraLoader": ({"model": ["MODEL", {}], "lora_name": _COMBO, "strength": _FLOAT}, ["MODEL"]),
    "T5v11Loader": (
        dict.fromkeys(("t5v11_name", "t5v11_ver", "path_type", "device", "dtype"), _COMBO),
        ["T5"],
    ),
    "T5TextEncode": ({"text": _STRING, "T5": ["T5", {}]}, ["CONDITIONING"]),
    "PixArtT5TextEncode": ({"text": _STRING, "T5": ["T5", {}]}, ["CONDITIONING"]),
    "ExtraVAELoader": (dict.fromkeys(("vae_name", "vae_type", "dtype"), _COMBO), ["VAE"]),
}


def old_prompt(workflow: Path, object_info: dict) -> dict:
    """What a program that speaks to the host's API sends of it: the nodes of ExtraModels by their names."""
    known = {
        kind: {"input": {"required": inputs}, "input_order": {"required": list(inputs)}, "output": outputs}
        for kind, (inputs, outputs) in _DECLARED.items()
    }
    prompt = to_prompt(workflow, object_info | known)
    # As the frontend writes it; without, the host's replacing fails.
    return {key: entry | {"_meta": {"title": entry["class_type"]}} for key, entry in prompt.items()}


def place_old_models(models: Path):
    """The demo where ExtraModels looks for models, and a LoRA that changes it, in the host's folder."""
    demo = PACK / "pixart_sigma" / "demo"
    shutil.copytree(demo / "transformer", models / "checkpoints" / "pixart_sigma")
    shutil.copytree(demo / "text_encoder", models / "t5" / "t5-v1_1-xxl")
    shutil.copytree(demo / "tokenizer", models / "t5" / "t5-v1_1-xxl", dirs_exist_ok=True)
    shutil.copytree(demo / "vae", models / "vae" / "sdxl")
    (models / "loras").mkdir(exist_ok=True)
    torch.manual_seed(0)
    width = 192  # of the demo
    save_file(
        {
            f"base_model.model.transformer_blocks.{block}.attn1.to_v.{part}.weight": torch.randn(shape) / 8
            for block in range(3)
            for part, shape in (("lora_A", (4, width)), ("lora_B", (width, 4)))
        },
        models / "loras" / "old_lora.safetensors",
    )
