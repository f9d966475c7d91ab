"""Quantised transformers, adapters, a ControlNet, forecasts and a second transformer: what each costs."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from measuring import clock_of
from PIL import Image
from safetensors.torch import save_file

from pixart_sigma.choices import TRANSFORMER_FORMS
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text.embeddings import PromptEmbeddings
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.control_pictures import ControlPicture
from pixart_sigma.transformer.controlnet_file import build_controlnet
from pixart_sigma.transformer.converting import convert

from .scale import Job

FORMS = ("int8", "fp8", "q8_0")


@dataclass(frozen=True)
class Change:
    """What a run has that a plain one has not."""

    transformer: Path | None = None
    place: str = "auto"
    adapter: Path | None = None
    controlnet: Path | None = None
    refiner: Path | None = None
    speed: str | None = None


def measure(job: Job) -> None:
    made = job.folder / "made"
    made.mkdir(exist_ok=True)
    plain = None
    with job.report.attempt("as it is"):
        plain = run(job, "as it is", Change())
    forecast = "forecast:1:1:10-95%" if job.scale.steps > 4 else None
    changes = {
        "with forecasts": lambda: Change(speed=forecast),
        "with a LoRA of rank 16": lambda: Change(adapter=write_lora(job, made / "lora.safetensors")),
        "with a ControlNet": lambda: Change(controlnet=write_controlnet(job, made / "controlnet")),
        "with a second transformer": lambda: Change(refiner=job.folder / "transformer"),
    }
    for form in FORMS:
        for place in ("auto", "stream"):
            name = f"in {form}{', streamed' * (place == 'stream')}"
            changes[name] = partial(
                lambda form, place: Change(write_form(job, made, form), place), form, place
            )
    for name, make in changes.items():
        with job.report.attempt(name):
            run(job, name, make(), plain)


def run(job: Job, name: str, change: Change, plain: float | None = None) -> float:
    """The seconds of a run from embeddings to latents, loading apart, beside those of a `plain` one; its peak
    beside the plan's."""
    ways = Ways(device=str(job.device), measure=True, transformer_device=change.place, release="keep")
    pipeline = make_pipeline(job, ways, change)
    channels, side = job.scale.transformer.caption_channels, job.scale.usual
    embeds = torch.randn(1, 20, channels, generator=torch.Generator().manual_seed(0))
    embeddings = PromptEmbeddings(embeds, embeds[:, :1])
    settings = Settings(
        width=side,
        height=side,
        binning=False,
        steps=job.scale.steps,
        speed=change.speed,
        refiner_start=0.5 if change.refiner else None,
    )
    picture = Image.new("RGB", (side, side))
    controls = [ControlPicture(change.controlnet, picture, 0.5)] if change.controlnet else []
    ended = []

    def watch(step):
        ended.append(clock_of(job.device)())

    peaks = []
    for _ in range(2):  # the second finds everything loaded
        began = []
        pipeline.generate(
            settings,
            ways,
            embeddings=embeddings,
            controls=controls,
            callback=watch,
            on_stage=lambda stage, began=began: began.append(clock_of(job.device)()),
        )
        peaks.append(pipeline.stages.costs["transformer"])
    if change.place == "auto" and change.refiner is None:
        files = [change.controlnet] if change.controlnet else []
        plan = pipeline.plan(settings, replace(ways, budget=1e13), controlnets=files)
        peak = max(cost.peak - cost.before for cost in peaks)  # of the first, which loads
        job.report.size(f"{name}: peak", peak, plan.stages["transformer"].peak)
    seconds = ended[-1] - began[-2]  # from the transformer's stage on; the last is the decode's
    job.report.add(f"{name}: a run without the decode", seconds, "s", reference=plain)
    return seconds


def make_pipeline(job: Job, ways: Ways, change: Change) -> SigmaPipeline:
    pipeline = SigmaPipeline.from_path(
        job.folder, ways, transformer=change.transformer, variant="1024", needs_text_encoder=False
    )
    if change.adapter:
        pipeline = pipeline.with_adapters([change.adapter])
    return pipeline.with_refiner(change.refiner) if change.refiner else pipeline


def write_form(job: Job, folder: Path, form: str) -> Path:
    file = folder / f"{form}{TRANSFORMER_FORMS[form]}"
    if not file.exists():
        convert(inspect(job.folder / "transformer", "1024"), form, file)
    return file


def write_lora(job: Job, file: Path) -> Path:
    """Of all attention, as diffusers' trainers write it."""
    config = job.scale.transformer
    width, tensors = config.cross_attention_dim, {}
    for layer in range(config.num_layers):
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"):
            key = f"transformer.transformer_blocks.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.full((16, width), 0.001)
            tensors[f"{key}.lora_B.weight"] = torch.full((width, 16), 0.001)
    save_file(tensors, file)
    return file


def write_controlnet(job: Job, folder: Path) -> Path:
    """Half as many blocks as the transformer has."""
    config = replace(job.scale.transformer, num_layers=max(1, job.scale.transformer.num_layers // 2 - 1))
    folder.mkdir(exist_ok=True)
    weights = {
        name: torch.full(weight.shape, 0.001, dtype=torch.bfloat16)
        for name, weight in build_controlnet(config).state_dict().items()
    }
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(f'{{"num_attention_heads": {config.num_attention_heads}}}')
    return folder
