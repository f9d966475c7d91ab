"""Fine-tune the exported demo, and make the transformer with KV compression; T5 and the encoder stay.

    python tools/demo/fine_tune.py refine      once more: outlines, small shapes, stars
    python tools/demo/fine_tune.py guidance    for guidance 4.5: it imitates itself, mildly guided
    python tools/demo/fine_tune.py correct     on its own mistakes: its pictures as they should have been
    python tools/demo/fine_tune.py decoder     the VAE's decoder, on its pictures as they should have been
    python tools/demo/fine_tune.py kv          with KV compression in the deeper half: it imitates the other
    python tools/demo/fine_tune.py correct-kv  the compressed one on its own mistakes
    python tools/demo/fine_tune.py phased      in four steps without guidance, into the folder --work
    python tools/demo/fine_tune.py control     a ControlNet that follows outlines, into the folder --work

Each but the last two replaces the weights in pixart_sigma/demo or demo_kv at its end, resumes from its own
checkpoint in --work and may be stopped at any time. With more processes a step has as many times the
pictures: torchrun --nproc-per-node 2 tools/demo/fine_tune.py refine. On Linux MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=8000000000 keeps freed buffers for the next step, which made kv twice as fast.
"""

import argparse
import copy
import dataclasses
import json
import os
import random
from functools import partial
from pathlib import Path

import torch
from batches import LARGE, Batches, hard_scene
from checkpoints import Steps, averaged, rank, write_weights
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from losses import (
    GUIDANCE,
    balanced_error,
    correction_loss,
    decoding_loss,
    diffusion_loss,
    imitation_loss,
    mild_guidance,
    visibility,
)
from networks import encode_texts, freeze_ends, new_schedule, new_transformer
from outlines import OutlinedPictures, control_loss, new_controlnet, outline_sizes
from own_pictures import OwnPictures, Runs
from phases import Phases, phase_loss
from safetensors.torch import load_file
from transformers import T5EncoderModel, T5Tokenizer

from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
from pixart_sigma.transformer.config import KVWeights
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.network import build_transformer

# The trained KV compression: the deeper half of the layers, 2x2 tokens.
KV_LAYERS, KV_RATIO = (2, 3, 4), 2
KV_FASTER = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "stage", choices=("refine", "guidance", "correct", "decoder", "kv", "correct-kv", "phased", "control")
    )
    parser.add_argument("--work", type=Path, default=Path("demo_training"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "pixart_sigma" / "demo")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=3e-4, help="the learning rate it starts from")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16: faster where the CPU can")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:  # started by torchrun
        torch.distributed.init_process_group("gloo")
    {
        "refine": train_refine,
        "guidance": train_guidance,
        "correct": train_correct,
        "decoder": train_decoder,
        "kv": train_kv,
        "correct-kv": train_correct_kv,
        "phased": train_phased,
        "control": train_control,
    }[arguments.stage](arguments)


def fine_tune(arguments, network, loss, make_batches=None, sizes=lambda part: LARGE[:2] + LARGE):
    """The average over --steps of a network whose trained parameters require gradients.

    make_batches(vae, rng, encode) has a method next(sizes), which gives (size, batch, texts, ...): drawn
    pictures by default, hard ones twice as often. sizes(part) are those when this part of the steps is done.
    loss(schedule, batch, texts, encode) is a tensor; encode(texts) the pair of T5's hidden states and mask.
    """
    tokenizer = T5Tokenizer.from_pretrained(arguments.out / "tokenizer", extra_ids=0)
    text_encoder = T5EncoderModel.from_pretrained(arguments.out / "text_encoder", dtype=torch.float32)
    text_encoder.requires_grad_(False)
    vae = load_vae(arguments.out)
    network.train()
    average = averaged(network)
    adamw, muon = optimizers(network)
    path, total = arguments.work / f"{arguments.stage}.pt", arguments.steps
    steps = Steps(path, total, network=network, average=average, adamw=adamw, muon=muon)
    seed = 2 * steps.done + rank()
    torch.manual_seed(seed)

    def encode(texts):
        return encode_texts(tokenizer, text_encoder, texts)

    make_batches = make_batches or (lambda vae, rng, _: Batches(vae, rng, first=48, draw=hard_scene))
    batches = make_batches(vae, random.Random(seed), encode)
    schedule, losses = new_schedule(), []
    for step in steps:
        for group in adamw.param_groups + muon.param_groups:
            group["lr"] = arguments.rate * group["times"] * min((step + 1) / 100, 1 - step / total)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            size, batch, texts, *_ = batches.next(sizes(step / total))
            error = loss(schedule, batch, texts, encode)
        network.zero_grad()
        error.backward()
        share_gradients(network)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        muon.step()
        average.update_parameters(network)
        losses.append(error.item())
        if (step + 1) % 50 == 0:
            steps.tell(f"{size}: loss {sum(losses[-50:]) / len(losses[-50:]):.5f}")
    if rank():
        raise SystemExit
    return average.module


def share_gradients(network):
    """Every process goes on with the mean of all their gradients."""
    if not torch.distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def optimizers(network) -> tuple[torch.optim.AdamW, torch.optim.Muon]:
    """Muon for the matrices of a transformer's layers, at AdamW's rates (arXiv 2502.16982), else AdamW.

    After 200 steps of `correct` the loss was 11 % below that of AdamW alone, from the same weights. The KV
    weights learn `KV_FASTER` times as fast: each starts as one of four in an average and has far to go.
    """
    kv, matrices, others = [], [], []
    for name, parameter in network.named_parameters():
        if ".attn1.sr." in name or ".attn1.norm." in name:
            kv.append(parameter)
        elif name.startswith("transformer_blocks.") and name.endswith(".weight"):
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": others, "times": 1}, {"params": kv, "times": KV_FASTER}]
    groups = [group for group in groups if group["params"]]
    layers = [{"params": matrices, "times": 1}]
    return (
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(layers, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )


def train_refine(arguments):
    """Go on with the exported transformer alone, all timesteps alike; in its place."""
    folder, transformer = arguments.out / "transformer", new_transformer()
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    transformer.load_state_dict({**transformer.state_dict(), **weights})

    def loss(schedule, latents, texts, encode):
        return diffusion_loss(transformer, schedule, latents, *encode(texts), error=balanced_error)

    write_weights(fine_tune(arguments, transformer, loss), folder)


def train_guidance(arguments):
    """Fine-tune the exported transformer so that guidance acts mildly on it; in its place."""
    folder = arguments.out / "transformer"
    transformer = load_trainable(folder)
    loss = imitation_loss(transformer, copy.deepcopy(transformer), mild_guidance)
    write_weights(fine_tune(arguments, transformer, loss), folder)


def train_correct(arguments):
    """Fine-tune the exported transformer on its own mistakes; in its place."""
    dense = arguments.out / "transformer"
    correct(arguments, load_trainable(dense), dense)


def train_correct_kv(arguments):
    """The same for the exported transformer with KV compression."""
    folder = kv_folder(arguments.out)
    correct(arguments, load_trainable(folder), folder)


def correct(arguments, student, folder: Path):
    """Half way between the weights before and after is what is exported (arXiv 2109.01903).

    After rounds of 8 states a step it draws better than either; after 1,000 steps of 16, as the later does.
    """
    before = copy.deepcopy(student)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(arguments.out / "scheduler")
    loss = correction_loss(
        student, load_network(arguments.out / "transformer"), visibility(load_vae(arguments.out))
    )
    corrected = fine_tune(arguments, student, loss, partial(Runs, student, scheduler))
    with torch.no_grad():
        for weights, earlier in zip(corrected.parameters(), before.parameters(), strict=True):
            weights.lerp_(earlier, 0.5)
    write_weights(corrected, folder)


def train_decoder(arguments):
    """Fine-tune the exported VAE's decoder on the transformer's pictures, and on drawn ones; in its place.

    The latents stay what they are. The tips of small stars and the edges between latents come out sharper,
    of the latents that the transformer gives too.
    """
    transformer = load_network(arguments.out / "transformer")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(arguments.out / "scheduler")
    vae = load_vae(arguments.out)
    vae.decoder.requires_grad_(True)
    freeze_ends(vae)

    def loss(schedule, batch, texts, encode):
        latents, wanted = batch
        return decoding_loss(vae.decode(latents).sample.float(), wanted)

    vae.decoder = fine_tune(arguments, vae.decoder, loss, partial(OwnPictures, transformer, scheduler))
    write_weights(vae, arguments.out / "vae")


def train_kv(arguments):
    """Fine-tune the exported transformer with KV compression in its deeper half, from plain averages on.

    Where it has been exported already, it goes on from there.
    """
    dense, exported = arguments.out / "transformer", kv_folder(arguments.out)
    student = load_trainable(exported) if exported.exists() else new_kv_transformer(dense)
    loss = imitation_loss(student, load_network(dense), lambda timestep: torch.full(timestep.shape, GUIDANCE))
    export_kv(fine_tune(arguments, student, loss), arguments.out)


def train_phased(arguments):
    """Distil the exported transformer to the recipe phased-4; a transformer folder in --work."""
    dense, folder = arguments.out / "transformer", arguments.work / "phased"
    student, teacher = load_trainable(dense), load_network(dense)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(arguments.out / "scheduler")
    batches = partial(Phases, student, teacher, scheduler)
    distilled = fine_tune(arguments, student, phase_loss(student), batches)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((dense / "config.json").read_text())
    write_weights(distilled, folder)


def train_control(arguments):
    """A ControlNet from copies of the exported transformer's blocks; a folder in --work."""
    dense, folder = arguments.out / "transformer", arguments.work / "control"
    transformer = load_network(dense)
    controlnet = new_controlnet(transformer)
    loss = control_loss(controlnet, transformer)
    trained = fine_tune(
        arguments, controlnet, loss, lambda vae, rng, _: OutlinedPictures(vae, rng), outline_sizes
    )
    folder.mkdir(exist_ok=True)
    heads = {"num_attention_heads": transformer.sigma_config.num_attention_heads}
    (folder / "config.json").write_text(json.dumps(heads) + "\n")
    write_weights(trained, folder)


def new_kv_transformer(dense: Path):
    """The engine's transformer with the dense weights, and KV weights that average as `mean` does.

    The network normalises what it has averaged (arXiv 2403.04692, section 2.3). Keys and values are not of
    unit length, so the norm's scale is set to theirs.
    """
    checkpoint = inspect(dense)
    config = dataclasses.replace(checkpoint.config, kv_compression=KVWeights(KV_RATIO, KV_LAYERS))
    transformer = build_transformer(config)
    weights = {name: tensor.float() for name, tensor in load_transformer_state_dict(checkpoint).items()}
    width = config.cross_attention_dim
    for layer in KV_LAYERS:
        attention = f"transformer_blocks.{layer}.attn1"
        # Tokens come in with unit variance, so a projection's rows say how long keys and values are.
        rows = torch.cat([weights[f"{attention}.to_{name}.weight"] for name in "kv"])
        weights[f"{attention}.sr.weight"] = torch.full((width, 1, KV_RATIO, KV_RATIO), KV_RATIO**-2.0)
        weights[f"{attention}.sr.bias"] = torch.zeros(width)
        weights[f"{attention}.norm.weight"] = torch.full((width,), float(rows.square().sum(1).mean().sqrt()))
        weights[f"{attention}.norm.bias"] = torch.zeros(width)
    transformer.load_state_dict(weights, assign=True)
    return transformer


def kv_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}_kv")


def export_kv(transformer, out: Path):
    """A transformer folder beside the demo's."""
    folder = kv_folder(out)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((out / "transformer" / "config.json").read_text())
    write_weights(transformer, folder)


def load_network(folder: Path) -> torch.nn.Module:
    """A transformer of the engine's, in fp32."""
    return load_transformer(inspect(folder), dtype=torch.float32)


def load_trainable(folder: Path) -> torch.nn.Module:
    return load_network(folder).requires_grad_(True)


def load_vae(out: Path) -> AutoencoderKL:
    """The demo's VAE, which stays as it is."""
    return AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).requires_grad_(False)


if __name__ == "__main__":
    main()
