"""How strongly an adapter's files say that it acts: alpha, in all the places where trainers write it."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from ..files.reading import AGAIN, parse_json, parsing, read_json

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' save_lora_weights, and with it SimpleTuner's
TRANSFORMER = ("transformer.", "unet.")  # whose entries there are the transformer's
TEXT_ENCODER = ("text_encoder.",)
# A layer's name or its end. More of a regular expression could be made to run for ever.
PATTERN = re.compile(r"\^?[\w.\\-]+\$?")
NEUMANN_TERMS = 5  # of PEFT and of OneTrainer


@dataclass(frozen=True)
class Scaling:
    """What lies beside an adapter's tensors; all of it empty where nothing does.

    alpha: None where only the tensors say it. patterns: alphas of layers, by their names or ends; ranks:
    likewise, of kinds whose tensors do not show it. root: alpha is over the rank's square root (rsLoRA).
    kind: PEFT's name of it. neumann_terms: of OFT, 0 for the exact inverse.
    """

    alpha: float | None = None
    rank: int | None = None
    patterns: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, float] = field(default_factory=dict)
    root: bool = False
    kind: str = ""
    neumann_terms: int = NEUMANN_TERMS

    def scale(self, layer: str, rank: int, own_alpha: float | None) -> float:
        """The factor of a layer: its own alpha's, else what lies beside it says, else 1, which stands for an
        alpha that is in the weights already."""
        if own_alpha is not None:
            return own_alpha / rank
        alpha = _find(self.patterns, layer, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)

    def rank_of(self, layer: str) -> int | None:
        """The rank that is said of a layer."""
        found = _find(self.ranks, layer, self.rank)
        return None if found is None else int(found)


def read_scaling(file: Path, metadata: dict[str, str], component: tuple[str, ...] = TRANSFORMER) -> Scaling:
    """What PEFT's adapter_config.json beside the file says, else what diffusers wrote into its metadata of
    this component.

    Raises CheckpointError for what can not be obeyed.
    """
    config = file.parent / CONFIG
    if file.stem == "adapter_model" and os.path.isfile(config):
        return _of(read_json(config), config)
    if METADATA not in metadata:
        return Scaling()
    with parsing(file, f"has a {METADATA} that can not be read", AGAIN):
        said = parse_json(metadata[METADATA])
        found = {
            name.removeprefix(prefix): value
            for prefix in component
            for name, value in said.items()
            if name.startswith(prefix)
        }
    return _of(found, file)


def _of(said: dict, source: Path) -> Scaling:
    if said.get("coft"):
        raise CheckpointError(f"{source} says coft, constrained OFT, which is not read here; merge it first.")
    alpha = said.get("lora_alpha", said.get("alpha"))
    terms = said.get("num_cayley_neumann_terms", NEUMANN_TERMS)
    rank = said.get("r") or None  # OFT of a fixed block size has none
    numbers = {"lora_alpha": alpha, "r": rank, "num_cayley_neumann_terms": terms}
    patterns = {name: said.get(name) or {} for name in ("alpha_pattern", "rank_pattern")}
    for name, found in patterns.items():
        if not isinstance(found, dict):
            raise CheckpointError(f"{source} says {name} {found!r}, which is no table of layers.")
        for pattern, value in found.items():
            if not PATTERN.fullmatch(pattern):
                raise CheckpointError(f"{source} has the {name} {pattern!r}; a layer's name is read.")
            numbers[f"{name} of {pattern}"] = value
    for name, value in numbers.items():
        if value is not None and (not _is_number(value) or value <= 0):
            raise CheckpointError(f"{source} says {name} {value!r}; a number above 0 is needed.")
    return Scaling(
        alpha,
        rank,
        patterns["alpha_pattern"],
        patterns["rank_pattern"],
        bool(said.get("use_rslora")),
        str(said.get("peft_type") or ""),
        int(terms) if said.get("use_cayley_neumann", True) else 0,
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _find(patterns: dict[str, float], layer: str, default: float | None) -> float | None:
    """As PEFT's get_pattern_key: the first pattern that the layer's name ends with."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise CheckpointError(f"{pattern!r} is no name of a layer: {error}.") from error
    return default
