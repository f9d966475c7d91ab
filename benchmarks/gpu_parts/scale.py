"""The sizes of a run of the GPU's benchmark, its models on disk, and what its parts are given."""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from stage_memory import write_part

from pixart_sigma import DEMO
from pixart_sigma.devices import pick_dtype
from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.text.needs import T5_XXL
from pixart_sigma.text.weights import expected_shapes
from pixart_sigma.transformer.config import XL_2, TransformerConfig
from pixart_sigma.transformer.network import build_transformer
from pixart_sigma.vae.loading import SDXL_VAE, build_vae

from .report import Report

PROMPT = "red " * 400  # more than the 300 tokens that are read


@dataclass(frozen=True)
class Scale:
    """The models by their shapes, and how much is done with them. sizes: sides of square pictures, in
    pixels. limits: (side, bytes) of whole runs. decode_budgets: bytes of decodes in strips, by the side."""

    transformer: TransformerConfig
    text_encoder: dict
    vae: dict
    sizes: tuple[int, ...]
    limits: tuple[tuple[int, float], ...]
    decode_budgets: dict[int, float]
    usual: int
    steps: int = 20
    rounds: int = 3


FULL = Scale(
    transformer=XL_2,
    text_encoder=T5_XXL,
    vae=SDXL_VAE,
    sizes=(1024, 512, 2048, 4096),
    # The README's rows.
    limits=((1024, 8e9), (1024, 1.6e9), (1024, 6e9), (1024, 4e9), (1024, 2e9), (2048, 2e9), (4096, 4e9)),
    decode_budgets={1024: 1.2e9, 2048: 2e9, 4096: 4e9},
    usual=1024,
)
# For trying all of it on a CPU.
TINY = Scale(
    transformer=replace(
        XL_2, num_layers=3, num_attention_heads=2, cross_attention_dim=144, caption_channels=128
    ),
    text_encoder=T5_XXL
    | {"d_model": 128, "d_ff": 256, "d_kv": 16, "num_heads": 8, "num_layers": 2}
    | {"vocab_size": 128},
    vae=SDXL_VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    sizes=(64,),
    limits=((64, 30e6),),
    decode_budgets={64: 2e6},
    usual=64,
    steps=2,
    rounds=1,
)
SCALES = {"full": FULL, "tiny": TINY}


@dataclass
class Job:
    """What a part is given: where it computes, at which scale, the folder of the models, and where its
    figures go."""

    device: torch.device
    scale: Scale
    folder: Path
    report: Report
    dtype: torch.dtype = field(init=False)

    def __post_init__(self):
        self.dtype = pick_dtype(self.device)

    def prompts(self, count: int = 1, tokens: int = 300) -> Prompts:
        """Random embeddings of `count` prompts and of an empty negative one."""
        generator = torch.Generator().manual_seed(1)
        width = self.scale.transformer.caption_channels
        embeds = torch.randn(count, tokens, width, generator=generator).to(self.device, self.dtype)
        return Prompts(embeds, negative_embeds=embeds[:1, :1])

    def latents(self, side: int, count: int = 1) -> torch.Tensor:
        """Noise for square pictures."""
        generator = torch.Generator().manual_seed(2)
        return torch.randn(count, 4, side // 8, side // 8, generator=generator).to(self.device)


def write_models(scale: Scale, folder: Path) -> None:
    """A pipeline folder of random weights in bf16, and T5 in int8 beside it; a part that is there already
    stays. Some 17 GB at the published shapes."""
    from transformers import T5Config

    with torch.device("meta"):
        transformer = build_transformer(scale.transformer)
    settings = json.loads((DEMO / "transformer/config.json").read_text())
    settings |= {name: value for name, value in asdict(scale.transformer).items() if name in settings}
    write_part(folder / "transformer", transformer.state_dict(), settings)
    vae = {"scaling_factor": 0.13025, "latent_channels": 4}
    write_part(folder / "vae", build_vae(scale.vae).state_dict(), scale.vae | vae)
    settings = json.loads((DEMO / "text_encoder/config.json").read_text()) | scale.text_encoder
    config = T5Config(**settings)
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in expected_shapes(config).items()}
    write_part(folder / "text_encoder", weights, config.to_dict())
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(DEMO / name, folder / name, dirs_exist_ok=True)
    shutil.copy(DEMO / "model_index.json", folder)
    write_int8(folder / "t5_int8", config, weights)


def write_int8(folder: Path, config, weights: dict[str, torch.Tensor]) -> None:
    """A T5 as `quantize-t5` writes it, of repeated random bytes."""
    from safetensors.torch import save_file

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(weight.numel() for weight in weights.values())
    numbers = torch.empty(largest, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
    integers = torch.randint(-127, 128, (largest,), dtype=torch.int8)
    made: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        is_int8 = weight.ndim == 2 and ".block." in key and ".wo." not in key and "relative" not in key
        source = integers if is_int8 else numbers
        made[key] = source[: weight.numel()].view(weight.shape).clone()
        if is_int8:
            made[key.removesuffix("weight") + "SCB"] = torch.full(weight.shape[:1], 0.02)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
