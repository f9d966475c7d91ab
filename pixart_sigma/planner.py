"""What each stage will need in memory, from the shapes of the models, and the settings that keep a budget.

Nothing is loaded: networks are made without weights, on the meta device, and files are read by their headers.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .errors import SigmaError
from .memory.stages import peak_bytes, readable
from .text.encoder import MAX_TOKENS, read_encoder
from .text.model import PLAIN
from .text.streaming import STREAMED, StreamedT5
from .text.weights import expected_nbytes
from .transformer.checkpoint import Checkpoint
from .transformer.config import TransformerConfig
from .transformer.cost import activation_bytes
from .transformer.network import build_transformer
from .transformer.streaming import parked_nbytes, window_nbytes
from .vae.coding import read_config
from .vae.layers import read_decoder
from .vae.memory import decode_memory, least_budget, whole_decode_bytes

META = torch.device("meta")
# The published shapes: XL/2 of the 1024 files, T5-XXL's encoder, the SDXL VAE.
XL_2 = TransformerConfig(
    sample_size=128,
    interpolation_scale=2.0,
    num_layers=28,
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    patch_size=2,
    caption_channels=4096,
    cross_attention_dim=1152,
)
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


@dataclass(frozen=True)
class Models:
    """Three models by their shapes. `text_weights` are T5's by key; `text_saved` is the precision that a
    quantised T5 was saved in, None for one that can be loaded in any. Without T5, `text_config` is None."""

    transformer: TransformerConfig
    text_config: Any
    text_weights: dict[str, Any]
    text_saved: str | None
    vae: AutoencoderKL


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
    """Settings that keep a budget, what each stage then needs, and why they are so."""

    budget: int
    width: int
    height: int
    count: int
    t5_precision: str | None
    t5_device: str
    transformer_device: str
    guidance_in_turn: bool
    kv_compression: str
    decode_how: str
    decode_budget: int
    stages: dict[str, StagePlan]
    why: str

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak of the run, which is the largest stage's."""
        return max(stage.peak for stage in self.stages.values())

    def as_dict(self) -> dict:
        """Ready for JSON."""
        return asdict(self) | {"peak": self.peak}

    def table(self) -> str:
        """The stages as text for people; GB are 10^9 bytes."""
        rows = [("stage", "how", "weights", "peak", "in RAM")]
        for name, stage in self.stages.items():
            sizes = (readable(stage.weights), readable(stage.peak), readable(stage.ram) if stage.ram else "")
            rows.append((name, stage.how, *sizes))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", self.why])


def published_models() -> Models:
    """PixArt-Sigma's own shapes."""
    from transformers import T5Config

    config = T5Config(**T5_XXL)
    weights = _text_encoder(config, torch.bfloat16).state_dict()
    del weights["encoder.embed_tokens.weight"]  # the same as shared.weight
    return Models(XL_2, config, weights, None, _vae(SDXL_VAE))


def read_models(checkpoint: Checkpoint, text_encoder: Path | None, vae: Path) -> Models:
    """The shapes of models on disk. Raises CheckpointError as loading them does."""
    if text_encoder is None:
        return Models(checkpoint.config, None, {}, None, _vae(read_config(vae)))
    _, config, weights, precision = read_encoder(text_encoder)
    saved = precision if getattr(config, "quantization_config", None) is not None else None
    return Models(checkpoint.config, config, weights, saved, _vae(read_config(vae)))


def plan(
    budget: float,
    width: int,
    height: int,
    count: int = 1,
    models: Models | None = None,
    *,
    guided: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    precision: str | None = None,
    t5_device: str | None = None,
    transformer_device: str = "auto",
    in_ram: bool = False,
    prompt_tokens: int = MAX_TOKENS,
) -> Plan:
    """The settings with which a run keeps `budget` bytes on the device, each stage released after its use.

    For `count` pictures of width x height pixels, with guidance or not, of models (by default the published
    shapes) that compute in `dtype`. Of all ways that fit, the fastest that costs no quality. `precision` of
    T5 None is bf16 where that fits, else int8. `t5_device` "auto" is where the budget counts, "stream" there
    too but from RAM, "cpu" is not; None is the first of them that fits. `transformer_device` "auto" streams
    the transformer where it does not fit otherwise, "stream" in any case. `in_ram` is for a run on the CPU,
    where what waits in RAM counts too, and where the transformer is never streamed.
    Raises SigmaError for a budget that is not positive, and where not even the smallest way of a stage fits:
    it says which, and what it needs.
    """
    if not budget > 0:
        raise SigmaError(f"The budget is {budget:g} bytes; give more than 0, such as 2 GB.")
    models = models or published_models()
    devices = (t5_device,) if t5_device else ("auto",) if in_ram else ("auto", "stream", "cpu")
    places = ("auto",) if in_ram else ("stream",) if transformer_device == "stream" else ("auto", "stream")
    ways = {
        "text encoder": _text_ways(models, precision, dtype, devices, prompt_tokens),
        "transformer": _transformer_ways(models, width, height, count, guided, dtype, places, prompt_tokens),
        "VAE decode": _decode_ways(models, width, height, dtype, budget, in_ram),
    }
    settings = {"t5_precision": None, "t5_device": "auto"}
    if models.text_config is None:
        del ways["text encoder"]
    stages, reasons = {}, []
    for name, candidates in ways.items():
        candidates = list(candidates)
        fitting = [way for way in candidates if way[0].peak <= budget]
        if not fitting:
            least = min(way[0].peak for way in candidates)
            raise SigmaError(
                f"A budget of {readable(budget)} is too small for the {name} of {width}x{height} pixels, "
                f"which needs {readable(least)} at least. Give more, or make a smaller picture."
            )
        stages[name], chosen = fitting[0]
        settings |= chosen
        if fitting[0] is not candidates[0]:
            reasons.append(
                f"{name}: {candidates[0][0].how} needs {readable(candidates[0][0].peak)}, so it is "
                f"{fitting[0][0].how}"
            )
    why = "; ".join(reasons) if reasons else "everything fits in the fastest way"
    return Plan(
        budget=int(budget),
        width=width,
        height=height,
        count=count,
        kv_compression="auto",
        stages=stages,
        why=f"Budget {readable(budget)}: {why}.",
        **settings,
    )


Ways = Iterable[tuple[StagePlan, dict[str, Any]]]


def _text_ways(
    models: Models,
    precision: str | None,
    dtype: torch.dtype,
    devices: tuple[str, ...],
    prompt_tokens: int,
) -> Ways:
    half = "fp16" if dtype == torch.float16 else "bf16"
    fixed = models.text_saved or precision
    precisions = [fixed] if fixed else [half, "int8"]
    encoder = _text_encoder(models.text_config, PLAIN.get(precisions[0], PLAIN[half]))
    ids = torch.zeros(1, prompt_tokens, dtype=torch.long, device=META)
    activations = _peak(lambda: encoder(input_ids=ids))
    for name in precisions:
        if "auto" in devices:
            weights = expected_nbytes(models.text_weights, name, PLAIN.get(name, PLAIN[half]))
            settings = {"t5_precision": name, "t5_device": "auto"}
            yield StagePlan(f"T5 in {name}", weights + activations, weights), settings
    name = precisions[0]
    if "stream" in devices and name in STREAMED:
        computing = PLAIN.get(name, PLAIN[half])
        streamed = StreamedT5(models.text_config, models.text_weights, name, computing, None)
        window = streamed.window_nbytes(torch.device("cuda"))
        settings = {"t5_precision": name, "t5_device": "stream"}
        waiting = expected_nbytes(models.text_weights, name, computing)
        yield StagePlan(f"T5 in {name}, streamed", window + activations, window, waiting), settings
    name = precisions[-1]
    if "cpu" in devices:
        weights = expected_nbytes(models.text_weights, name, PLAIN.get(name, PLAIN[half]))
        settings = {"t5_precision": name, "t5_device": "cpu"}
        yield StagePlan(f"T5 in {name} on the CPU", 0, 0, weights + activations), settings


def _transformer_ways(
    models: Models,
    width: int,
    height: int,
    count: int,
    guided: bool,
    dtype: torch.dtype,
    places: tuple[str, ...],
    prompt_tokens: int,
) -> Ways:
    size = dtype.itemsize
    transformer = build_transformer(models.transformer)
    weights = sum(weight.numel() for weight in transformer.parameters()) * size
    for place in places:
        on_device, in_ram, suffix = weights, 0, ""
        if place == "stream":
            on_device, in_ram = window_nbytes(transformer, dtype), parked_nbytes(transformer, dtype)
            suffix = ", streamed"
        for in_turn in (False, True) if guided else (False,):
            batch = count * (2 if guided and not in_turn else 1)
            activations = activation_bytes(
                models.transformer, batch, -(-height // 8), -(-width // 8), prompt_tokens, size
            )
            how = ("prompt and negative prompt in turn" if in_turn else "in one pass") + suffix
            settings = {"transformer_device": place, "guidance_in_turn": in_turn}
            yield StagePlan(how, on_device + activations, on_device, in_ram), settings


def _decode_ways(
    models: Models, width: int, height: int, dtype: torch.dtype, budget: float, in_ram: bool
) -> Ways:
    if dtype == torch.float16 and models.vae.config.force_upcast:
        dtype = torch.float32  # as the decode does it
    decoder = read_decoder(models.vae)
    shape = (-(-height // 8), -(-width // 8), dtype.itemsize)
    weights = sum(weight.numel() for weight in models.vae.parameters()) * dtype.itemsize
    whole = StagePlan("whole", weights + whole_decode_bytes(decoder, *shape), weights)
    yield whole, {"decode_how": "whole", "decode_budget": 0}
    least = least_budget(decoder, *shape)
    for share in (1, 2, 4, 8):  # smaller strips, where what waits counts too
        room = max((int(budget) - weights) // share, least)
        needed = decode_memory(decoder, *shape, room, in_ram)
        strips = StagePlan("in strips", weights + needed.device, weights, needed.ram)
        yield strips, {"decode_how": "strips", "decode_budget": room}


def _text_encoder(config, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import T5EncoderModel

    with META:
        return T5EncoderModel(config).eval().to(dtype)


def _vae(config: dict) -> AutoencoderKL:
    with META:
        return AutoencoderKL.from_config(config).eval()


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel does it, which makes no scores; the meta device has none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def _peak(use: Callable[[], Any]) -> int:
    with torch.no_grad(), _FusedAttention():
        return peak_bytes(META, use)
