"""Drawn pictures with their outlines, for the demo's ControlNet: the outline says where, the caption what."""

import random
from dataclasses import replace

import torch
from batches import PATCHES_PER_STEP
from diffusers import AutoencoderKL
from drawings import MARGIN, Scene, caption, layout, paint, random_scene, trace
from losses import balanced_error
from networks import SCALING_FACTOR

from pixart_sigma.transformer.config import TransformerConfig
from pixart_sigma.transformer.controlnet import Control, ControlHooks, ControlNet
from pixart_sigma.transformer.controlnet_file import build_controlnet

# Small pictures for the first part of the steps: they teach the same, four times as fast.
SMALL_PART = 0.5
SMALL_OUTLINES, LARGE_OUTLINES = ((128, 128),), ((256, 256),)
# Half of the other stages': in as many seconds, more steps of fewer pictures lead further.
PATCHES = PATCHES_PER_STEP // 2
# Pairs before the first step, and new ones at each, both of 128x128: of larger pictures fewer, as encoding is
# dear.
FIRST, FRESH = 64, 0.5
# Blocks that are copied: 3.9 MB in fp16.
LAYERS = 3
# Shares of the shorter side: the radius of one object, and of each of two.
RADIUS, PAIR_RADIUS = (0.12, 0.38), (0.12, 0.175)
# How far two objects are from where `layout` has them, in shares of the canvas: they never touch.
SHIFT = 0.045


def outline_sizes(part: float) -> tuple[tuple[int, int], ...]:
    """Sizes of pictures, as (width, height), when this part of the steps is done."""
    return SMALL_OUTLINES if part < SMALL_PART else LARGE_OUTLINES


def scene_without_places(rng: random.Random, held_out: bool = False) -> Scene:
    """A scene of which nothing is said but shapes and colours, and of two objects how they stand."""
    while True:
        scene = random_scene(rng, held_out)
        objects = tuple(replace(thing, size=None, position=None) for thing in scene.objects)
        scene = replace(scene, objects=objects)
        if scene.held_out == held_out:
            return scene


def place(scene: Scene, width: int, height: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """As `layout`, but one object anywhere in any size, and two farther from their usual places."""
    short, placed = min(width, height), []
    for x, y, _ in layout(scene, width, height, rng):
        radius = rng.uniform(*(PAIR_RADIUS if scene.relation else RADIUS)) * short
        if scene.relation:
            x, y = x + rng.uniform(-SHIFT, SHIFT) * width, y + rng.uniform(-SHIFT, SHIFT) * height
        else:
            x, y = rng.uniform(0, width), rng.uniform(0, height)
        margin = 1.08 * radius + MARGIN * short
        placed.append((min(max(x, margin), width - margin), min(max(y, margin), height - margin), radius))
    return placed


def draw_pair(scene: Scene, width: int, height: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and its outline, (3, height, width) each, the line as thin as Canny's or softer and wider."""
    usual = scene.objects[0].size or scene.objects[0].position
    placed = (layout if usual else place)(scene, width, height, rng)
    outline = trace(scene, placed, width, height, rng.uniform(1, 3))
    if rng.random() < 0.5:
        outline = (outline > 0).float() * 2 - 1
    return paint([scene], [placed], width, height)[0], outline


class OutlinedPictures:
    """Captioned latents with those of their outlines; the pairs of each size wait in a buffer."""

    def __init__(self, vae: AutoencoderKL, rng: random.Random):
        self.vae, self.rng, self.buffers = vae, rng, {}

    def next(self, sizes):
        """(size, (latents, outlines), texts)."""
        size = self.rng.choice(sizes)
        share = 128**2 / (size[0] * size[1])
        if size not in self.buffers:
            self.buffers[size] = [self.pair(size) for _ in range(int(FIRST * (share + 1) / 2))]
        fresh = FRESH * share**0.5
        for _ in range(int(fresh) + (self.rng.random() < fresh % 1)):
            self.buffers[size].append(self.pair(size))
        count = PATCHES * 16 * 16 // (size[0] * size[1])
        scenes, latents, outlines = zip(*self.rng.choices(self.buffers[size], k=count), strict=True)
        texts = ["" if self.rng.random() < 0.1 else caption(scene, self.rng) for scene in scenes]
        return size, (torch.stack(latents), torch.stack(outlines)), texts

    @torch.no_grad()
    def pair(self, size: tuple[int, int]) -> tuple[Scene, torch.Tensor, torch.Tensor]:
        # A fifth says where, as the transformer knows it; one object may be anywhere, and is met more often.
        draw = random_scene if self.rng.random() < 0.2 else scene_without_places
        scene = draw(self.rng)
        if scene.relation and self.rng.random() < 0.5:
            scene = draw(self.rng)
        both = self.vae.encode(torch.stack(draw_pair(scene, *size, self.rng))).latent_dist.mean
        return scene, *(both * SCALING_FACTOR)


def new_controlnet(transformer) -> ControlNet:
    """Copies of the transformer's first blocks, which add nothing yet.

    A published training begins with `before_proj` at nothing too, and has to find out that there is a picture
    before it can learn from it; here the picture comes in from the first step on.
    """
    config: TransformerConfig = replace(transformer.sigma_config, num_layers=LAYERS, kv_compression=None)
    controlnet = build_controlnet(config)
    weights = {name: torch.zeros(weight.shape) for name, weight in controlnet.state_dict().items()}
    weights["controlnet_blocks.0.before_proj.weight"] = torch.eye(config.cross_attention_dim)
    for name, weight in transformer.transformer_blocks.state_dict().items():
        index, rest = name.split(".", 1)
        if int(index) < LAYERS:
            weights[f"controlnet_blocks.{index}.transformer_block.{rest}"] = weight.detach().clone()
    controlnet.load_state_dict(weights, assign=True)
    return controlnet.requires_grad_(True)


def control_loss(controlnet: ControlNet, transformer):
    """The error of the predicted picture, more often where the noise still leaves open where things are."""
    transformer.requires_grad_(False).eval()

    def loss(schedule, batch, texts, encode):
        latents, outlines = batch
        count = len(latents)
        timestep = (1000 * ((torch.arange(count) + torch.rand(count)) / count) ** 0.7).long()
        noise = torch.randn_like(latents)
        noisy = schedule.add_noise(latents, noise, timestep)
        hooks = ControlHooks((Control(controlnet, outlines),))
        predicted = transformer(noisy, timestep, *encode(texts), hooks=hooks)
        return balanced_error(schedule, timestep, predicted, noise)

    return loss
