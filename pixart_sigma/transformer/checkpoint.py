"""What a file or folder is, from headers alone, and its transformer's state dict in diffusers' keys.

The published PixArt-Sigma weights come in two spellings: the authors' (`blocks.0.attn.qkv.weight`) and
diffusers' (`transformer_blocks.0.attn1.to_q.weight`). Which size they were trained for is not in the weights.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from .. import DEMO, DEMO_KV
from ..choices import VARIANTS
from ..errors import CheckpointError, SettingError
from ..files.locating import find_weight_files, resolve
from ..files.parts import MARKERS
from ..files.quantised_layers import pair_scales
from ..files.quantised_weights import QuantisedWeight, describe_storage, split_rows
from ..files.quantization import quantization_of
from ..files.reading import read_json
from ..files.weight_files import read_facts, read_header, read_metadata, read_outline, read_state_dict
from ..noise_schedule import PUBLISHED, NoiseSchedule
from .config import TransformerConfig, check_keys, left_over_key, read_config
from .keys import DROPPED, MODULES, to_diffusers_keys
from .other_models import refuse_alpha, refuse_alpha_pipeline, refuse_other_model, refuse_quantized
from .quantised import stays_quantised
from .variant import find_variant

COMPONENTS = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
MODELS = {"text_encoder", "transformer", "vae"}  # one of which makes a folder a pipeline's
DEMOS = (DEMO / "transformer", DEMO_KV)
# The patch convolution by both spellings, which is never scaled where linear layers are.
CONVOLUTIONS = ("x_embedder.proj.weight", "pos_embed.proj.weight")
# Of linear weights that stay quantised the name and, on the meta device, how they are stored.
Quantised = tuple[tuple[str, QuantisedWeight], ...]
STORAGE_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


@dataclass(frozen=True)
class Checkpoint:
    """What `inspect` found.

    dtype: the one that most of the weights are stored in, float32 where they are quantised. variant_source:
    what said it, "default" for a guess. latent_format: whose latents it makes, "sdxl" or the "demo"'s.
    noise_schedule: the published one where nothing beside or in the weights says otherwise. storage: how the
    weights are stored, in words. quantised: the weights of linear layers that stay so.
    """

    path: Path
    kind: str
    key_style: str
    dtype: torch.dtype
    variant: str
    variant_source: str
    components: dict[str, Path]
    config: TransformerConfig
    files: tuple[Path, ...]
    latent_format: str = "sdxl"
    noise_schedule: NoiseSchedule = PUBLISHED
    storage: str = ""
    quantised: Quantised = ()

    @property
    def variant_notice(self) -> str:
        """What to tell whoever loads it when the variant is a guess, or ""."""
        if self.variant_source != "default":
            return ""
        return (
            f"Nothing says which size {self.path.name} was trained for: neither a config.json, nor the file, "
            f"nor its name. {self.variant} is assumed."
        )

    @property
    def facts(self) -> dict:
        """What of it can not be seen from the weights, for `facts_tensor`: `inspect` reads it from there."""
        return {
            "config": self.config.to_diffusers(),
            "latent_format": self.latent_format,
            "noise_schedule": self.noise_schedule.as_dict(),
        }

    def describe(self) -> str:
        """A few lines for people."""
        config = self.config
        names = ", ".join(file.name for file in self.files)
        width = config.num_attention_heads * config.attention_head_dim
        kv = config.kv_compression
        compressed = (
            f"trained, ratio {kv.ratio} on layers {', '.join(map(str, kv.layers))}"
            if kv
            else "no trained weights"
        )
        source = {
            "default": "assumed, nothing says so: choose it with --variant",
            "user": "as you chose",
        }.get(self.variant_source, f"from {self.variant_source}")
        return "\n".join(
            [
                f"{self.path}: PixArt-Sigma {self.kind}",
                f"variant         {self.variant} ({source}): {config.sample_size * 8} pixels, "
                f"interpolation {config.interpolation_scale:g}",
                f"transformer     {config.num_layers} layers, width {width} in "
                f"{config.num_attention_heads} heads, prompt width {config.caption_channels}"
                + (", qk-norm" if config.qk_norm else ""),
                f"KV compression  {compressed}",
                f"noise schedule  {self.noise_schedule.describe()}",
                f"weights         {self.key_style} keys, {self.storage}, {names}",
                f"components      {', '.join(self.components)}",
            ]
        )


def inspect(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Say what a pipeline folder, a transformer folder, a weight file or an index is, from headers only.

    The variant is the caller's, else that of config.json or of what was saved with the weights, of
    `pos_embed`'s shape, of the metadata, of the file's name, else 1024. Raises CheckpointError, naming what
    is wrong, for anything but a whole PixArt-Sigma transformer.
    """
    path = resolve(path)
    if variant is not None and variant not in VARIANTS:
        raise CheckpointError(f"Unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}.")
    components = find_components(path)
    kind = "pipeline" if components else "transformer"
    source = path
    if components:
        if "transformer" not in components:
            raise CheckpointError(
                f"{path} has no transformer, only {', '.join(components)}. Choose a "
                "transformer beside it: --transformer, or another choice in Load Σ Transformer."
            )
        source = components["transformer"]
        refuse_alpha_pipeline(path)
    else:
        components = {"transformer": path}
    files = find_weight_files(source)
    settings, facts = _read_settings(source, files[0]), read_facts(source)
    settings = settings or _dict(facts.get("config"))
    refuse_alpha(settings, source)
    metadata = read_metadata(source)

    outline = read_outline(source, part="transformer")
    key_style = _find_spelling(outline, source)
    positions = outline.get("pos_embed")
    outline = _pair(outline, metadata, source)
    dtypes = [weight.dtype for weight in outline.values()]
    refuse_quantized(quantization_of(outline, dtypes, settings), source)
    weights = _rename(outline, key_style, source)
    header = {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    chosen, variant_source = find_variant(
        variant, settings, None if positions is None else tuple(positions.shape), metadata, source, files[0]
    )
    config = read_config(header, settings, source)
    config = _set_variant(config, chosen, {} if variant_source == "user" else settings, source)
    check_keys(header, config, source)
    return Checkpoint(
        path,
        kind,
        key_style,
        _storage_dtype(header, source),
        chosen,
        variant_source,
        components,
        config,
        files,
        "demo" if source.absolute() in DEMOS or facts.get("latent_format") == "demo" else "sdxl",
        _find_noise_schedule(path, source, files[0], _dict(facts.get("noise_schedule"))),
        describe_storage(weights),
        tuple((name, weight) for name, weight in weights.items() if stays_quantised(name, weight)),
    )


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def find_components(path: str | Path) -> dict[str, Path]:
    """The component folders of a pipeline folder, by name; empty when `path` is not one."""
    path = resolve(path)
    # os.path answers False where there is no permission; opening the weights then says so.
    found = {name: path / name for name in COMPONENTS if os.path.isdir(path / name)}
    if not os.path.isfile(path / "model_index.json") and not found.keys() & MODELS:
        return {}
    return found


def load_transformer_state_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's weights in diffusers' keys and the file's dtype, memory-mapped where possible;
    quantised ones as QuantisedWeight.

    KV weights are `transformer_blocks.N.attn1.sr.*` (C, 1, r, r) and `attn1.norm.*` (C,), qk-norm is
    `attn1.norm_q.*` and `attn1.norm_k.*` (C,). Raises CheckpointError when the file is no longer what it was.
    """
    source = checkpoint.components["transformer"]
    state_dict = read_state_dict(source, part="transformer")
    key_style = _find_spelling(state_dict, source)
    state_dict = _rename(_pair(state_dict, read_metadata(source), source), key_style, source)
    check_keys(
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state_dict.items()},
        checkpoint.config,
        source,
    )
    return state_dict


def _read_settings(source: Path, file: Path) -> dict:
    """The transformer's config.json; beside a single file only where diffusers itself names it so."""
    if os.path.isdir(source) or file.name.startswith("diffusion_pytorch_model"):
        config = file.parent / "config.json"
        if os.path.isfile(config):
            return read_json(config)
    return {}


def read_noise_schedule(folder: Path) -> NoiseSchedule | None:
    """What a pipeline folder's scheduler_config.json says; None where there is none. Raises CheckpointError
    for what cannot be obeyed."""
    config = folder / "scheduler" / "scheduler_config.json"
    return NoiseSchedule.from_config(read_json(config), str(config)) if os.path.isfile(config) else None


def _find_noise_schedule(path: Path, source: Path, file: Path, saved: dict) -> NoiseSchedule:
    """That of the pipeline folder that the transformer lies in, else what was `saved` with the weights, else
    what ComfyUI's markers there say."""
    folder = source if os.path.isdir(source) else file.parent
    own = os.path.isdir(source) or file.name.startswith("diffusion_pytorch_model")
    pipeline = folder.absolute().parent if own and folder.name == "transformer" else path
    if found := read_noise_schedule(pipeline):
        return found
    if saved:
        try:
            return NoiseSchedule.from_dict(saved, source="the file")
        except SettingError as error:
            raise CheckpointError(f"{source} says of its noise schedule: {error}") from error
    # Into no other format, whose header may cost as much as the weights.
    keys = read_header(source) if file.suffix == ".safetensors" else {}
    markers = [key for key in MARKERS if key in keys]
    if "v_pred" not in markers:
        return PUBLISHED
    return NoiseSchedule(
        prediction_type="v_prediction", rescale_betas_zero_snr="ztsnr" in markers, source=", ".join(markers)
    )


def _find_spelling(keys, source: Path) -> str:
    """Whose names the transformer's keys are, "original" or "diffusers"."""
    spellings = {"original": list(MODULES), "diffusers": list(MODULES.values())}
    found = {style: sum(f"{name}.weight" in keys for name in names) for style, names in spellings.items()}
    best = max(found, key=lambda style: found[style])
    # A damaged PixArt-Sigma should be told which key it lacks, and another model what it is.
    if found[best] < len(MODULES) // 2:
        refuse_other_model(keys, source)
    return best


def _pair(values: dict, metadata: dict[str, str], source: Path) -> dict:
    """The weights with their scales, where ComfyUI's formats have some."""
    return pair_scales(
        values, metadata, source, lambda name: name.endswith(".weight") and name not in CONVOLUTIONS
    )


def _rename(values: dict, key_style: str, source: Path) -> dict:
    """The same weights under diffusers' keys, fused ones taken apart."""
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        refuse_alpha(key, source)
        if key in DROPPED[key_style]:
            continue
        if key_style == "diffusers":
            # The names that diffusers' own converter writes for qk-norm.
            names: tuple[str, ...] = (re.sub(r"\.attn1\.([qk])_norm\.", r".attn1.norm_\1.", key),)
        else:
            names = to_diffusers_keys(key)
            if not names:
                raise left_over_key(key, source)
        shape = tuple(value.shape)
        if len(names) > 1 and (not shape or shape[0] % len(names)):
            raise CheckpointError(f"{source}: {key} is {shape}, which is not {len(names)} equal parts.")
        renamed.update(zip(names, split_rows(value, len(names)) if len(names) > 1 else [value], strict=True))
    return renamed


def _set_variant(config: TransformerConfig, variant: str, settings: dict, source: Path) -> TransformerConfig:
    sample_size, interpolation_scale = VARIANTS[variant]
    explicit = settings.get("interpolation_scale")
    if explicit is not None:
        if not isinstance(explicit, int | float) or isinstance(explicit, bool) or not 0 < explicit < 1000:
            raise CheckpointError(f"The config of {source} says interpolation_scale {explicit!r}.")
        interpolation_scale = float(explicit)
    return replace(config, sample_size=sample_size, interpolation_scale=interpolation_scale)


def _storage_dtype(header: dict, source: Path) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for key, (shape, dtype) in header.items():
        if dtype not in STORAGE_DTYPES:
            raise CheckpointError(
                f"{source} stores {key} as {dtype}; weights in float32, float16, bfloat16 or float8 are read."
            )
        counts[dtype] += prod(shape)
    return counts.most_common(1)[0][0]
