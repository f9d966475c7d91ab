"""T5 in each precision and place: its bytes and seconds, of loading and of a prompt of 300 tokens."""

import gc
from functools import partial

import torch
from measuring import least_seconds, measured

from pixart_sigma.devices import half_precision
from pixart_sigma.text import streaming
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.needs import EncoderShapes

from .scale import PROMPT, Job

# (what, the folder, the precision, whether it is streamed and reads its file at each prompt)
WAYS = (
    ("int8, from a file in int8", "t5_int8", "int8", "resident"),
    ("bf16", "text_encoder", "bf16", "resident"),
    ("bf16, streamed", "text_encoder", "bf16", "pinned"),
    ("int8, streamed", "t5_int8", "int8", "pinned"),
    ("nf4", "text_encoder", "nf4", "resident"),
    ("int8, from bf16", "text_encoder", "int8", "resident"),
    ("bf16, streamed from the file", "text_encoder", "bf16", "mapped"),
    ("fp4", "text_encoder", "fp4", "resident"),
)


def measure(job: Job) -> None:
    expected = None
    for what, folder, precision, place in WAYS:
        with job.report.attempt(f"T5 in {what}"):
            found = one(job, what, folder, precision, place)
            if what == "bf16":
                expected = found
            elif expected is not None and folder == "text_encoder":
                cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
                job.report.add(f"T5 in {what}: least cosine to bf16", float(cosine.min()), "")
        gc.collect()
    copies(job)


@torch.no_grad()
def one(job: Job, what: str, folder: str, precision: str, place: str) -> torch.Tensor:
    """The embeddings (n, C) that it gives, in RAM and float32."""
    path = job.folder / folder
    spare, streaming.SPARE_RAM = streaming.SPARE_RAM, 10**15 if place == "mapped" else streaming.SPARE_RAM
    try:
        load = partial(
            TextEncoder.load,
            path,
            job.folder / "tokenizer",
            precision,
            job.device,
            stream=place != "resident",
        )
        encoder, seconds, loading = measured(load, job.device)
    finally:
        streaming.SPARE_RAM = spare
    needs = EncoderShapes.read(path).needs(
        precision, "stream" if encoder.is_streamed else "auto", half_precision(job.device)
    )
    encoded, _, working = measured(lambda: encoder.encode(PROMPT), job.device)
    weights = 0 if encoder.is_streamed else encoder.nbytes
    if job.device.type == "cuda":
        job.report.size(f"T5 in {what}: peak", max(loading, weights + working), needs.peak)
        job.report.size(f"T5 in {what}: peak of loading alone", loading)
    else:
        job.report.size(f"T5 in {what}: peak", weights + working, needs.peak)
    job.report.size(f"T5 in {what}: weights", encoder.nbytes, needs.weights)
    job.report.add(f"T5 in {what}: loading", seconds, "s")
    prompt = least_seconds(lambda: encoder.encode(PROMPT), job.device, job.scale.rounds)
    job.report.add(f"T5 in {what}: a prompt", prompt, "s")
    return encoded.prompt_embeds[0].float().cpu()


def copies(job: Job) -> None:
    """What streaming can come to at best: bytes in a second from pinned RAM."""
    if job.device.type != "cuda":
        return
    with job.report.attempt("copy from pinned RAM"):
        waits = torch.empty(2**29, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(waits, device=job.device)
        seconds = least_seconds(lambda: there.copy_(waits, non_blocking=True), job.device, 5)
        job.report.add("copy from pinned RAM", waits.nbytes / 1e9 / seconds, "GB/s")
