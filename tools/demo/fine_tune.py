"""Fine-tune the exported demo, and make the transformer with KV compression; T5 and the encoder stay.

    python tools/demo/fine_tune.py refine      once more: outlines, small shapes, stars
    python tools/demo/fine_tune.py guidance    for guidance 4.5: it imitates itself, mildly guided
    python tools/demo/fine_tune.py correct     on its own mistakes: its pictures as they should have been
    python tools/demo/fine_tune.py decoder     the VAE's decoder, on its pictures as they should have been
    python tools/demo/fine_tune.py kv          with KV compression in the deeper half: it imitates the other
    python tools/demo/fine_tune.py correct-kv  the compressed one on its own mistakes

Each replaces the weights in pixart_sigma/demo or demo_kv at its end, resumes from its own checkpoint in
--work and may be stopped at any time. With more processes a step has as many times the pictures:
torchrun --nproc-per-node 2 tools/demo/fine_tune.py refine. On Linux MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=8000000000 keeps freed buffers for the next step, which made kv twice as fast.
"""

import argparse
import copy
import dataclasses
import os
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from drawings import SHAPES, Scene, caption, expected, measure, paint, random_scene, render
from safetensors.torch import load_file, save_file
from torch.nn import functional
from train import (
    LARGE,
    SCALING_FACTOR,
    Batches,
    diffusion_loss,
    ema,
    encode_texts,
    freeze_ends,
    log,
    new_transformer,
    resume,
    save,
    spread_timesteps,
)
from transformers import T5EncoderModel, T5Tokenizer

from pixart_sigma.transformer.checkpoint import KVWeights, inspect, load_transformer_state_dict
from pixart_sigma.transformer.network import build_transformer, load_transformer

# The trained KV compression: the deeper half of the layers, 2x2 tokens.
KV_LAYERS, KV_RATIO = (2, 3, 4), 2
KV_FASTER = 20
# What is left of the predicted picture's squared error per hundred timesteps, once trained: it is what the
# noise hides, and its share of the loss.
ERROR_LEFT = (0.0018, 0.0054, 0.0104, 0.0167, 0.0279, 0.0364, 0.0416, 0.0486, 0.0532, 0.0664)
# The guidance scale that pictures are sampled with, and the one that it acts as below timestep 600.
GUIDANCE, MILD_GUIDANCE = 4.5, 2.0
# The own runs that the correction learns from: steps of each, how many together, how many wait per size.
RUN_STEPS, RUNS_TOGETHER, RUNS_KEPT = 20, 8, 512
# Steps of training on the runs of a size before there are new ones; with 48 they were learned by heart.
STEPS_PER_RUN = 10
# The timestep below which a run's picture has been decided, and the weight of the guided error.
UNDECIDED, GUIDED_SHARE = 550, 0.3
# The latents' variance within a picture, on average.
MEAN_CONTRAST = 0.35
# The decoder's windows, in latents, and how many of them together; a drawn picture's noise, the posterior's.
WINDOW, WINDOWS_TOGETHER, LATENT_NOISE = 16, 3, 0.05 / SCALING_FACTOR
# Of each shape, how many measured sizes have a say in how they are moved.
SIZES_KEPT = 60


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=("refine", "guidance", "correct", "decoder", "kv", "correct-kv"))
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
    }[arguments.stage](arguments)


def fine_tune(arguments, network, loss, make_batches=None):
    """The average over --steps of a network whose trained parameters require gradients.

    make_batches(vae, rng, encode) has a method next(sizes), which gives (size, batch, texts, ...): drawn
    pictures by default, hard ones twice as often. loss(schedule, batch, texts, encode) is a tensor;
    encode(texts) the pair of T5's hidden states and mask.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    tokenizer = T5Tokenizer.from_pretrained(arguments.out / "tokenizer", extra_ids=0)
    vae = AutoencoderKL.from_pretrained(arguments.out / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    text_encoder = T5EncoderModel.from_pretrained(arguments.out / "text_encoder", dtype=torch.float32)
    text_encoder.requires_grad_(False)
    network.train()
    average = torch.optim.swa_utils.AveragedModel(network, avg_fn=ema)
    adamw, muon = optimizers(network)
    parts = {"network": network, "average": average, "adamw": adamw, "muon": muon}
    path, total = arguments.work / f"{arguments.stage}.pt", arguments.steps
    step = resume(path, **parts)
    torch.manual_seed(2 * step + rank)
    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")

    def encode(texts):
        return encode_texts(tokenizer, text_encoder, texts)

    make_batches = make_batches or (lambda vae, rng, _: Batches(vae, rng, first=48, draw=hard_scene))
    batches = make_batches(vae, random.Random(2 * step + rank), encode)
    start, saved, losses = time.time(), time.time(), []
    while step < total:
        for group in adamw.param_groups + muon.param_groups:
            group["lr"] = arguments.rate * group["times"] * min((step + 1) / 100, 1 - step / total)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            size, batch, texts, *_ = batches.next(LARGE[:2] + LARGE)
            error = loss(schedule, batch, texts, encode)
        network.zero_grad()
        error.backward()
        share_gradients(network)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        muon.step()
        average.update_parameters(network)
        step += 1
        losses.append(error.item())
        if rank == 0 and step % 50 == 0:
            minutes, mean = (time.time() - start) / 60, sum(losses[-50:]) / len(losses[-50:])
            log(f"{arguments.stage} {step} {size}: loss {mean:.5f}, {minutes:.1f} min")
        if rank == 0 and (time.time() - saved > 90 or step == total):
            save(path, step, **parts)
            saved = time.time()
    if rank:
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


def hard_scene(rng: random.Random) -> Scene:
    """Twice as many scenes with a star or a small shape, which are the last to come out right."""
    scene = random_scene(rng)
    hard = any(thing.shape == "star" or thing.size == "small" for thing in scene.objects)
    return scene if hard or rng.random() < 0.5 else random_scene(rng)


def train_refine(arguments):
    """Go on with the exported transformer alone, all timesteps alike; in its place."""
    folder, transformer = arguments.out / "transformer", new_transformer()
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    transformer.load_state_dict({**transformer.state_dict(), **weights})

    def loss(schedule, latents, texts, encode):
        return diffusion_loss(transformer, schedule, latents, *encode(texts), error=balanced_error)

    write_weights(fine_tune(arguments, transformer, loss), folder)


def balanced_error(schedule, timestep, predicted, wanted):
    """The squared error of the predicted picture over what is left of it at the same timestep, once trained.

    Without it the loss is nearly that of the noisiest timesteps, where no training helps any more; outlines
    are drawn at the others.
    """
    current = schedule.alphas_cumprod[timestep][:, None, None, None]
    left = torch.tensor(ERROR_LEFT)[timestep // 100][:, None, None, None]
    weight = ((1 - current) / current).clamp(0.2, 300) * (0.03 / left).clamp(max=4)
    return (weight * (predicted.float() - wanted).square()).mean()


def train_guidance(arguments):
    """Fine-tune the exported transformer so that guidance acts mildly on it; in its place."""
    folder = arguments.out / "transformer"
    transformer = load_trainable(folder)
    loss = imitation_loss(transformer, copy.deepcopy(transformer), mild_guidance)
    write_weights(fine_tune(arguments, transformer, loss), folder)


def mild_guidance(timestep: torch.Tensor) -> torch.Tensor:
    """The guidance scale that `GUIDANCE` is to act as; as it is where the picture is still all noise."""
    noise = ((timestep - 600) / 200).clamp(0, 1)
    return MILD_GUIDANCE + (GUIDANCE - MILD_GUIDANCE) * noise


def imitation_loss(student, teacher, acts_as):
    """The student's errors against the teacher, with the caption, without it, and guided.

    Guidance multiplies what the two predictions differ by, their errors too: in so small a model that breaks
    outlines. So the student learns a captioned prediction that lies nearer to the empty one: guided by
    `GUIDANCE` it gives what the teacher gives at acts_as(timestep). A teacher's answer has no noise in it, so
    a few hundred steps do.
    """
    teacher.requires_grad_(False).eval()

    def loss(schedule, latents, texts, encode):
        spoken = [row for row, text in enumerate(texts) if text][: 1 + len(texts) // 2]
        latents, texts = latents[spoken], [texts[row] for row in spoken]
        hidden, mask = encode(texts + [""] * len(texts))
        timestep = spread_timesteps(len(texts))
        noisy = schedule.add_noise(latents, torch.randn_like(latents), timestep)
        inputs = torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), hidden, mask
        with torch.no_grad():
            captioned, empty = teacher(*inputs).float().chunk(2)
            scale = acts_as(timestep)[:, None, None, None]
            guided = empty + scale * (captioned - empty)
            captioned = empty + scale / GUIDANCE * (captioned - empty)
        own_captioned, own_empty = student(*inputs).float().chunk(2)
        own_guided = own_empty + GUIDANCE * (own_captioned - own_empty)
        return (
            balanced_error(schedule, timestep, own_captioned, captioned)
            + 0.5 * balanced_error(schedule, timestep, own_empty, empty)
            + 0.5 / (GUIDANCE - 1) ** 2 * balanced_error(schedule, timestep, own_guided, guided)
        )

    return loss


# -- Correction -----------------------------------------------------------------------------------


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
    teacher = load_transformer(inspect(arguments.out / "transformer"), dtype=torch.float32)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(arguments.out / "scheduler")
    vae = AutoencoderKL.from_pretrained(arguments.out / "vae", torch_dtype=torch.float32)
    loss = correction_loss(student, teacher, visibility(vae))

    def runs(vae, rng, encode):
        return Runs(student, scheduler, vae, rng, encode)

    corrected = fine_tune(arguments, student, loss, runs)
    with torch.no_grad():
        for weights, earlier in zip(corrected.parameters(), before.parameters(), strict=True):
            weights.lerp_(earlier, 0.5)
    write_weights(corrected, folder)


@dataclasses.dataclass
class Run:
    """`states` (steps, 4, height, width) led to `latents` (4, height, width), and should have to `wanted`."""

    text: str
    states: torch.Tensor
    latents: torch.Tensor
    wanted: torch.Tensor


class Runs:
    """The student's own pictures, and each of them as it should have been.

    Training meets noise on drawn pictures, a run meets what the transformer drew before: a corner that came
    in early is kept, as any part of a picture would be. So each run's picture is drawn again as it should be,
    and the states that led to it are learned from (dataset aggregation, arXiv 1011.0686), as is the picture
    itself under new noise.

    What is soft at its edges is measured too small, and the next runs would be smaller for it, and so on; so
    the sizes are moved to where they are in the middle of what is drawn.
    """

    def __init__(self, student, scheduler, vae, rng: random.Random, encode):
        self.student, self.scheduler, self.vae, self.rng, self.encode = student, scheduler, vae, rng, encode
        self.buffers = {}
        # The same in every process, so that none waits for another's runs.
        self.order = random.Random(0)
        self.sizes = {shape: [] for shape in SHAPES}

    def next(self, sizes):
        """(size, (states, timestep, wanted), texts); each row is of another run."""
        size = self.order.choice(sizes)
        runs, used = self.buffers.get(size, ([], 0))
        if used >= min(len(runs), STEPS_PER_RUN):
            runs, used = (runs + self.run(size))[-RUNS_KEPT:], 0
        self.buffers[size] = runs, used + 1
        chosen = self.rng.sample(runs, RUNS_TOGETHER)
        rows = [self.state(run, (row + self.rng.random()) / RUNS_TOGETHER) for row, run in enumerate(chosen)]
        states, timestep = zip(*rows, strict=True)
        wanted = torch.stack([run.wanted for run in chosen])
        return size, (torch.stack(states), torch.tensor(timestep), wanted), [run.text for run in chosen]

    def state(self, run: Run, part: float) -> tuple[torch.Tensor, int]:
        """(latents, timestep): of the run itself, or of a picture between its own and the wanted one."""
        if self.rng.random() < 0.5:
            # More of the later steps, in which outlines are drawn.
            step = int(len(run.states) * part**0.6)
            return run.states[step], int(self.scheduler.timesteps[step])
        timestep = 10 + int((UNDECIDED - 10) * (1 - part))
        signal = self.scheduler.alphas_cumprod[timestep]
        latents = torch.lerp(run.wanted, run.latents, self.rng.random())
        return signal.sqrt() * latents + (1 - signal).sqrt() * torch.randn_like(latents), timestep

    @torch.no_grad()
    def run(self, size: tuple[int, int]) -> list[Run]:
        scenes = [hard_scene(self.rng) for _ in range(RUNS_TOGETHER)]
        texts = [caption(scene, self.rng) for scene in scenes]
        states, latents = sample(self.student, self.scheduler, self.encode, texts, size)
        redrawn = self.redraw(scenes, self.vae.decode(latents / SCALING_FACTOR).sample.float())
        wanted = self.vae.encode(redrawn).latent_dist.mean.float() * SCALING_FACTOR
        return list(map(Run, texts, states, latents, wanted))

    def redraw(self, scenes: list[Scene], pictures: torch.Tensor) -> torch.Tensor:
        """What pictures (B, 3, height, width) should have been: each scene, placed as the picture has it."""
        height, width = pictures.shape[-2:]
        short, redrawn = min(width, height), []
        for scene, picture in zip(scenes, pictures, strict=True):
            placed = []
            for (thing, _, (least, most)), (x, y, radius) in zip(
                expected(scene), measure(scene, picture), strict=True
            ):
                sizes = self.sizes[thing.shape]
                sizes.append((radius / short - least) / (most - least))
                del sizes[:-SIZES_KEPT]
                # As if there had been many of middle size before the first.
                middle = (sum(sizes) + 0.5 * (SIZES_KEPT - len(sizes))) / SIZES_KEPT
                size = min(max(sizes[-1] + 0.5 - middle, 0), 1)
                placed.append((x, y, (least + size * (most - least)) * short))
            redrawn.append(paint([scene], [placed], width, height))
        return torch.cat(redrawn)


@torch.no_grad()
def sample(transformer, scheduler, encode, texts: list[str], size: tuple[int, int]):
    """The states (B, steps, 4, height, width) of a run for each caption, and the latents after it."""
    hidden, mask = encode(texts + [""] * len(texts))
    scheduler.set_timesteps(RUN_STEPS)
    latents, states = torch.randn(len(texts), 4, size[1] // 8, size[0] // 8), []
    for timestep in scheduler.timesteps:
        states.append(latents)
        both = torch.cat([latents, latents])
        captioned, empty = transformer(both, timestep.expand(len(both)), hidden, mask).float().chunk(2)
        guided = empty + GUIDANCE * (captioned - empty)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return torch.stack(states, dim=1), latents


@torch.no_grad()
def visibility(vae) -> torch.Tensor:
    """(4, 4) over the latents' channels: `visibility(vae) @ error` is as long as the error looks in pixels.

    In one direction of the channels an error is seen in the pixels a hundred times less, in squares, than in
    another, and took as much of the training. A tenth counts in every direction, as each informs the others.
    """
    rng, noise = random.Random(0), torch.Generator().manual_seed(0)
    latents = vae.encode(render([random_scene(rng) for _ in range(4)], 128, 128, rng)).latent_dist.mean
    error = LATENT_NOISE * torch.randn(latents[:, 0].shape, generator=noise)
    drawn, changes = vae.decode(latents).sample, []
    for channel in range(4):
        moved = latents.clone()
        moved[:, channel] += error
        changes.append((vae.decode(moved).sample - drawn).flatten())
    changes = torch.stack(changes)
    squared = changes @ changes.T
    return torch.linalg.cholesky(squared / squared.trace() * 4 + 0.1 * torch.eye(4)).T


def correction_loss(student, teacher, visible):
    """The squared error of the student's picture as `visible` has it: captioned, empty, and guided.

    All should be the redrawn one, or the teacher's while the noise still hides outlines and the redrawn one
    is but one of many pictures. Learned one by one, the two predictions err each in its own way at the edges,
    and guidance multiplies what they differ by. An error counts relative to the contrast of its picture, as
    an outline is as crooked on gray as on black.
    """
    teacher.requires_grad_(False).eval()

    def loss(schedule, batch, texts, encode):
        states, timestep, wanted = batch
        hidden, mask = encode([*texts, *[""] * len(texts)])
        signal = schedule.alphas_cumprod[timestep][:, None, None, None]
        decided = ((UNDECIDED - timestep) / 150).clamp(0, 1)[:, None, None, None]
        noise = ((states - signal.sqrt() * wanted) / (1 - signal).sqrt()).repeat(2, 1, 1, 1)
        inputs = states.repeat(2, 1, 1, 1), timestep.repeat(2), hidden, mask
        early = (timestep > UNDECIDED - 150).repeat(2)
        with torch.no_grad():
            taught = teacher(*(part[early] for part in inputs)).float()
        noise[early] = torch.lerp(taught, noise[early], decided.repeat(2, 1, 1, 1)[early])
        error = torch.einsum("ij,bjhw->bihw", visible, student(*inputs).float() - noise)
        captioned, empty = error.chunk(2)
        guided = empty + GUIDANCE * (captioned - empty)
        error = captioned.square() + 0.5 * empty.square() + GUIDED_SHARE * guided.square()
        left = torch.tensor(ERROR_LEFT)[timestep // 100][:, None, None, None]
        weight = ((1 - signal) / signal).clamp(max=300) * (0.03 / left).clamp(max=4)
        contrast = wanted.var((2, 3), correction=0, keepdim=True).mean(1, keepdim=True)
        return (weight * (MEAN_CONTRAST / contrast).clamp(0.5, 3) * error).mean()

    return loss


# -- Decoder --------------------------------------------------------------------------------------


def train_decoder(arguments):
    """Fine-tune the exported VAE's decoder on the transformer's pictures, and on drawn ones; in its place.

    The latents stay what they are. The tips of small stars and the edges between latents come out sharper,
    of the latents that the transformer gives too.
    """
    folder = arguments.out / "vae"
    transformer = load_transformer(inspect(arguments.out / "transformer"), dtype=torch.float32)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(arguments.out / "scheduler")
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    freeze_ends(vae)

    def pictures(exported, rng, encode):
        return OwnPictures(transformer, scheduler, exported, rng, encode)

    def loss(schedule, batch, texts, encode):
        latents, wanted = batch
        return decoding_loss(vae.decode(latents).sample.float(), wanted)

    vae.decoder = fine_tune(arguments, vae.decoder, loss, pictures)
    write_weights(vae, folder)


def decoding_loss(pictures: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Errors of the colours and of their differences to the neighbours, squared where they are small.

    Nearly all of a picture is flat and nearly right. Were its errors not squared, they would pull every
    weight at each step, and outlines would be learned by none.
    """
    error = 2 * functional.smooth_l1_loss(pictures, wanted, beta=0.2)
    for dimension in (2, 3):
        difference = pictures.diff(dim=dimension), wanted.diff(dim=dimension)
        error = error + functional.smooth_l1_loss(*difference, beta=0.1)
    return error


class OwnPictures:
    """What the transformer draws, as latents, with the same picture in clean outlines; and drawn ones."""

    def __init__(self, transformer, scheduler, vae, rng: random.Random, encode):
        self.transformer, self.scheduler, self.vae = transformer, scheduler, vae
        self.rng, self.encode = rng, encode
        self.buffers = {}

    def next(self, sizes):
        """(size, (latents, wanted pictures), no texts): windows of own pictures, one whole, or drawn ones."""
        size = self.rng.choice(sizes)
        chance = self.rng.random()
        if chance < 0.3:
            return size, self.drawn(), []
        kept, used = self.buffers.get(size, ([], 0))
        if used >= min(len(kept), STEPS_PER_RUN):
            kept, used = (kept + self.run(size))[-RUNS_KEPT:], 0
        self.buffers[size] = kept, used + 1
        if chance < 0.45:
            pairs = [self.rng.choice(kept)]
        else:
            pairs = [self.window(*self.rng.choice(kept)) for _ in range(WINDOWS_TOGETHER)]
        return size, tuple(map(torch.stack, zip(*pairs, strict=True))), []

    @torch.no_grad()
    def drawn(self) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = render([hard_scene(self.rng) for _ in range(4)], 8 * WINDOW, 8 * WINDOW, self.rng)
        latents = self.vae.encode(wanted).latent_dist.mean.float()
        return latents + LATENT_NOISE * torch.randn_like(latents), wanted

    def window(self, latents: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A part of a picture, if possible with an outline in it."""
        height, width = latents.shape[-2:]
        for _ in range(4):
            y, x = (self.rng.randrange(max(side - WINDOW, 0) + 1) for side in (height, width))
            part = wanted[:, 8 * y : 8 * (y + WINDOW), 8 * x : 8 * (x + WINDOW)]
            if part.std() > 0.05:
                break
        return latents[:, y : y + WINDOW, x : x + WINDOW], part

    @torch.no_grad()
    def run(self, size: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """New pictures without the worst quarter, which has more wrong with it than outlines."""
        scenes = [hard_scene(self.rng) for _ in range(RUNS_TOGETHER)]
        texts = [caption(scene, self.rng) for scene in scenes]
        _, latents = sample(self.transformer, self.scheduler, self.encode, texts, size)
        latents = latents / SCALING_FACTOR
        pictures = self.vae.decode(latents).sample.float()
        wanted = torch.cat(
            [
                paint([scene], [measure(scene, picture)], *size)
                for scene, picture in zip(scenes, pictures, strict=True)
            ]
        )
        nearest = (pictures - wanted).abs().mean((1, 2, 3)).argsort()[: 3 * RUNS_TOGETHER // 4]
        return [(latents[row], wanted[row]) for row in nearest.tolist()]


# -- Files ----------------------------------------------------------------------------------------


def load_trainable(folder: Path):
    return load_transformer(inspect(folder), dtype=torch.float32).requires_grad_(True)


def write_weights(network, folder: Path):
    """The weights in fp16 in a component's folder, in place of those that it holds."""
    weights = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    beside = folder / "diffusion_pytorch_model.part"
    save_file(weights, beside, {"format": "pt"})
    beside.chmod(0o644)
    os.replace(beside, folder / "diffusion_pytorch_model.safetensors")
    log(f"exported to {folder}")


# -- KV compression -------------------------------------------------------------------------------


def train_kv(arguments):
    """Fine-tune the exported transformer with KV compression in its deeper half, from plain averages on.

    Where it has been exported already, it goes on from there.
    """
    dense, exported = arguments.out / "transformer", kv_folder(arguments.out)
    teacher = load_transformer(inspect(dense), dtype=torch.float32)
    if exported.exists():
        student = load_trainable(exported)
    else:
        student = new_kv_transformer(dense)
    loss = imitation_loss(student, teacher, lambda timestep: torch.full(timestep.shape, GUIDANCE))
    export_kv(fine_tune(arguments, student, loss), arguments.out)


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


if __name__ == "__main__":
    main()
