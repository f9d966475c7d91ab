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
import math
import os
import random
import time
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from drawings import COLORS, POSITIONS, RELATIONS, SHAPES, SIZES, Scene, caption, random_scene, render
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

SCALING_FACTOR = 0.13025
MAX_TOKENS = 300
# Patch-grid positions span [0, 32) as in every Sigma checkpoint: sample_size // 2 / scale.
SAMPLE_SIZE, INTERPOLATION_SCALE = 32, 0.5
# Small pictures first and ever larger ones, the paper's weak-to-strong: (last step, sizes as width x height).
SMALL = ((64, 64), (64, 64), (80, 48), (48, 80))
MIDDLE = ((128, 128), (128, 128), (144, 112), (112, 144), (160, 96), (96, 160))
LARGE = ((256, 256), (256, 256), (288, 224), (224, 288), (336, 192), (192, 336))
STAGES = (
    (5900, SMALL),
    (7300, SMALL[:1] + MIDDLE),
    (9800, MIDDLE[:1] + LARGE),
    (14800, MIDDLE),
    (18000, MIDDLE[:1] + LARGE),
    (33000, LARGE[:2] + LARGE),
)
# Patches in a batch: 128 of the smallest pictures, 8 of the largest.
PATCHES_PER_STEP = 2048
VAE_CROP_STEPS = 1000
LEARNING_RATE = 1e-3
BUFFER = 6000


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


# -- VAE ------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """Four levels, 96 wide where the last normalisation stands.

    Both ends of the VAE normalise in 32 groups just before their last convolution. A group of one channel
    loses the picture's mean colour, one of two keeps its sign alone; three channels let it through.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(96, 32, 32, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def start_linear(vae: AutoencoderKL):
    """Start as a chain of plain convolutions that passes colours; the residual blocks come in by learning.

    Before the two last normalisations, two opposite constants in each group of three channels let the third
    pass nearly linearly.
    """
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                # PyTorch's start shrinks the signal by sqrt(3) per layer; this one keeps it.
                module.weight *= 3**0.5
                module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight.zero_()
                module.to_out[0].bias.zero_()
        anchors = torch.tensor([0.0, 3.0, -3.0]).repeat(32)
        for resnet in (vae.encoder.mid_block.resnets[-1], vae.decoder.up_blocks[-1].resnets[-1]):
            resnet.conv2.bias += anchors


def freeze_ends(vae: AutoencoderKL):
    """Hold the constants and the last normalisations: they drift together and shift all colours at once."""
    vae.encoder.conv_norm_out.requires_grad_(False)
    vae.decoder.conv_norm_out.requires_grad_(False)
    vae.encoder.mid_block.resnets[-1].conv2.bias.requires_grad_(False)
    vae.decoder.up_blocks[-1].resnets[-1].conv2.bias.requires_grad_(False)


def crops(count: int, size: int, rng: random.Random) -> torch.Tensor:
    """Windows of larger pictures, so that most of them hold an edge; some are whole pictures."""
    scenes = [random_scene(rng) for _ in range(count)]
    if size >= 64 and rng.random() < 0.3:
        return render(scenes, size, size, rng)
    large = max(96, size * 2)
    pictures = render(scenes, large, large, rng)
    windows = []
    for picture in pictures:
        for _ in range(4):
            x, y = rng.randrange(large - size + 1), rng.randrange(large - size + 1)
            window = picture[:, y : y + size, x : x + size]
            if window.std() > 0.05:
                break
        windows.append(window)
    return torch.stack(windows)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on colours and on their differences to the neighbours, which keeps edges sharp."""
    loss = functional.l1_loss(output, target) + functional.mse_loss(output, target)
    for dimension in (2, 3):
        loss = loss + functional.l1_loss(output.diff(dim=dimension), target.diff(dim=dimension))
    return loss


@torch.no_grad()
def psnr(vae: AutoencoderKL) -> float:
    """Mean over eight whole pictures, in dB."""
    rng = random.Random(7)
    pictures = render([random_scene(rng) for _ in range(8)], 128, 128, rng)
    output = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * (4 / (output - pictures).square().mean((1, 2, 3))).log10()).mean().item()


def train_vae(arguments):
    torch.manual_seed(0)
    vae, path = new_vae(), arguments.work / "vae.pt"
    start_linear(vae)
    average = torch.optim.swa_utils.AveragedModel(vae, avg_fn=ema)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    step = resume(path, vae=vae, average=average, optimizer=optimizer)
    rng = random.Random(step)
    start, saved, total = time.time(), time.time(), arguments.vae_steps
    while step < total:
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
        step += 1
        if step % 100 == 0:
            minutes = (time.time() - start) / 60
            quality = psnr(average.module)
            log(f"vae {step}: loss {loss.item():.4f}, average {quality:.1f} dB, {minutes:.1f} min")
        if time.time() - saved > 60 or step == total:
            save(path, step, vae=vae, average=average, optimizer=optimizer)
            saved = time.time()
    vae = average.module
    normalise_latents(vae, rng)
    save(arguments.work / "vae_final.pt", step, vae=vae)


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


# -- Text and transformer -------------------------------------------------------------------------


def make_tokenizer(work: Path) -> T5Tokenizer:
    folder = work / "tokenizer"
    if not (folder / "spiece.model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        corpus = [caption(random_scene(rng), rng) for _ in range(4000)]
        corpus += ["abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?'\"()-/&%+ " + name for name in COLORS] * 40
        (work / "captions.txt").write_text("\n".join(corpus))
        sentencepiece.SentencePieceTrainer.train(
            input=str(work / "captions.txt"),
            model_prefix=str(folder / "spiece"),
            vocab_size=256,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
        )
        (folder / "spiece.vocab").unlink()
    return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def new_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
        )
    )
    look_at_neighbours(text_encoder)
    return text_encoder


@torch.no_grad()
def look_at_neighbours(text_encoder: T5EncoderModel):
    """Start with one head that reads the token before, one the token after, and one the four on each side.

    Word order enters T5 by these biases alone. From T5's own start, near zero, they take thousands of steps
    to grow, and until then the encoder knows which colours are named but not of what.
    """
    bias = text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before, after = slice(1, 5), slice(17, 21)  # rows of the distances 1 to 4
    bias.zero_()
    bias[before.start, 0] = bias[after.start, 1] = 5
    bias[before, 2] = bias[after, 2] = 3


def new_transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=5,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=192,
        caption_channels=128,
        sample_size=SAMPLE_SIZE,
        interpolation_scale=INTERPOLATION_SCALE,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
        attention_bias=True,
    )


def initialise(transformer: PixArtTransformer2DModel):
    """Zero gates and a zero head, as DiT starts (arXiv 2212.09748, section 3.2)."""
    for layer in (transformer.proj_out, transformer.adaln_single.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class Pictures:
    """Scenes with their latents: a part is drawn anew each time, the rest is met again in other words."""

    def __init__(self, vae: AutoencoderKL, size: tuple[int, int], capacity: int, draw=random_scene):
        self.vae, self.size, self.capacity, self.draw = vae, size, capacity, draw
        self.scenes, self.latents = [], torch.empty(capacity, 4, size[1] // 8, size[0] // 8)
        self.next = 0

    @torch.no_grad()
    def add(self, count: int, rng: random.Random):
        if not count:
            return
        scenes = [self.draw(rng) for _ in range(count)]
        latents = self.vae.encode(render(scenes, *self.size, rng)).latent_dist.mean * SCALING_FACTOR
        for scene, latent in zip(scenes, latents, strict=True):
            if len(self.scenes) < self.capacity:
                self.scenes.append(scene)
            else:
                self.scenes[self.next] = scene
            self.latents[self.next] = latent
            self.next = (self.next + 1) % self.capacity

    def batch(self, count: int, rng: random.Random):
        chosen = [rng.randrange(len(self.scenes)) for _ in range(count)]
        scenes = [self.scenes[row] for row in chosen]
        texts = ["" if rng.random() < 0.1 else caption(scene, rng) for scene in scenes]
        return self.latents[chosen], texts, scenes


class Reader(nn.Module):
    """Reads what a caption says by attention to its tokens, as the transformer does; used in training alone.

    Real T5 knows language before Sigma meets it. The transformer's error alone teaches this one the colours
    soon, but only very slowly what each was said of.
    """

    ANSWERS = (None, *COLORS, *SHAPES, *SIZES, *POSITIONS, *RELATIONS)

    def __init__(self, width: int):
        super().__init__()
        self.questions = nn.Parameter(torch.randn(10, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answer = nn.Linear(width, len(self.ANSWERS))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """Mean cross-entropy of the answers to ten questions about hidden (B, L, width)."""
        said = torch.tensor(
            [[self.ANSWERS.index(answer) for answer in self.facts(scene)] for scene in scenes]
        )
        questions = self.questions.expand(len(hidden), -1, -1)
        read = self.attention(questions, hidden, hidden, key_padding_mask=mask == 0, need_weights=False)[0]
        return functional.cross_entropy(self.answer(read).flatten(0, 1), said.flatten())

    @staticmethod
    def facts(scene: Scene) -> list[str | None]:
        facts = [scene.background, scene.relation]
        for thing in (*scene.objects, None)[:2]:
            facts += [thing.color, thing.shape, thing.size, thing.position] if thing else [None] * 4
        return facts


def train_text_encoder(arguments):
    torch.manual_seed(0)
    tokenizer, path = make_tokenizer(arguments.work), arguments.work / "text_encoder.pt"
    text_encoder = new_text_encoder(tokenizer)
    modules = torch.nn.ModuleDict(
        {"text_encoder": text_encoder, "reader": Reader(text_encoder.config.d_model)}
    )
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    step = resume(path, modules=modules, optimizer=optimizer)
    rng, start = random.Random(step), time.time()
    while step < arguments.text_steps:
        set_rate(optimizer, LEARNING_RATE, step, arguments.text_steps)
        scenes = [random_scene(rng) for _ in range(128)]
        hidden, mask = encode_texts(tokenizer, text_encoder, [caption(scene, rng) for scene in scenes])
        loss = modules["reader"](hidden, mask, scenes)
        apply(loss, optimizer, modules.parameters())
        step += 1
        if step % 50 == 0:
            log(f"text {step}: reading {loss.item():.4f}, {(time.time() - start) / 60:.1f} min")
            save(path, step, modules=modules, optimizer=optimizer)


def train_transformer(arguments):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(arguments.work)
    vae = new_vae()
    resume(arguments.work / "vae_final.pt", vae=vae)
    vae.requires_grad_(False)
    text_encoder, transformer = new_text_encoder(tokenizer), new_transformer()
    initialise(transformer)
    reader = Reader(text_encoder.config.d_model)
    if not resume(
        arguments.work / "text_encoder.pt",
        modules=torch.nn.ModuleDict({"text_encoder": text_encoder, "reader": reader}),
    ):
        raise SystemExit("Train T5 first: python tools/demo/train.py text")
    modules = torch.nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})
    average = torch.optim.swa_utils.AveragedModel(modules, avg_fn=ema)
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    reader_optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE)
    path = arguments.work / "transformer.pt"
    step = resume(path, modules=modules, average=average, optimizer=optimizer)
    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    batches, total = Batches(vae, random.Random(step)), STAGES[-1][0]
    start, saved, losses = time.time(), time.time(), []
    while step < total:
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
        step += 1
        losses.append(loss.item())
        if step % 50 == 0:
            mean = sum(losses[-50:]) / 50
            minutes = (time.time() - start) / 60
            log(
                f"transformer {step} {size}: loss {mean:.4f}, reading {reading.item():.3f}, {minutes:.1f} min"
            )
        if time.time() - saved > 90 or step == total:
            save(path, step, modules=modules, average=average, optimizer=optimizer)
            saved = time.time()


class Batches:
    """Captioned latents, of a size at random; the pictures of each size wait in a buffer."""

    def __init__(self, vae, rng, first=96, draw=random_scene):
        self.vae, self.rng, self.first, self.draw, self.buffers = vae, rng, first, draw, {}

    def next(self, sizes):
        """(size, latents, texts, scenes); a size that is not named any more is forgotten."""
        size = self.rng.choice(sizes)
        self.buffers = {kept: buffer for kept, buffer in self.buffers.items() if kept in sizes}
        if size not in self.buffers:
            self.buffers[size] = Pictures(self.vae, size, BUFFER, self.draw)
            for _ in range(self.first // 4):
                self.buffers[size].add(4, self.rng)
        # Encoding is dear, but with few pictures the model learns them by heart and not the shapes.
        fresh = 2.2 * 128**2 / (size[0] * size[1])
        self.buffers[size].add(int(fresh) + (self.rng.random() < fresh % 1), self.rng)
        count = PATCHES_PER_STEP * 16 * 16 // (size[0] * size[1])
        return size, *self.buffers[size].batch(count, self.rng)


def encode_texts(tokenizer, text_encoder, texts):
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return hidden, tokens.attention_mask


def diffusion_loss(transformer, schedule, latents, hidden, mask, error=None):
    """Noise prediction plus the variational bound for the learned variance (arXiv 2102.09672, eq. 15-16).

    error: how the noise prediction is judged; `weighted_error` by default.
    """
    noise, timestep = torch.randn_like(latents), spread_timesteps(len(latents))
    noisy = schedule.add_noise(latents, noise, timestep)
    output = transformer(
        noisy,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=timestep,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    predicted, variance = output.float().chunk(2, dim=1)
    products = schedule.alphas_cumprod
    current = products[timestep][:, None, None, None]
    simple = (error or weighted_error)(schedule, timestep, predicted, noise)
    previous = torch.where(timestep > 0, products[timestep - 1], 1.0)[:, None, None, None]
    beta = 1 - current / previous
    posterior = (beta * (1 - previous) / (1 - current)).clamp(min=1e-20)
    low, high = posterior.clamp(min=1e-6).log(), beta.log()
    fraction = (variance + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    scale = beta / ((1 - current) * (current / previous)).sqrt()
    difference = scale * (noise - predicted.detach())
    divergence = 0.5 * (
        log_variance - low + (low - log_variance).exp() - 1 + difference**2 * (-log_variance).exp()
    )
    return simple + 0.001 * divergence.mean()


def weighted_error(schedule, timestep, predicted, noise):
    """The squared error over the signal-to-noise ratio, within bounds: that of the predicted picture.

    What the words say is decided where there is nothing but noise, and the plain error is tiny there: without
    the weight, colours are drawn but not on what they were said of.
    """
    current = schedule.alphas_cumprod[timestep][:, None, None, None]
    weight = ((1 - current) / current).clamp(0.2, 300)
    return (weight * (predicted - noise).square()).mean()


def spread_timesteps(count: int) -> torch.Tensor:
    """One at random in each of `count` equal parts of the schedule: a batch sees all of it."""
    return ((torch.arange(count) + torch.rand(count)) * (1000 / count)).long()


# -- Export ---------------------------------------------------------------------------------------


def export(arguments):
    tokenizer = make_tokenizer(arguments.work)
    vae = new_vae()
    resume(arguments.work / "vae_final.pt", vae=vae)
    modules = torch.nn.ModuleDict(
        {"text_encoder": new_text_encoder(tokenizer), "transformer": new_transformer()}
    )
    average = torch.optim.swa_utils.AveragedModel(modules, avg_fn=ema)
    step = resume(arguments.work / "transformer.pt", average=average)
    from diffusers import PixArtSigmaPipeline

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
    from safetensors.torch import load_file

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
    modules = torch.nn.ModuleDict(
        {"text_encoder": text_encoder, "reader": Reader(text_encoder.config.d_model)}
    )
    save(arguments.work / "text_encoder.pt", arguments.step, modules=modules)
    modules = torch.nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})
    average = torch.optim.swa_utils.AveragedModel(modules, avg_fn=ema)
    average.n_averaged.fill_(arguments.step)
    save(arguments.work / "transformer.pt", arguments.step, modules=modules, average=average)


# -- Shared ---------------------------------------------------------------------------------------


def ema(averaged, current, count):
    decay = min(0.999, (1 + count) / (10 + count))
    return averaged + (1 - decay) * (current - averaged)


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


def save(path: Path, step: int, **parts):
    state = {name: part.state_dict() for name, part in parts.items()}
    beside = path.with_suffix(".part")
    torch.save({"step": step, **state}, beside)
    os.replace(beside, path)


def resume(path: Path, **parts) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    # `restore` leaves out the optimizers of its stages, which then start anew.
    missing = parts.keys() - state.keys() - {"optimizer"}
    if missing:
        raise SystemExit(
            f"{path} has no {', '.join(sorted(missing))}: another version of this tool wrote it. "
            "Move it away to start this stage anew."
        )
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    return state["step"]


def log(text: str):
    print(text, flush=True)


if __name__ == "__main__":
    main()
