"""Token compression of keys and values in self-attention (PixArt-Sigma, arXiv 2403.04692, section 2.3).

Queries keep every token; keys and values of the chosen layers are merged over windows of ratio x ratio
tokens, so that attention over N tokens costs N * N / ratio**2. Operators:

- `conv`: the paper's. Projected keys and values pass a depthwise convolution and a LayerNorm, both trained.
- `mean`: the window's average, taken before the projections. Needs no trained weights; an approximation.
- `uniform`: the window's first token.
- `uniform_every`: each ratio-th token of the flat sequence, so that N / ratio are left.
- `ave`: the authors' name for nearest-neighbour resizing, which is not an average: it is `uniform`, but an
  edge that does not fill a window is left out.

Where the grid is not a multiple of the ratio, `mean` averages the tokens that an edge window has, `uniform`
takes its first, and `conv` and `ave` leave the edge out. Those two do not compress a grid narrower than one
window.
"""

import functools
import logging
import re
from dataclasses import dataclass

from ..errors import SigmaError
from ..schedule_part import SchedulePart
from .config import TransformerConfig

OPERATORS = ("mean", "conv", "uniform", "uniform_every", "ave")
RATIOS = (2, 3, 4)
SPELLING = "off, auto or OPERATOR:RATIO:LAYERS[:START-END%], such as mean:2:14-27 or mean:2:deep:20-80%"
AUTO_PIXELS = 1024 * 1024


@dataclass(frozen=True)
class KVCompression:
    """One rule of how keys and values are compressed; a run's setting is a tuple of such rules.

    `layers` are block numbers from 0. `start` and `end` bound the part of the noise schedule in which the
    rule acts: 0 is pure noise (timestep 999), 1 the clean picture (timestep 0). Of several rules for one
    layer the first that acts counts; with no rule nothing is compressed.
    Raises SigmaError for an unknown operator, a ratio below 2, a negative layer or bounds out of order.
    """

    operator: str
    ratio: int
    layers: tuple[int, ...]
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if self.operator not in OPERATORS:
            known = ", ".join(OPERATORS)
            raise SigmaError(f"Unknown KV compression operator {self.operator!r}. Use one of {known}.")
        if not isinstance(self.ratio, int) or isinstance(self.ratio, bool) or self.ratio < 2:
            raise SigmaError(f"KV compression ratio must be a whole number from 2, not {self.ratio!r}.")
        if not self.layers or not all(isinstance(layer, int) and layer >= 0 for layer in self.layers):
            raise SigmaError(f"KV compression layers must be block numbers from 0, not {self.layers!r}.")
        _ = self.part  # which raises for bounds out of order

    def __str__(self) -> str:
        """The spelling that `parse` reads."""
        text = f"{self.operator}:{self.ratio}:{_spell_layers(self.layers)}"
        if self.windowed:
            text += f":{self.part}"
        return text

    def check(self, config: TransformerConfig) -> None:
        """Raises SigmaError if this config lacks a layer, or `conv` its trained weights."""
        beyond = [layer for layer in self.layers if layer >= config.num_layers]
        if beyond:
            raise SigmaError(
                f"KV compression names layer {beyond[0]}, "
                f"but this transformer has layers 0 to {config.num_layers - 1}."
            )
        if self.operator != "conv":
            return
        trained = config.kv_compression
        if trained is None:
            raise SigmaError(
                "KV compression by conv needs trained weights and this checkpoint has none. Use mean instead."
            )
        if self.ratio != trained.ratio or not set(self.layers) <= set(trained.layers):
            raise SigmaError(
                f"This checkpoint's KV weights are trained as {spell(as_trained(config))}, so {self} cannot "
                "run. Use auto, or another operator such as mean."
            )

    @property
    def part(self) -> SchedulePart:
        return SchedulePart(self.start, self.end)

    @property
    def windowed(self) -> bool:
        """Whether it acts in a part of the noise schedule only."""
        return not self.part.whole

    def acts_at(self, timestep: float) -> bool:
        """Whether it acts at `timestep` (0 to 999)."""
        return self.part.holds(timestep)


OFF = ()


def parse(text: str, num_layers: int) -> tuple[KVCompression, ...]:
    """Read OPERATOR:RATIO:LAYERS[:START-END%] for a transformer of `num_layers` blocks; "off" is no rule.

    LAYERS is `all`, `deep` (the deeper half), or block numbers and ranges from 0 such as `3,14-27`;
    START-END% is the part of the noise schedule. Several rules are joined by `+`. Raises SigmaError, with the
    value seen, for anything else, `auto` included: that depends on the picture's size, see `resolve`.
    """
    text = text.strip().lower()
    if text == "off":
        return OFF
    return tuple(_parse_rule(rule.strip(), num_layers) for rule in text.split("+"))


def spell(rules: tuple[KVCompression, ...]) -> str:
    """The spelling of a setting that `parse` reads."""
    return "+".join(map(str, rules)) or "off"


def resolve(
    setting: str | tuple[KVCompression, ...] | None,
    config: TransformerConfig,
    height: int,
    width: int,
    calibrated: tuple[KVCompression, ...] | None = None,
) -> tuple[KVCompression, ...]:
    """The rules that a run of height x width pixels uses on a transformer of this config.

    None: as the checkpoint was trained. "auto": that, or for a checkpoint without KV weights nothing up to
    1024x1024 pixels, and above what `calibrated` says, without which it is mean:2 on the deeper half of the
    layers. Otherwise as `parse`. Raises SigmaError if the setting does not fit the transformer.
    """
    if setting is None:
        return as_trained(config)
    if isinstance(setting, str) and setting.strip().lower() == "auto":
        trained = as_trained(config)
        if trained or height * width <= AUTO_PIXELS:
            return trained
        setting = calibrated
        if setting is None:
            setting = parse("mean:2:deep", config.num_layers)
            _say_not_measured(spell(setting))
    if isinstance(setting, str):
        setting = parse(setting, config.num_layers)
    for rule in setting:
        rule.check(config)
    return setting


@functools.cache
def _say_not_measured(spelling: str) -> None:
    logging.getLogger(__name__).warning(
        f"KV compression is {spelling}, which was not measured on this checkpoint; calibrate measures it."
    )


def as_trained(config: TransformerConfig) -> tuple[KVCompression, ...]:
    """The compression that a checkpoint's KV weights were trained with; without them no rule."""
    trained = config.kv_compression
    return () if trained is None else (KVCompression(trained.sampling, trained.ratio, tuple(trained.layers)),)


def acting(rules: tuple[KVCompression, ...], layer: int, timestep: float) -> KVCompression | None:
    """The rule that compresses block `layer` at `timestep` (0 to 999), or None."""
    return next((rule for rule in rules if layer in rule.layers and rule.acts_at(timestep)), None)


def _parse_rule(text: str, num_layers: int) -> KVCompression:
    parts = text.split(":")
    if len(parts) not in (3, 4):
        raise SigmaError(f"KV compression {text!r} is not understood. Write {SPELLING}.")
    operator, ratio, layers = (part.strip() for part in parts[:3])
    if ratio not in map(str, RATIOS):
        raise SigmaError(f"KV compression ratio must be 2, 3 or 4, not {ratio!r}.")
    part = SchedulePart.parse(parts[3]) if len(parts) == 4 else SchedulePart()
    return KVCompression(operator, int(ratio), _parse_layers(layers, num_layers), part.start, part.end)


def _parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(num_layers))
    if text == "deep":
        return tuple(range(num_layers // 2, num_layers))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None:
            raise SigmaError(
                f"KV compression layers {text!r} are not understood. "
                "Write all, deep, or block numbers such as 14-27."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise SigmaError(
                f"KV compression layers {part.strip()!r} are out of range: this transformer has layers 0 to "
                f"{num_layers - 1}, and a range is written from the lower to the higher."
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _spell_layers(layers: tuple[int, ...]) -> str:
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
