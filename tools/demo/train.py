"""Train the demo model from nothing, on a CPU, on pictures drawn by drawings.py.

    python tools/demo/train.py vae          an AutoencoderKL with the SDXL VAE's four levels
    python tools/demo/train.py text         T5 alone: it learns to tell what a caption says of what
    python tools/demo/train.py transformer  T5 and the Sigma transformer together, small pictures first
    python tools/demo/train.py export       pixart_sigma/demo in the published folder layout, fp16
    python tools/demo/train.py restore      checkpoints from pixart_sigma/demo, to train it further

Each stage resumes from its own checkpoint in --work and may be stopped at any time. What comes after the
export, on the transformer alone, is in fine_tune.py.
"""

import argparse
import random
from pathlib import Path

import torch
from batches import LARGE, MIDDLE, SMALL, Batches, crops
from checkpoints import Steps, averaged, log, resume, save
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from drawings import caption, random_scene, render
from losses import diffusion_loss, reconstruction_loss
from networks import (
    SCALING_FACTOR,
    Reader,
    encode_texts,
    freeze_ends,
    initialise,
    make_tokenizer,
    new_schedule,
    new_text_encoder,
    new_transformer,
    new_vae,
    start_linear,
)
from safetensors.torch import load_file
from torch import nn

# Small pictures first and ever larger ones, the paper's weak-to-strong: (last step, sizes as width x height).
STAGES = (
    (5900, SMALL),
    (7300, SMALL[:1] + MIDDLE),
    (9800, MIDDLE[:1] + LARGE),
    (14800, MIDDLE),
    (18000, MIDDLE[:1] + LARGE),
    (33000, LARGE[:2] + LARGE),
)
VAE_CROP_STEPS = 1000
LEARNING_RATE = 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=("vae", "text", "transformer", "export", "restore"))
    parser.add_argument("--work", type=Path, default=Path("demo_training"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "pixart_sigma" / "demo")
    parser.add_argument("--step", type=int, default=0, help="restore: the step to go on from")
    parser.add_argument("--vae-steps", type=int, default=2800)
    parser.add_argument("--text-steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    {
        "vae": train_vae,
        "text": train_text_encoder,
        "transformer": train_transformer,
        "export": export,
        "restore": restore,
    }[arguments.stage](arguments)


def train_vae(arguments):
    torch.manual_seed(0)
    vae = new_vae()
    start_linear(vae)
    average = averaged(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    total = arguments.vae_steps
    steps = Steps(arguments.work / "vae.pt", total, vae=vae, average=average, optimizer=optimizer)
    rng = random.Random(steps.done)
    for step in steps:
        if step < VAE_CROP_STEPS:
            set_rate(optimizer, 2e-3, step, VAE_CROP_STEPS)
            pictures = crops(16, 32, rng)
        else:
            freeze_ends(vae)
            # Flat pictures: each weight's error shifts every pixel alike, so the steps must be small.
            set_rate(optimizer, 3e-4, step - VAE_CROP_STEPS, total - VAE_CROP_STEPS)
            size, count = rng.choice(((64, 4), (96, 2), (128, 1)))
            pictures = render([random_scene(rng) for _ in range(count)], size, size, rng)
        # Noise of a fixed size stands for the posterior's: the latents grow to be heard above it.
        latents = vae.encode(pictures).latent_dist.mean
        output = vae.decode(latents + 0.05 * torch.randn_like(latents)).sample
        loss = reconstruction_loss(output, pictures) + 1e-3 * latents.square().mean()
        apply(loss, optimizer, vae.parameters())
        average.update_parameters(vae)
        if (step + 1) % 100 == 0:
            steps.tell(f"loss {loss.item():.4f}, average {psnr(average.module):.1f} dB")
    vae = average.module
    normalise_latents(vae, rng)
    save(arguments.work / "vae_final.pt", steps.done, vae=vae)


@torch.no_grad()
def psnr(vae: AutoencoderKL) -> float:
    """Mean over eight whole pictures, in dB."""
    rng = random.Random(7)
    pictures = render([random_scene(rng) for _ in range(8)], 128, 128, rng)
    output = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * (4 / (output - pictures).square().mean((1, 2, 3))).log10()).mean().item()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, rng: random.Random):
    """Fold the mean and scale of the latents into the 1x1 convolutions around them.

    After it, latents x scaling_factor have mean 0 and deviation 1 per channel.
    """
    pictures = torch.cat([render([random_scene(rng) for _ in range(16)], 128, 128, rng) for _ in range(16)])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(16)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    factor = 1 / (deviation * SCALING_FACTOR)
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight /= factor[None, :, None, None]
    before = vae.quant_conv
    before.weight[:4] *= factor[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - mean) * factor
    before.weight[4:] = 0
    before.bias[4:] = 2 * (0.05 * factor).mean().log()


def train_text_encoder(arguments):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(arguments.work)
    text_encoder = new_text_encoder(tokenizer)
    modules = nn.ModuleDict({"text_encoder": text_encoder, "reader": Reader(text_encoder.config.d_model)})
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    path, total = arguments.work / "text_encoder.pt", arguments.text_steps
    steps = Steps(path, total, modules=modules, optimizer=optimizer)
    rng = random.Random(steps.done)
    for step in steps:
        set_rate(optimizer, LEARNING_RATE, step, total)
        scenes = [random_scene(rng) for _ in range(128)]
        hidden, mask = encode_texts(tokenizer, text_encoder, [caption(scene, rng) for scene in scenes])
        loss = modules["reader"](hidden, mask, scenes)
        apply(loss, optimizer, modules.parameters())
        if (step + 1) % 50 == 0:
            steps.tell(f"reading {loss.item():.4f}")


def train_transformer(arguments):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(arguments.work)
    vae = new_vae()
    resume(arguments.work / "vae_final.pt", vae=vae)
    vae.requires_grad_(False)
    text_encoder, transformer = new_text_encoder(tokenizer), new_transformer()
    initialise(transformer)
    reader = Reader(text_encoder.config.d_model)
    read = nn.ModuleDict({"text_encoder": text_encoder, "reader": reader})
    if not resume(arguments.work / "text_encoder.pt", modules=read):
        raise SystemExit("Train T5 first: python tools/demo/train.py text")
    modules = nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})
    average = averaged(modules)
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    reader_optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE)
    path, total = arguments.work / "transformer.pt", STAGES[-1][0]
    steps = Steps(path, total, modules=modules, average=average, optimizer=optimizer)
    schedule, batches, losses = new_schedule(), Batches(vae, random.Random(steps.done)), []
    for step in steps:
        size, latents, texts, scenes = batches.next(next(sizes for last, sizes in STAGES if step < last))
        set_rate(optimizer, LEARNING_RATE, step, total)
        hidden, mask = encode_texts(tokenizer, text_encoder, texts)
        loss = diffusion_loss(transformer, schedule, latents, hidden, mask)
        spoken = [row for row, text in enumerate(texts) if text]
        reading = reader(hidden[spoken], mask[spoken], [scenes[row] for row in spoken])
        reader_optimizer.zero_grad()
        apply(loss + 0.02 * reading, optimizer, modules.parameters())
        reader_optimizer.step()
        average.update_parameters(modules)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / len(losses[-50:])
            steps.tell(f"{size}: loss {mean:.4f}, reading {reading.item():.3f}")


def set_rate(optimizer, peak, step, total):
    """A short warm-up, the peak, and a straight way down over the last 40 %."""
    rate = peak * min(1, (step + 1) / 100, 0.02 + (total - step) / (0.4 * total))
    for group in optimizer.param_groups:
        group["lr"] = rate


def apply(loss, optimizer, parameters):
    parameters = list(parameters)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def export(arguments):
    tokenizer = make_tokenizer(arguments.work)
    vae = new_vae()
    resume(arguments.work / "vae_final.pt", vae=vae)
    average = averaged(
        nn.ModuleDict({"text_encoder": new_text_encoder(tokenizer), "transformer": new_transformer()})
    )
    step = resume(arguments.work / "transformer.pt", average=average)
    PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=average.module["text_encoder"].half(),
        vae=vae.half(),
        transformer=average.module["transformer"].half(),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(arguments.out)
    # The published folders have spiece.model and no tokenizer.json.
    (arguments.out / "tokenizer" / "tokenizer.json").unlink()
    spiece = arguments.out / "tokenizer" / "spiece.model"
    spiece.write_bytes((arguments.work / "tokenizer" / "spiece.model").read_bytes())
    for file in arguments.out.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    log(f"exported step {step} to {arguments.out}, {size / 1e6:.2f} MB")


def restore(arguments):
    """The exported weights as the checkpoints of every stage; the optimizers start anew."""
    arguments.work.joinpath("tokenizer").mkdir(exist_ok=True)
    spiece = arguments.out / "tokenizer" / "spiece.model"
    (arguments.work / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
    tokenizer = make_tokenizer(arguments.work)
    vae, text_encoder, transformer = new_vae(), new_text_encoder(tokenizer), new_transformer()
    for model, file in (
        (vae, "vae/diffusion_pytorch_model.safetensors"),
        (text_encoder, "text_encoder/model.safetensors"),
        (transformer, "transformer/diffusion_pytorch_model.safetensors"),
    ):
        missing, left_over = model.load_state_dict(load_file(arguments.out / file), strict=False)
        # T5's embedding is stored once and known by two names; positions are computed.
        assert not left_over and set(missing) <= {"encoder.embed_tokens.weight", "pos_embed.pos_embed"}, (
            missing
        )
    save(arguments.work / "vae_final.pt", arguments.step, vae=vae)
    modules = nn.ModuleDict({"text_encoder": text_encoder, "reader": Reader(text_encoder.config.d_model)})
    save(arguments.work / "text_encoder.pt", arguments.step, modules=modules)
    modules = nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})
    average = averaged(modules)
    average.n_averaged.fill_(arguments.step)
    save(arguments.work / "transformer.pt", arguments.step, modules=modules, average=average)


if __name__ == "__main__":
    main()
