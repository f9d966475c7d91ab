"""Which layers, ratios and steps of a checkpoint bear KV compression without trained weights, by measurement.

At a few points of uncompressed runs each layer is compressed by itself, and the picture that the step then
predicts is compared with the uncompressed one: after guidance, which multiplies errors. The errors of
different layers are nearly independent, so that their squares add: of all choices with the same sum, the
one that saves most is the one in which every further layer costs the same per multiply-add saved. In each
part of the run the largest such choice is taken whose error, measured with all its layers together, stays
within the budget.
"""

import functools
import itertools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import SigmaError
from .files import write_beside
from .kv_compression import LAST_TIMESTEP, KVCompression, multiply_adds, parse, spell
from .transformer_config import TransformerConfig

FORMAT = "pixart-sigma kv calibration 1"
RATIOS = (2, 4)
WINDOWS = 4
# Rounding a checkpoint to bf16 moves a weight by 0.2 % on average, to fp8 by 2 %.
SAME_WEIGHTS = 0.04
SAMPLED_WEIGHTS = 8
PROMPT_TOKENS = 300
# Different enough in content that no single picture decides.
PROMPTS = (
    "a portrait of an old fisherman with a grey beard, soft window light",
    "a busy street market at night, neon signs, many small details",
    "a red circle on a blue background",
    "a snowy mountain valley with a winding river, seen from above",
)


@dataclass(frozen=True)
class Calibration:
    """What was measured. Shares and errors are of 1: `error` is that of the rules in the window where it is
    largest, `errors[ratio][layer][window]` that of one layer by itself, as relative L2 of the clean latents
    that a step predicts.

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
            f"{self.error:.1%} error of {self.budget:.1%} allowed, saves {self.saved:.1%} of the "
            f"multiply-adds at {self.width}x{self.height}"
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


class Calibrator:
    """Collects points of uncompressed runs and measures there: `start` a run, `see` its calls, `measure`."""

    def __init__(self, config: TransformerConfig, height: int, width: int, budget: float, operator="mean"):
        """height, width: of the pictures, in pixels. budget: the relative L2 error that is allowed."""
        if not 0 < budget < 1:
            raise SigmaError(f"The error budget is {budget}; give a share between 0 and 1, such as 0.05.")
        if config.kv_compression is not None:
            raise SigmaError(
                "This checkpoint was trained with KV compression; there is nothing to calibrate."
            )
        self.config, self.height, self.width = config, height, width
        self.budget, self.operator = budget, operator
        self.points: list[tuple[int, Callable, torch.Tensor]] = []
        self.finished = 0  # how many of them are of earlier runs
        self.nearest: dict[int, float] = {}  # of this run: the timestep in each window

    def start(self) -> None:
        """Call it before each run."""
        self.finished, self.nearest = len(self.points), {}

    def see(self, timestep: float, predicted: torch.Tensor, predict: Callable) -> None:
        """Offer one step: the clean latents it predicted uncompressed, and `predict(rules)` to repeat it.

        Of each window the steps of the timestep nearest to its middle are kept.
        """
        progress = 1 - min(timestep, LAST_TIMESTEP) / LAST_TIMESTEP
        window = min(int(progress * WINDOWS), WINDOWS - 1)
        nearest = self.nearest.get(window)
        middle = LAST_TIMESTEP * (1 - (window + 0.5) / WINDOWS)
        if nearest is not None and timestep != nearest:
            if abs(timestep - middle) >= abs(nearest - middle):
                return
            this_run = self.points[self.finished :]
            self.points[self.finished :] = [point for point in this_run if point[0] != window]
        self.nearest[window] = timestep
        self.points.append((window, predict, predicted.float()))

    def measure(self, on_progress: Callable[[int, int], None] = lambda done, total: None):
        """Choose: the rules, their error, and errors[ratio][layer][window], where a window that no step
        was seen of is infinite. `on_progress(done, total)` counts steps that were repeated.
        """
        if not self.points:
            raise SigmaError("No step was run, so there is nothing to measure.")
        layers = range(self.config.num_layers)
        searches = (len(layers) * len(RATIOS) * (len(RATIOS) + 1) // 2).bit_length()
        done, total = 0, len(self.points) * (len(layers) * len(RATIOS) + searches)

        def error_in(window, rules) -> float:
            nonlocal done
            found = []
            for _, predict, predicted in (point for point in self.points if point[0] == window):
                difference = predict(rules).float() - predicted
                found.append(float(difference.norm() / predicted.norm()))
                done += 1
                on_progress(done, total)
            return sum(found) / len(found) if found else math.inf

        alone, chosen, together = [], [], []
        for window in range(WINDOWS):
            error = functools.partial(error_in, window)
            alone.append(
                {ratio: [error(self._rules({layer: ratio})) for layer in layers] for ratio in RATIOS}
            )
            ratios, largest = self._search(alone[window], error)
            chosen.append(ratios)
            together.append(largest)
        on_progress(total, total)
        errors = {
            ratio: [[alone[w][ratio][layer] for w in range(WINDOWS)] for layer in layers] for ratio in RATIOS
        }
        return self._join(chosen), max(together), errors

    def _search(self, alone: dict[int, list[float]], error: Callable) -> tuple[dict[int, int], float]:
        """The largest choice, a ratio for some layers, whose error is within the budget, and that error."""
        prices = self._prices(alone)
        within, largest = {}, 0.0
        low, high = 0, len(prices)
        while low < high:
            middle = (low + high) // 2
            ratios = self._choose(alone, prices[middle])
            together = error(self._rules(ratios))
            if together <= self.budget:
                low, within, largest = middle + 1, ratios, together
            else:
                high = middle
        return within, largest

    def saved(self, rules: tuple[KVCompression, ...]) -> float:
        """The share of multiply-adds that the rules save over the whole schedule."""
        middles = [LAST_TIMESTEP * (1 - (window + 0.5) / WINDOWS) for window in range(WINDOWS)]
        count = [self._count(rules, timestep) for timestep in middles]
        return 1 - sum(count) / (WINDOWS * self._count((), 0))

    def _count(self, rules, timestep: float) -> int:
        return multiply_adds(self.config, self.height, self.width, PROMPT_TOKENS, rules, timestep)

    def _gain(self, ratio: int) -> int:
        """Multiply-adds that one layer saves."""
        return self._count((), 0) - self._count(self._rules({0: ratio}), 0)

    def _rules(self, ratios: dict[int, int]) -> tuple[KVCompression, ...]:
        """The rules that compress each of these layers by its ratio."""
        named = {ratio: tuple(layer for layer in ratios if ratios[layer] == ratio) for ratio in RATIOS}
        return tuple(KVCompression(self.operator, ratio, named[ratio]) for ratio in RATIOS if named[ratio])

    def _prices(self, alone: dict[int, list[float]]) -> list[float]:
        """The squared errors per multiply-add at which some layer takes a further ratio, ascending."""
        prices = set()
        for layer in range(self.config.num_layers):
            steps = [(0, 0.0), *((self._gain(ratio), alone[ratio][layer] ** 2) for ratio in RATIOS)]
            for (gain, error), (further, worse) in itertools.combinations(steps, 2):
                if worse < math.inf:
                    prices.add(max(0.0, worse - error) / (further - gain))
        return sorted(prices)

    def _choose(self, alone: dict[int, list[float]], price: float) -> dict[int, int]:
        """The ratio that saves most where a multiply-add may cost `price`, for each layer that has one."""
        price *= 1 + 1e-9  # rounding must not decide whether a layer is worth its own price

        def worth(layer, ratio):
            return price * self._gain(ratio) - alone[ratio][layer] ** 2

        best = {
            layer: max(RATIOS, key=functools.partial(worth, layer)) for layer in range(self.config.num_layers)
        }
        return {layer: ratio for layer, ratio in best.items() if worth(layer, ratio) >= 0}

    def _join(self, chosen: list[dict[int, int]]) -> tuple[KVCompression, ...]:
        """The rules of the whole run, from the ratios chosen in each window."""
        layers: dict[tuple[int, int, int], list[int]] = {}
        for layer in range(self.config.num_layers):
            window = 0
            for ratio, stretch in itertools.groupby(ratios.get(layer) for ratios in chosen):
                end = window + len(list(stretch))
                if ratio is not None:
                    layers.setdefault((ratio, window, end), []).append(layer)
                window = end
        return tuple(
            KVCompression(self.operator, ratio, tuple(named), start / WINDOWS, end / WINDOWS)
            for (ratio, start, end), named in sorted(layers.items())
        )


def calibrate(
    transformer,
    runs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    prompts: tuple[str, ...],
    *,
    budget: float = 0.05,
    steps: int = 20,
    guidance_scale: float = 4.5,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure a `SigmaTransformer`. `runs` are (latents, prompt_embeds, negative_embeds) as for `denoise`,
    all of one size; `prompts` say what they show. `on_progress(done, total)` counts steps that were repeated.
    """
    from .sampling import denoise, guide, predict_clean
    from .schedulers import make_scheduler

    height, width = (8 * side for side in runs[0][0].shape[-2:])
    calibrator = Calibrator(transformer.sigma_config, height, width, budget)
    scheduler = make_scheduler("dpmpp_2m")

    def watched(latents, timestep, embeds, mask, kv_compression):
        def noise(rules):
            return transformer(latents, timestep, embeds, mask, kv_compression=rules)

        def predicted(noise):
            if guidance_scale > 1:
                noise = guide(noise, guidance_scale)
            return predict_clean(scheduler, latents[: len(noise)].float(), noise.float(), timestep)

        uncompressed = noise(())
        calibrator.see(float(timestep), predicted(uncompressed), lambda rules: predicted(noise(rules)))
        return uncompressed

    for latents, prompt_embeds, negative_embeds in runs:
        calibrator.start()
        denoise(
            watched,
            latents,
            prompt_embeds,
            negative_embeds=negative_embeds,
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
        )
    with torch.no_grad():
        rules, error, errors = calibrator.measure(on_progress)
    return Calibration(
        rules=rules,
        error=error,
        budget=budget,
        saved=calibrator.saved(rules),
        width=width,
        height=height,
        steps=steps,
        prompts=prompts,
        errors=errors,
        fingerprint=fingerprint_of(transformer.state_dict()),
    )
