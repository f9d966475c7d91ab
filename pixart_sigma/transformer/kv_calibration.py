"""What was measured of the KV compression that a checkpoint bears: a file, found again by the checkpoint."""

import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SigmaError
from ..files.writing import write_beside
from .kv_rules import KVCompression, parse, spell

FORMAT = "pixart-sigma kv calibration 1"
RATIOS = (2, 4)
WINDOWS = 4
# Rounding a checkpoint to bf16 moves a weight by 0.2 % on average, to fp8 by 2 %.
SAME_WEIGHTS = 0.04
SAMPLED_WEIGHTS = 8


@dataclass(frozen=True)
class Calibration:
    """What was measured. Shares and errors are of 1, relative L2 of clean latents: `error` is the largest of
    the latents that whole runs end with, `errors[ratio][layer][window]` that of one layer by itself, in what
    a step predicts.

    `windows` of equal length divide the noise schedule, from pure noise to the clean picture. `fingerprint`
    are some of the checkpoint's weights, see `fingerprint_of`.
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

    def describe(self) -> str:
        return (
            f"{spell(self.rules)}\n"
            f"finished latents {self.error:.1%} off, of {self.budget:.1%} allowed; saves {self.saved:.1%} "
            f"of the multiply-adds at {self.width}x{self.height}"
        )

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
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_beside(path, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Raises SigmaError if the file is not a calibration."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            errors = {
                int(ratio): [
                    [math.inf if error is None else float(error) for error in windows] for windows in layers
                ]
                for ratio, layers in content["errors"].items()
            }
            fingerprint = tuple(map(float, content["fingerprint"]))
            layers = len(fingerprint) // SAMPLED_WEIGHTS
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
            )
        except OSError as error:
            raise SigmaError(f"The calibration {path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, SigmaError) as error:
            raise SigmaError(
                f"{path} is not a calibration of KV compression: {error!r}. Delete it, or calibrate again."
            ) from error

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


def find_calibrated(
    checkpoint: Path, fingerprint: Callable[[], tuple[float, ...]]
) -> tuple[KVCompression, ...] | None:
    """The rules of the calibration that lies with a checkpoint, or None; one of other weights is reported."""
    path = calibration_path(checkpoint)
    if not path.is_file():
        return None
    calibration = Calibration.read(path)
    if calibration.fits(fingerprint()):
        return calibration.rules
    _say_not_used(path)
    return None


@functools.cache
def _say_not_used(path: Path) -> None:
    logging.getLogger(__name__).warning(f"{path} was measured on another checkpoint, and is not used.")
