"""What each stage needs in memory at the published shapes, counted in a run, beside what `plan` predicts.

    python benchmarks/stage_memory.py [--size 1024x1024] [--precisions int8 nf4 bf16] [--budget 3GB]
                                      [--folder FOLDER]

PixArt-Sigma-XL-2, T5-XXL and the SDXL VAE with random weights, 11.5 GB, are written to --folder and read
from there the next time; without it to a temporary one. It runs on the CPU, where the transformer and the VAE
compute in fp32 and T5 in its precision. Bytes are those of the live tensors at the peak of a stage; of T5
once it is loaded, because what it is quantised from is memory-mapped. T5 reads 300 tokens, the transformer
does one guided step, and the VAE decodes as a whole; then both run once more as planned for --budget.
Gate: each peak within 10 % of the plan's.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixart_sigma import DEMO
from pixart_sigma.aspect_ratio import parse_size
from pixart_sigma.memory.measure import peak_bytes, readable
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.planner import Models
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text.embeddings import PromptEmbeddings
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.needs import T5_XXL
from pixart_sigma.transformer.network import build_transformer
from pixart_sigma.vae.loading import SDXL_VAE

PROMPT = "red " * 400  # more than the 300 tokens that are read
ROOMY = 10**12
TOLERANCE = 0.1


def write_models(folder: Path):
    """A pipeline folder of the published shapes, in bf16; a part that is there already stays."""
    models = Models.published()
    with torch.device("meta"):
        transformer = build_transformer(models.transformer)
    settings = json.loads((DEMO / "transformer/config.json").read_text())
    settings |= {name: value for name, value in asdict(models.transformer).items() if name in settings}
    write_part(folder / "transformer", transformer.state_dict(), settings)
    write_part(folder / "vae", models.vae.state_dict(), SDXL_VAE | {"scaling_factor": 0.13025})
    settings = json.loads((DEMO / "text_encoder/config.json").read_text())
    write_part(folder / "text_encoder", models.text_encoder.weights, settings | T5_XXL)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(DEMO / name, folder / name, dirs_exist_ok=True)
    shutil.copy(DEMO / "model_index.json", folder)


def write_part(folder: Path, weights: dict[str, torch.Tensor], settings: dict):
    """Files of at most a few hundred MB each, with an index; the numbers repeat."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(weight.numel() for weight in weights.values())
    numbers = torch.empty(largest, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
    name = "model" if "d_model" in settings else "diffusion_pytorch_model"
    shards, size = [{}], 0
    for key, weight in weights.items():
        if size > 1e9:
            shards.append({})
            size = 0
        shards[-1][key] = weight.shape
        size += weight.numel() * 2
    index = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"{name}-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {key: numbers[: shape.numel()].view(shape).clone() for key, shape in shapes.items()},
            folder / file,
            metadata={"format": "pt"},  # without which transformers and diffusers refuse it
        )
        index |= dict.fromkeys(shapes, file)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(settings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--precisions", nargs="+", default=["int8", "nf4", "bf16"])
    parser.add_argument("--budget", type=float, default=3.0, help="GB for the second run")
    parser.add_argument("--folder", type=Path, help="where the models are kept")
    arguments = parser.parse_args()
    width, height = parse_size(arguments.size)
    settings = Settings(width=width, height=height, steps=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        write_models(folder)
        print("| stage | weights | peak | predicted | peak over predicted |\n|---|---|---|---|---|")
        passed = True
        for precision in arguments.precisions:
            pipeline = SigmaPipeline.from_path(
                folder, Ways(device="cpu", t5_precision=precision, measure=True)
            )
            planned = pipeline.plan(settings, replace(pipeline.ways, budget=ROOMY)).stages["text encoder"]
            encoder = TextEncoder.load(folder, precision=precision)
            weights = encoder.nbytes
            peak = weights + peak_bytes(encoder.device, partial(encoder.encode, PROMPT))
            passed &= row(f"T5-XXL in {precision}", weights, peak, planned)
            prompt_embeds = encoder.encode(PROMPT).prompt_embeds
            del encoder
        embeddings = PromptEmbeddings(prompt_embeds, prompt_embeds, PROMPT, PROMPT)
        pipeline = replace(pipeline, components=replace(pipeline.components, text_encoder=None))
        for budget in (ROOMY, arguments.budget * 1e9):
            made = pipeline.plan(settings, replace(pipeline.ways, budget=budget))
            pipeline.generate(settings, made.ways, embeddings=embeddings)
            for name in ("transformer", "VAE decode"):
                planned = made.stages[name]
                cost = pipeline.stages.costs[name]
                passed &= row(f"{name}, {planned.how}", cost.weights, cost.peak - cost.before, planned)
    return 0 if passed else 1


def row(name: str, weights: int, peak: int, planned) -> bool:
    print(
        f"| {name} | {readable(weights)} | {readable(peak)} | {readable(planned.peak)} "
        f"| {peak / planned.peak:.3f} |",
        flush=True,
    )
    return abs(peak / planned.peak - 1) <= TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
