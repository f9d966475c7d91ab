"""What the transformer draws itself, to be learned from as it should have been."""

import dataclasses
import random

import torch
from batches import hard_scene
from drawings import SHAPES, Scene, caption, expected, measure, paint, render
from losses import UNDECIDED, guide
from networks import LATENT_NOISE, SCALING_FACTOR

# Steps of a run, how many runs together, how many wait per size.
RUN_STEPS, RUNS_TOGETHER, RUNS_KEPT = 20, 8, 512
# Steps of training on the runs of a size before there are new ones; with 48 they were learned by heart.
STEPS_PER_RUN = 10
# Of each shape, how many measured sizes have a say in how they are moved.
SIZES_KEPT = 60
# The decoder's windows, in latents, and how many of them together.
WINDOW, WINDOWS_TOGETHER = 16, 3


class Rollouts:
    """What a transformer draws of hard scenes; of each size the last wait to be learned from.

    A subclass has a method run(size), which lists what is learned from new runs.
    """

    def __init__(self, transformer, scheduler, vae, rng: random.Random, encode):
        self.transformer, self.scheduler, self.vae = transformer, scheduler, vae
        self.rng, self.encode = rng, encode
        self.buffers = {}

    def waiting(self, size: tuple[int, int]) -> list:
        """The last of what `run` gave for a size, with new ones every `STEPS_PER_RUN` calls."""
        kept, used = self.buffers.get(size, ([], 0))
        if used >= min(len(kept), STEPS_PER_RUN):
            kept, used = (kept + self.run(size))[-RUNS_KEPT:], 0
        self.buffers[size] = kept, used + 1
        return kept

    @torch.no_grad()
    def draw(self, size: tuple[int, int]):
        """(scenes, texts, states, latents): B new runs; states are (B, steps, 4, height, width)."""
        scenes = [hard_scene(self.rng) for _ in range(RUNS_TOGETHER)]
        texts = [caption(scene, self.rng) for scene in scenes]
        hidden, mask = self.encode(texts + [""] * len(texts))
        self.scheduler.set_timesteps(RUN_STEPS)
        latents, states = torch.randn(len(texts), 4, size[1] // 8, size[0] // 8), []
        for timestep in self.scheduler.timesteps:
            states.append(latents)
            both = torch.cat([latents, latents])
            predicted = self.transformer(both, timestep.expand(len(both)), hidden, mask).float()
            guided = guide(*predicted.chunk(2))
            latents = self.scheduler.step(guided, timestep, latents, return_dict=False)[0]
        return scenes, texts, torch.stack(states, dim=1), latents


@dataclasses.dataclass
class Run:
    """`states` (steps, 4, height, width) led to `latents` (4, height, width), and should have to `wanted`."""

    text: str
    states: torch.Tensor
    latents: torch.Tensor
    wanted: torch.Tensor


class Runs(Rollouts):
    """The student's own pictures, and each of them as it should have been.

    Training meets noise on drawn pictures, a run meets what the transformer drew before: a corner that came
    in early is kept, as any part of a picture would be. So each run's picture is drawn again as it should be,
    and the states that led to it are learned from (dataset aggregation, arXiv 1011.0686), as is the picture
    itself under new noise.

    What is soft at its edges is measured too small, and the next runs would be smaller for it, and so on; so
    the sizes are moved to where they are in the middle of what is drawn.
    """

    def __init__(self, student, scheduler, vae, rng: random.Random, encode):
        super().__init__(student, scheduler, vae, rng, encode)
        # The same in every process, so that none waits for another's runs.
        self.order = random.Random(0)
        self.sizes = {shape: [] for shape in SHAPES}

    def next(self, sizes):
        """(size, (states, timestep, wanted), texts); each row is of another run."""
        size = self.order.choice(sizes)
        chosen = self.rng.sample(self.waiting(size), RUNS_TOGETHER)
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
        scenes, texts, states, latents = self.draw(size)
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


class OwnPictures(Rollouts):
    """What the transformer draws, as latents, with the same picture in clean outlines; and drawn ones."""

    def next(self, sizes):
        """(size, (latents, wanted pictures), no texts): windows of own pictures, one whole, or drawn ones."""
        size = self.rng.choice(sizes)
        chance = self.rng.random()
        if chance < 0.3:
            return size, self.drawn(), []
        kept = self.waiting(size)
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
        scenes, _, _, latents = self.draw(size)
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
