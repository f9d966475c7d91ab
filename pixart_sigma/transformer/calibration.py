"""What was measured of the savings that a checkpoint bears: a file, found again by the checkpoint."""

import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..choices import MAX_STEPS
from ..errors import SigmaError
from ..files.reading import parse_json, parsing, read_bytes
from ..files.writing import write_beside
from ..noise_schedule import SPACINGS
from ..setting_checks import check_whole
from ..speed import Savings
from ..speed import parse as parse_speed
from ..speed import spell as spell_speed
from .kv_rules import KVCompression, parse, spell

FORMAT = "pixart-sigma calibration 2"
OLD_FORMAT = "pixart-sigma kv calibration 1"  # of KV compression alone
RATIOS = (2, 4)
WINDOWS = 4
# Rounding a checkpoint to bf16 moves a weight by 0.2 % on average, to fp8 by 2 %.
SAME_WEIGHTS = 0.04
SAMPLED_WEIGHTS = 8


@dataclass(frozen=True)
class Choice:
    """How a run saves work: by KV compression, by forecasts, and by other steps than the user's own, which
    None stands for."""

    rules: tuple[KVCompression, ...] = ()
    savings: Savings = ()
    steps: int | None = None
    spacing: str | None = None

    @property
    def keeps_steps(self) -> bool:
        return self.steps is None and self.spacing is None

    def describe(self) -> str:
        parts = {
            "steps": self.steps,
            "spacing": self.spacing,
            "speed": spell_speed(self.savings) if self.savings else None,
            "kv_compression": spell(self.rules) if self.rules else None,
        }
        return ", ".join(f"{name} {value}" for name, value in parts.items() if value) or "nothing saved"


@dataclass(frozen=True)
class Point:
    """What whole runs with a choice showed: the largest error of the latents they end with, and the shares of
    the multiply-adds and of the seconds of runs without it. kind: what was being looked for."""

    kind: str
    choice: Choice
    error: float
    multiply_adds: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        choice = self.choice
        return {
            "kind": self.kind,
            "kv_compression": spell(choice.rules),
            "speed": spell_speed(choice.savings),
            "steps": choice.steps,
            "spacing": choice.spacing,
            "error": round(self.error, 5),
            "multiply_adds": round(self.multiply_adds, 4),
            "seconds": round(self.seconds, 4),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any], layers: int) -> "Point":
        """Raises SigmaError, KeyError, TypeError or ValueError for anything that `as_dict` has not given."""
        choice = Choice(
            parse(found["kv_compression"], layers),
            parse_speed(found["speed"]),
            None
            if found["steps"] is None
            else check_whole("steps", found["steps"], 1, MAX_STEPS, "calibrate"),
            found["spacing"],
        )
        if choice.spacing not in (None, *SPACINGS):
            raise ValueError(f"its spacing is {choice.spacing!r}")
        figures = (float(found[name]) for name in ("error", "multiply_adds", "seconds"))
        return cls(str(found["kind"]), choice, *figures)


@dataclass(frozen=True)
class Calibration:
    """What was measured. Shares and errors are of 1, relative L2 of clean latents: `error` is the largest of
    the latents that whole runs end with, `errors[ratio][layer][window]` that of one layer by itself, in what
    a step predicts.

    `windows` of equal length divide the noise schedule, from pure noise to the clean picture. `fingerprint`
    are some of the checkpoint's weights, see `fingerprint_of`. `rules` are what KV compression alone may be.

    `speed` is the best of all `points` within the budget, `speed_in_place` the best of those that keep the
    user's own steps; None where nothing was better than to save nothing, and in old files. Errors are counted
    from the user's own run without savings, or where `reference` is "converged" from one of many steps.
    """

    rules: tuple[KVCompression, ...]
    error: float
    budget: float
    saved: float
    width: int
    height: int
    steps: int
    prompts: tuple[str, ...]
    errors: dict[int, list[list[float]]]
    fingerprint: tuple[float, ...]
    reference: str = "own"
    speed: Point | None = None
    speed_in_place: Point | None = None
    points: tuple[Point, ...] = ()

    def describe(self) -> str:
        lines = [
            f"KV compression alone: {spell(self.rules)}",
            f"  finished latents {self.error:.1%} off, of {self.budget:.1%} allowed; "
            f"{1 - self.saved:.3f} of the multiply-adds at {self.width}x{self.height}",
        ]
        named = {"all savings": self.speed, f"with the {self.steps} steps as they are": self.speed_in_place}
        for name, point in named.items():
            if point is None:
                lines.append(f"{name}: nothing")
                continue
            lines.append(f"{name}: {point.choice.describe()}")
            lines.append(
                f"  finished latents {point.error:.1%} off; {point.multiply_adds:.3f} of the multiply-adds, "
                f"{point.seconds:.3f} of the seconds"
            )
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        content = {
            "format": FORMAT,
            "kv_compression": spell(self.rules),
            "error": round(self.error, 5),
            "budget": self.budget,
            "multiply_adds_saved": round(self.saved, 4),
            "size": [self.width, self.height],
            "steps": self.steps,
            "prompts": list(self.prompts),
            "errors": {
                str(ratio): [
                    [None if error == math.inf else round(error, 5) for error in windows]
                    for windows in layers
                ]
                for ratio, layers in self.errors.items()
            },
            "fingerprint": list(self.fingerprint),
            "reference": self.reference,
            "speed": self.speed and self.speed.as_dict(),
            "speed_in_place": self.speed_in_place and self.speed_in_place.as_dict(),
            "points": [point.as_dict() for point in self.points],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_beside(path, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Raises SigmaError if the file is not a calibration."""
        read = read_bytes(path)
        with parsing(path, "is not a calibration", "Delete it, or calibrate again.", SigmaError):
            content = parse_json(read)
            if content["format"] not in (FORMAT, OLD_FORMAT):
                raise ValueError(f"its format is {content['format']!r}")
            errors = {
                int(ratio): [
                    [math.inf if error is None else float(error) for error in windows] for windows in layers
                ]
                for ratio, layers in content["errors"].items()
            }
            fingerprint = tuple(map(float, content["fingerprint"]))
            layers = len(fingerprint) // SAMPLED_WEIGHTS

            def point(found) -> Point | None:
                return None if found is None else Point.from_dict(found, layers)

            return cls(
                rules=parse(content["kv_compression"], layers),
                error=float(content["error"]),
                budget=float(content["budget"]),
                saved=float(content["multiply_adds_saved"]),
                width=int(content["size"][0]),
                height=int(content["size"][1]),
                steps=int(content["steps"]),
                prompts=tuple(map(str, content["prompts"])),
                errors=errors,
                fingerprint=fingerprint,
                reference=str(content.get("reference", "own")),
                speed=point(content.get("speed")),
                speed_in_place=point(content.get("speed_in_place")),
                points=tuple(Point.from_dict(found, layers) for found in content.get("points", ())),
            )

    def fits(self, fingerprint: tuple[float, ...]) -> bool:
        """Whether it was measured on these weights, in whatever precision they are stored."""
        if len(fingerprint) != len(self.fingerprint):
            return False
        return math.dist(fingerprint, self.fingerprint) <= SAME_WEIGHTS * math.hypot(*fingerprint)


def fingerprint_of(state_dict: dict[str, torch.Tensor]) -> tuple[float, ...]:
    """A few weights of each layer of a transformer with diffusers' keys, to know it again."""
    layers = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("transformer_blocks."))
    rows = (state_dict[f"transformer_blocks.{layer}.attn1.to_k.weight"][0] for layer in range(layers))
    return tuple(float(f"{weight:.4g}") for row in rows for weight in row[:SAMPLED_WEIGHTS].float().tolist())


def calibration_path(checkpoint: Path) -> Path:
    """Where the calibration of a checkpoint's file or folder lies: beside the file, in the folder."""
    if checkpoint.is_dir():
        return checkpoint / "kv_calibration.json"
    return checkpoint.with_name(f"{checkpoint.stem}.kv_calibration.json")


def find_calibration(checkpoint: Path, fingerprint: Callable[[], tuple[float, ...]]) -> Calibration | None:
    """The calibration that lies with a checkpoint, or None; one of other weights is reported."""
    path = calibration_path(checkpoint)
    if not path.is_file():
        return None
    calibration = Calibration.read(path)
    if calibration.fits(fingerprint()):
        return calibration
    _say_not_used(path)
    return None


@functools.cache
def _say_not_used(path: Path) -> None:
    logging.getLogger(__name__).warning(f"{path} was measured on another checkpoint, and is not used.")
