"""Drawn pictures to train on: windows of them, and captioned latents of several sizes."""

import random

import torch
from diffusers import AutoencoderKL
from drawings import Scene, caption, random_scene, render
from networks import SCALING_FACTOR

# Sizes as width x height.
SMALL = ((64, 64), (64, 64), (80, 48), (48, 80))
MIDDLE = ((128, 128), (128, 128), (144, 112), (112, 144), (160, 96), (96, 160))
LARGE = ((256, 256), (256, 256), (288, 224), (224, 288), (336, 192), (192, 336))
# Patches in a batch: 128 of the smallest pictures, 8 of the largest.
PATCHES_PER_STEP = 2048
BUFFER = 6000


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


def hard_scene(rng: random.Random) -> Scene:
    """Twice as many scenes with a star or a small shape, which are the last to come out right."""
    scene = random_scene(rng)
    hard = any(thing.shape == "star" or thing.size == "small" for thing in scene.objects)
    return scene if hard or rng.random() < 0.5 else random_scene(rng)


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
