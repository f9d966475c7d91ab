"""How often the demo model draws what it was asked: held-out prompts, judged from the pixels.

    python tools/demo/evaluate.py --out evaluation.json

The prompts are scenes that training never sees (`Scene.held_out`). `judge` looks at the pictures; here
its answer is compared with the prompt. Only what a prompt says is judged: one without a place cannot get it
wrong. An object's colour and shape count as right only when the picture has the asked number of objects.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from drawings import Scene, caption, random_scene, render
from judge import Seen, look

# Which coordinate a relation is about, and whether the first object has the smaller one.
ORDER = {"left of": ("x", True), "right of": ("x", False), "above": ("y", True), "below": ("y", False)}
ROWS = ("colour", "background", "shape", "position", "size", "two objects", "relation")


def held_out_prompts(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Different held-out scenes with a caption each."""
    rng = random.Random(seed)
    prompts: dict[Scene, str] = {}
    while len(prompts) < count:
        scene = random_scene(rng, held_out=True)
        prompts.setdefault(scene, caption(scene, rng))
    return list(prompts.items())


def judge(scene: Scene, picture: np.ndarray) -> dict[str, bool]:
    """What is right in a picture (H, W, 3), 0..255: a verdict for each row that the scene speaks about."""
    ground, seen = look(picture)
    verdict = {}
    if scene.background:
        verdict["background"] = ground == scene.background
    if len(scene.objects) == 1:
        asked = scene.objects[0]
        one = seen[0] if len(seen) == 1 else None
        verdict["colour"] = one is not None and one.color == asked.color
        verdict["shape"] = one is not None and one.shape == asked.shape
        if asked.position:
            verdict["position"] = one is not None and one.position == asked.position
        if asked.size:
            verdict["size"] = one is not None and one.size == asked.size
        return verdict
    axis, ascending = ORDER[scene.relation]
    pair = sorted(seen, key=lambda one: getattr(one, axis), reverse=not ascending)
    verdict["relation"] = len(pair) == 2 and _apart(pair, axis)
    same = [(one.shape, one.color) for one in pair] == [(one.shape, one.color) for one in scene.objects]
    verdict["two objects"] = verdict["relation"] and same and verdict.get("background", True)
    return verdict


def _apart(pair: list[Seen], axis: str) -> bool:
    across, down = abs(pair[0].x - pair[1].x), abs(pair[0].y - pair[1].y)
    along, aside = (across, down) if axis == "x" else (down, across)
    return along > 0.2 and aside < 0.15


def tally(verdicts: list[dict[str, bool]]) -> dict[str, dict[str, float]]:
    """Per row: how many were judged, how many were right, and the share."""
    table = {}
    for row in ROWS:
        judged = [verdict[row] for verdict in verdicts if row in verdict]
        if judged:
            table[row] = {"judged": len(judged), "right": sum(judged), "share": sum(judged) / len(judged)}
    return table


def as_pixels(pictures: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def draw(asked: argparse.Namespace, prompts: list[str], width: int, height: int) -> Iterator:
    """A PIL image for each prompt; prompt k is drawn with seed k."""
    from pixart_sigma import Settings, SigmaPipeline, Ways

    pipeline = SigmaPipeline.from_path(asked.model, Ways(release="keep"), transformer=asked.transformer)
    for seed, prompt in enumerate(prompts):
        result = pipeline.generate(
            Settings(
                prompt,
                width=width,
                height=height,
                steps=asked.steps if asked.recipe is None else Settings.steps,
                guidance_scale=asked.guidance if asked.recipe is None else None,
                seed=seed,
                kv_compression=asked.kv_compression,
                recipe=asked.recipe,
            )
        )
        yield result.images[0]


def draw_and_judge(asked: argparse.Namespace, width: int, height: int) -> list[tuple[str, dict[str, bool]]]:
    """Each prompt with its verdict, which is also told on stderr; the pictures are kept if asked for."""
    scenes = held_out_prompts(asked.count, asked.seed)
    prompts = [prompt for _, prompt in scenes]
    if asked.pictures:
        asked.pictures.mkdir(parents=True, exist_ok=True)
        (asked.pictures / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    judged = []
    pictures = draw(asked, prompts, width, height)
    for number, ((scene, prompt), picture) in enumerate(zip(scenes, pictures, strict=True), start=1):
        verdict = judge(scene, np.asarray(picture))
        judged.append((prompt, verdict))
        wrong = [row for row, right in verdict.items() if not right]
        print(f"{number:4}  {prompt}" + (f"  WRONG: {', '.join(wrong)}" if wrong else ""), file=sys.stderr)
        if asked.pictures:
            picture.save(asked.pictures / f"{number:04}.png")
    return judged


@torch.inference_mode()
def reconstruction(folder: Path, count: int, width: int, height: int) -> dict[str, float]:
    """PSNR in dB of the VAE on drawn held-out pictures: of the mean squared error, and of the worst one."""
    from pixart_sigma import load_vae

    vae = load_vae(folder)
    rng = random.Random(1)
    errors = []
    for _ in range(count):
        picture = render([random_scene(rng, held_out=True)], width, height, rng)
        rebuilt = vae.decode(vae.encode(picture).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(float((rebuilt - picture).div(2).square().mean()))
    worst, mean = max(errors), sum(errors) / count
    return {"pictures": count, "psnr": -10 * math.log10(mean), "worst": -10 * math.log10(worst)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo", help="a pipeline folder (default: the demo model)")
    parser.add_argument("--transformer", help="as for `pixart-sigma generate`: demo-kv, a file or a folder")
    parser.add_argument("--count", type=int, default=200, help="how many prompts (default: 200)")
    parser.add_argument("--size", default="256x256", help="WIDTHxHEIGHT (default: 256x256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--kv-compression", help="as for `pixart-sigma generate`")
    parser.add_argument("--recipe", help="in place of steps and guidance, as for `pixart-sigma generate`")
    parser.add_argument("--seed", type=int, default=0, help="which held-out prompts are drawn")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures and every verdict")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures, and prompts.txt")
    parser.add_argument("--vae", action="store_true", help="also measure the VAE on drawn pictures")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    from pixart_sigma import DEMO
    from pixart_sigma.aspect_ratio import parse_size

    width, height = parse_size(asked.size)
    judged = draw_and_judge(asked, width, height)
    report = {
        "prompts": asked.count,
        "size": f"{width}x{height}",
        "steps": asked.steps,
        "guidance_scale": asked.guidance,
        "kv_compression": asked.kv_compression,
        "recipe": asked.recipe,
        "transformer": asked.transformer,
        "accuracy": tally([verdict for _, verdict in judged]),
    }
    print("| judged | prompts | right |\n|---|---|---|")
    for row, figures in report["accuracy"].items():
        print(f"| {row} | {figures['judged']} | {figures['share']:.1%} |")
    if asked.vae:
        folder = DEMO if asked.model == "demo" else Path(asked.model)
        report["vae"] = figures = reconstruction(folder / "vae", min(asked.count, 64), width, height)
        quality, worst = figures["psnr"], figures["worst"]
        print(f"| VAE PSNR | {figures['pictures']} | {quality:.1f} dB (worst {worst:.1f}) |")
    if asked.out:
        report["verdicts"] = [{"prompt": prompt, **verdict} for prompt, verdict in judged]
        beside = asked.out.with_name(asked.out.name + ".partial")
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
