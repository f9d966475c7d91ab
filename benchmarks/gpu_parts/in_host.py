"""In a real ComfyUI: KSampler with our MODEL and with the host's own PixArt, the host's decodes and ours, and
the pack's import."""

import sys
import time
from functools import partial

import host
from measuring import least_seconds, measured

from .scale import Job


def measure(job: Job) -> None:
    host.enter(*(["--cpu"] if job.device.type == "cpu" else []))
    start = time.perf_counter()
    import comfy.sd

    import nodes

    took = time.perf_counter() - start
    loaded = set(sys.modules)
    start = time.perf_counter()
    host.load_pack()
    job.report.add("import of the pack", time.perf_counter() - start, "s", reference=took)
    early = [name for name in ("diffusers", "bitsandbytes") if name in set(sys.modules) - loaded]
    job.report.add("libraries that it imports too early", len(early), "")
    import torch

    with torch.inference_mode():
        with job.report.attempt("KSampler"):
            sample(job, comfy.sd, nodes)
        with job.report.attempt("VAE Decode"):
            decode(job, nodes)


def sample(job: Job, sd, nodes) -> None:
    import torch

    from pixart_sigma.transformer.checkpoint import inspect
    from pixart_sigma.transformer.converting import convert

    file = job.folder / "made" / "transformer_1024.safetensors"
    file.parent.mkdir(exist_ok=True)
    if not file.exists():
        convert(inspect(job.folder / "transformer", "1024"), "bf16", file)
    load_model = host.module("nodes.host.transformer").load_model
    channels, side = job.scale.transformer.caption_channels, job.scale.usual
    latent = {"samples": torch.zeros(1, 4, side // 8, side // 8)}
    for tokens in (60, 1):
        generator = torch.Generator().manual_seed(0)
        prompts = [[[torch.randn(1, n, channels, generator=generator), {}]] for n in (tokens, 1)]
        theirs = None
        for name, load in (("ComfyUI's own", sd.load_diffusion_model), ("ours", load_model)):
            with job.report.attempt(f"KSampler, {name}, {tokens} tokens"):
                if name == "ComfyUI's own":  # it knows the published widths alone
                    model = load(str(file))
                    if model is None:
                        raise RuntimeError("ComfyUI does not know a transformer of this shape")
                else:
                    model = load(file)
                call = partial(
                    nodes.KSampler().sample,
                    model,
                    0,
                    job.scale.steps,
                    4.5,
                    "dpmpp_2m",
                    "normal",
                    *prompts,
                    latent,
                )
                _, first, peak = measured(call, job.device)
                seconds = least_seconds(call, job.device, job.scale.rounds) / job.scale.steps
                what = f"KSampler, {name}, {tokens} and 1 tokens"
                job.report.add(
                    f"{what}: a step", seconds, "s", reference=theirs, note=f"the first run {first:.1f} s"
                )
                job.report.size(f"{what}: peak by torch's count", peak)
                theirs = theirs or seconds
                del model, call


def decode(job: Job, nodes) -> None:
    import torch

    vae = host.module("nodes.host.vae").load_vae(job.folder / "vae")
    ours = host.module("nodes.host.vae").decode
    for side, budget in job.scale.decode_budgets.items():
        latents = 0.18 * torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
        ways = {
            "ComfyUI's tiles": lambda latents=latents: nodes.VAEDecodeTiled().decode(
                vae, {"samples": latents}, 512
            )[0],
            "ours, whole": lambda latents=latents: ours(vae, latents, "whole"),
            "ours, strips": lambda latents=latents, budget=budget: ours(vae, latents, "strips", budget),
        }
        theirs = None
        for name, call in ways.items():
            with job.report.attempt(f"decode {side}x{side}, {name}"):
                _, _, peak = measured(call, job.device)
                seconds = least_seconds(call, job.device, 1)
                job.report.add(f"decode {side}x{side}, {name}: seconds", seconds, "s", reference=theirs)
                job.report.size(f"decode {side}x{side}, {name}: peak by torch's count", peak)
                theirs = theirs or seconds
