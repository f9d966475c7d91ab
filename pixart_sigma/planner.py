"""What each stage of a run will need in memory, from the shapes of the models, and the ways with which a
budget holds.

Nothing is loaded: networks are made without weights, on the meta device, and files are read by their headers.
Each stage's own file lists its ways (`list_ways`) with what each needs; here the first is picked that fits.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from .choices import DEFAULT_T5_PRECISION, TRANSFORMER_DEVICES
from .errors import SettingError, SigmaError
from .memory.measure import readable
from .memory.ways import Needs, Way
from .settings import Settings, Ways, check_settings, check_ways
from .table import align
from .text import stage as text
from .text.needs import EncoderShapes
from .transformer import stage as transformer
from .transformer.checkpoint import Checkpoint, Quantised
from .transformer.config import XL_2, TransformerConfig
from .transformer.controlnet import check_fits
from .transformer.controlnet_file import inspect_controlnet
from .vae import stage as vae
from .vae.coding import decode_dtype
from .vae.layers import read_decoder
from .vae.loading import SDXL_VAE, build_vae, read_config
from .vae.memory import whole_encode_bytes


@dataclass(frozen=True)
class Models:
    """Three models by their shapes; `text_encoder` is None where the prompts are encoded already."""

    transformer: TransformerConfig
    text_encoder: EncoderShapes | None
    vae: AutoencoderKL
    quantised: Quantised = ()  # of the transformer's weights those that stay quantised
    controlnets: tuple[TransformerConfig, ...] = ()

    @classmethod
    def published(cls) -> "Models":
        """PixArt-Sigma's own: XL/2 of the 1024 files, T5-XXL's encoder, the SDXL VAE."""
        return cls(XL_2, EncoderShapes.published(), build_vae(SDXL_VAE))

    @classmethod
    def read(cls, checkpoint: Checkpoint, text_encoder: Path | None, vae_file: Path) -> "Models":
        """Of models on disk. Raises CheckpointError as loading them does."""
        encoder = EncoderShapes.read(text_encoder) if text_encoder else None
        return cls(checkpoint.config, encoder, build_vae(read_config(vae_file)), checkpoint.quantised)

    def with_controlnets(self, files: Iterable[str | Path]) -> "Models":
        """With ControlNets beside the transformer. Raises CheckpointError for files that are none, and
        SigmaError for those of another transformer."""
        controlnets = tuple(inspect_controlnet(file) for file in files)
        for controlnet in controlnets:
            check_fits(controlnet, self.transformer)
        return replace(self, controlnets=controlnets)


@dataclass(frozen=True)
class StagePlan:
    """How a stage runs, and the bytes it needs: on the device at its peak, its weights among them, and in RAM
    for what waits there."""

    how: str
    peak: int
    weights: int
    ram: int = 0


@dataclass(frozen=True)
class Plan:
    """The ways of a run that keeps a budget, what each stage then needs, and why they are so. width, height:
    at which the transformer works."""

    budget: int
    width: int
    height: int
    count: int
    ways: Ways
    stages: dict[str, StagePlan]
    why: str

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak of the run, which is the largest stage's."""
        return max(stage.peak for stage in self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "budget": self.budget,
            "width": self.width,
            "height": self.height,
            "count": self.count,
            "t5_precision": self.ways.t5_precision,
            "t5_device": self.ways.t5_device,
            "transformer_device": self.ways.transformer_device,
            "guidance_in_turn": self.ways.guidance_in_turn,
            "decode_how": self.ways.decode,
            "decode_budget": self.ways.decode_budget or 0,
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "why": self.why,
            "peak": self.peak,
        }

    def table(self) -> str:
        """The stages as text for people; GB are 10^9 bytes."""
        rows = [("stage", "how", "weights", "peak", "in RAM")]
        for name, stage in self.stages.items():
            sizes = (readable(stage.weights), readable(stage.peak), readable(stage.ram) if stage.ram else "")
            rows.append((name, stage.how, *sizes))
        return "\n".join([align(rows, left=(0, 1)), "", self.why])


def plan(
    settings: Settings,
    ways: Ways,
    models: Models | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    in_ram: bool = False,
    from_picture: bool = False,
) -> Plan:
    """The ways with which a run keeps `ways.budget` bytes on the device, each stage released after its use.

    Of models (by default the published shapes) that compute in `dtype`. Of all ways that fit, the fastest
    that costs no quality. What `ways` says already is kept: a precision or a place of T5, a streamed
    transformer; a precision of None is bf16 where that fits, else int8. `in_ram` is for a run on the CPU,
    where what waits in RAM counts too, and where nothing is streamed. `from_picture`: it starts from a
    picture, which is encoded first, as those for ControlNets are.
    Raises SigmaError without a budget, and where not even the smallest way of a stage fits: it says which,
    and what it needs.
    """
    check_settings(settings)
    check_ways(ways)
    if ways.budget is None:
        raise SettingError("budget", None, "give more than 0 bytes, such as 2 GB (2e9)")
    models = models or Models.published()
    width, height = settings.made_size(models.transformer.sample_size * 8)
    prompt_tokens = settings.max_sequence_length
    work = transformer.Pass(height, width, settings.count, settings.guided, prompt_tokens)
    encoder = models.text_encoder
    possible = {
        "text encoder": _text_ways(encoder, ways, dtype, prompt_tokens, in_ram) if encoder else [],
        "VAE encode": _encode_ways(models.vae, (height, width), dtype)
        if from_picture or models.controlnets
        else [],
        "transformer": _transformer_ways(models, ways, work, dtype, in_ram),
        "VAE decode": _decode_ways(models.vae, (height, width), ways.budget, dtype, in_ram),
    }
    chosen: dict[str, Any] = {}
    stages: dict[str, StagePlan] = {}
    reasons = []
    for stage, candidates in possible.items():
        if not candidates:  # the prompts are encoded already, or there is no picture
            continue
        way = _first_within(ways.budget, stage, candidates, f"{width}x{height}")
        stages[stage] = StagePlan(way.how, **vars(way.needs))
        chosen |= way.chosen
        if way is not candidates[0]:
            first = candidates[0]
            reasons.append(f"{stage}: {first.how} needs {readable(first.needs.peak)}, so it is {way.how}")
    why = "; ".join(reasons) if reasons else "everything fits in the fastest way"
    return Plan(
        budget=int(ways.budget),
        width=width,
        height=height,
        count=settings.count,
        ways=replace(ways, budget=None, **chosen),
        stages=stages,
        why=f"Budget {readable(ways.budget)}: {why}.",
    )


def _first_within(budget: float, stage: str, ways: Iterable[Way], size: str) -> Way:
    peaks = []
    for way in ways:
        peaks.append(way.needs.peak)
        if peaks[-1] <= budget:
            return way
    raise SigmaError(
        f"A budget of {readable(budget)} is too small for the {stage} of {size} pixels, which needs "
        f"{readable(min(peaks))} at least. Give more, or make a smaller picture."
    )


def _text_ways(
    encoder: EncoderShapes, ways: Ways, dtype: torch.dtype, tokens: int, in_ram: bool
) -> list[Way]:
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    fixed = encoder.saved or ways.t5_precision
    precisions = (fixed,) if fixed else ("fp16" if half == torch.float16 else "bf16", DEFAULT_T5_PRECISION)
    places = tuple(text.PLACES)
    if ways.t5_device != "auto":
        places = (ways.t5_device,)
    elif in_ram:
        places = ("auto",)
    possible = list(text.list_ways(precisions, places, partial(encoder.needs, half=half, tokens=tokens)))
    if not possible:
        raise SettingError(
            "t5_device", repr(ways.t5_device), f"T5 in {fixed} cannot be streamed; choose auto or cpu"
        )
    return possible


def _transformer_ways(
    models: Models, ways: Ways, work: transformer.Pass, dtype: torch.dtype, in_ram: bool
) -> list[Way]:
    places = TRANSFORMER_DEVICES
    if in_ram:
        places = ("auto",)
    elif ways.transformer_device != "auto":
        places = (ways.transformer_device,)
    needs = partial(
        transformer.predict_needs,
        models.transformer,
        work,
        dtype,
        quantised=models.quantised,
        controlnets=models.controlnets,
    )
    return list(transformer.list_ways(places, work.guided, needs))


def _encode_ways(network: AutoencoderKL, size: tuple[int, int], dtype: torch.dtype) -> list[Way]:
    """One picture at a time, whole: there is no other way."""
    weights = _weight_bytes(network, dtype)
    peak = weights + whole_encode_bytes(network.config["block_out_channels"], *size, dtype.itemsize)
    return [Way("whole", {}, lambda: Needs(peak, weights))]


def _weight_bytes(network: AutoencoderKL, dtype: torch.dtype) -> int:
    return sum(weight.numel() for weight in network.parameters()) * dtype.itemsize


def _decode_ways(
    network: AutoencoderKL, size: tuple[int, int], budget: float, dtype: torch.dtype, in_ram: bool
) -> list[Way]:
    dtype = decode_dtype(network, dtype)
    shape = (-(-size[0] // 8), -(-size[1] // 8), dtype.itemsize)
    weights = _weight_bytes(network, dtype)
    decoder = read_decoder(network)
    if decoder is None:
        raise SigmaError("This VAE is not built like the SDXL VAE, so its decode cannot be planned.")
    return list(vae.list_ways(decoder, shape, budget - weights, weights=weights, in_ram=in_ram))
