"""Whole runs from words to pictures against diffusers' PixArtSigmaPipeline on the same files."""

import gc

import torch
from measuring import measured

from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways

from .scale import PROMPT, Job


def measure(job: Job) -> None:
    reference = {}
    for name, run in (("plain", plain), ("model offload", model_offload), ("8 bit", eight_bit)):
        with job.report.attempt(f"diffusers, {name}"):
            reference[name] = run(job)
        free(job)
    ours = (
        ("all kept, T5 in bf16", {"t5_precision": "bf16", "release": "keep"}, "plain"),
        ("T5 in bf16, each freed", {"t5_precision": "bf16"}, "model offload"),
        ("T5 in bf16, each offloaded", {"t5_precision": "bf16", "release": "offload"}, "model offload"),
        ("T5 in int8, each freed", {"t5_precision": "int8"}, "8 bit"),
        ("T5 streamed, each freed", {"t5_precision": "bf16", "t5_device": "stream"}, "8 bit"),
    )
    for name, chosen, other in ours:
        with job.report.attempt(f"ours, {name}"):
            engine(job, name, chosen, reference.get(other))
        free(job)


def free(job: Job) -> None:
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()


def tell(job: Job, name: str, runs: list[tuple[float, int]], reference=None) -> tuple[float, int]:
    """The first run loads, and so has the peak; the second finds everything where the first has left it."""
    (first, peak), (second, again) = runs
    theirs, most = reference or (None, None)
    job.report.add(
        f"{name}: a run", second, "s", reference=theirs, note=f"the first, with loading, {first:.1f} s"
    )
    job.report.size(name + ": peak", max(peak, again), reference=None if most is None else most / 1e9)
    return second, max(peak, again)


def engine(job: Job, name: str, chosen: dict, reference) -> None:
    text = job.folder / ("t5_int8" if chosen["t5_precision"] == "int8" else "text_encoder")
    pipeline = SigmaPipeline.from_path(
        job.folder,
        Ways(device=str(job.device), **chosen),
        text_encoder=text,
        tokenizer=job.folder / "tokenizer",
    )
    side = job.scale.usual
    settings = Settings(PROMPT, width=side, height=side, binning=False, steps=job.scale.steps)
    runs = []
    for _ in range(2):
        _, seconds, peak = measured(lambda: pipeline.generate(settings), job.device)
        runs.append((seconds, peak))
    tell(job, f"ours, {name}", runs, reference)


def draw(job: Job, pipe, **prompt):
    side = job.scale.usual
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **(prompt or {"prompt": PROMPT}),
        width=side,
        height=side,
        num_inference_steps=job.scale.steps,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
    ).images[0]


def load(job: Job, **components):
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline.from_pretrained(job.folder, torch_dtype=job.dtype, **components)


def plain(job: Job):
    pipe, runs = None, []

    def run():
        nonlocal pipe
        pipe = pipe or load(job).to(job.device)
        return draw(job, pipe)

    for _ in range(2):
        _, seconds, peak = measured(run, job.device)
        runs.append((seconds, peak))
    return tell(job, "diffusers, plain", runs)


def model_offload(job: Job):
    if job.device.type != "cuda":
        raise RuntimeError("diffusers offloads from a GPU alone")
    pipe, runs = None, []

    def run():
        nonlocal pipe
        if pipe is None:
            pipe = load(job)
            pipe.enable_model_cpu_offload(device=job.device)
        return draw(job, pipe)

    for _ in range(2):
        _, seconds, peak = measured(run, job.device)
        runs.append((seconds, peak))
    return tell(job, "diffusers, model offload", runs)


def eight_bit(job: Job):
    """As its documentation has it for 8 GB: T5 in 8 bit encodes and is deleted, then the rest is loaded. It
    says `load_in_8bit=True` there, which transformers 5 takes in a BitsAndBytesConfig alone."""
    from transformers import BitsAndBytesConfig, T5EncoderModel

    def run():
        encoder = T5EncoderModel.from_pretrained(
            job.folder,
            subfolder="text_encoder",
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            device_map={"": job.device},
            dtype=job.dtype,
        )
        pipe = load(job, text_encoder=encoder, transformer=None, vae=None)
        with torch.no_grad():
            names = ("prompt_embeds", "prompt_attention_mask")
            encoded = pipe.encode_prompt(PROMPT, device=job.device)
        prompt = dict(zip((*names, *(f"negative_{name}" for name in names)), encoded, strict=True))
        del encoder, pipe
        free(job)
        pipe = load(job, text_encoder=None).to(job.device)
        return draw(job, pipe, negative_prompt=None, **prompt)

    runs = [measured(run, job.device)[1:] for _ in range(2)]
    return tell(job, "diffusers, 8 bit", runs)
