"""Adapters of the transformer (LoRA and its kin), of any trainer: read, checked, and turned into changes of
its weights.

`read_adapter` knows the names (`lora_names`), what lies beside the tensors (`lora_scaling`) and what they do
(`lora_kinds`). Nothing is applied in part: what can not be understood as a whole is refused, with the reason.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files.fingerprint import fingerprint
from ..files.locating import locate, resolve
from ..files.weight_files import read_metadata, read_state_dict
from .changes import Change, Edit, Read, make_changes
from .config import XL_2, KVWeights, TransformerConfig, expected_shapes
from .lora_kinds import Layer, edits_of, find_family
from .lora_layers import group_layers
from .lora_names import LayerNames, is_embedding, is_text_encoders
from .lora_scaling import CONFIG, TEXT_ENCODER, Scaling, read_scaling
from .lora_text import TextPart
from .other_models import ALPHA_KEYS

# Of an adapter in a folder, before any other file there.
USUAL_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
# In the names of other models' layers.
OTHER_MODELS = {
    "Stable Diffusion or SDXL": ("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks"),
    "Flux or a model like it": ("single_transformer_blocks", "double_blocks", "single_blocks"),
    "Stable Diffusion 3": ("joint_blocks", "add_k_proj"),
}
MOST_NAMED = 3  # of names in a message
MOST_LAYERS = 100  # of a transformer that nobody has named


@dataclass(frozen=True)
class Contents:
    """What a file holds, without a transformer to compare it with.

    spellings: whose names the layers have, and how many. text: what is for the text encoder. embeddings: how
    many tensors are for words of its own. unmatched: names that are nobody's.
    """

    source: Path
    file: Path
    layers: tuple[Layer, ...]
    scaling: Scaling
    metadata: dict[str, str]
    spellings: Counter
    text: TextPart | None
    embeddings: int
    unmatched: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a transformer. notices: what of the file is not used, for people. fingerprint: of
    all that decides what it does. text: what it has for the text encoder, which is not the transformer's."""

    source: Path
    edits: tuple[Edit, ...] = field(repr=False)
    notices: tuple[str, ...]
    fingerprint: str
    text: TextPart | None = None


def read_adapter(source: str | Path, config: TransformerConfig) -> Adapter:
    """Read an adapter, a file or folder, for a transformer of this config.

    Raises CheckpointError for a file that is damaged, that is none, or that was made for another model.
    """
    return fit_adapter(source, expected_shapes(config))


def fit_adapter(source: str | Path, shapes: dict[str, tuple[int, ...]]) -> Adapter:
    """`read_adapter`, for a transformer whose weights, by diffusers' names, have these shapes."""
    contents = read_contents(source, LayerNames(shapes))
    check_contents(contents)
    if contents.unmatched:
        raise CheckpointError(
            f"{contents.source} changes what this transformer does not have: {_named(contents.unmatched)}. "
            "It was made for another model."
        )
    edits = [
        edit
        for layer in contents.layers
        for edit in edits_of(layer, shapes, contents.scaling, contents.source)
    ]
    notices = tuple(_notices(contents))
    return Adapter(contents.source, tuple(edits), notices, contents.fingerprint, contents.text)


def adapter_changes(adapters: Iterable[tuple[Adapter, float]], read: Read) -> dict[str, Change]:
    """What adapters, each with its strength, do to the weights, in order; see `make_changes`."""
    return make_changes(((edit, strength) for adapter, strength in adapters for edit in adapter.edits), read)


def read_contents(source: str | Path, names: LayerNames | None = None) -> Contents:
    """Take an adapter's file apart. names: of the transformer it is for, None for any PixArt-Sigma.

    Raises CheckpointError for a file that can not be read, and where two tensors or modules have one name.
    """
    source = resolve(source)
    file = find_file(source)
    names = names or any_names()
    tensors = read_state_dict(file)
    metadata = read_metadata(file)
    text = {key: tensor for key, tensor in tensors.items() if is_text_encoders(key)}
    beside = {key for key in tensors if is_embedding(key)}
    own = {key: tensor for key, tensor in tensors.items() if key not in text and key not in beside}
    grouped = group_layers(own, names, source)
    scaling, said = read_scaling(file, metadata), [read_scaling(file, metadata)]
    if text:
        said.append(read_scaling(file, metadata, TEXT_ENCODER))
    known = fingerprint(tensors, *(repr(one).encode() for one in said))
    return Contents(
        source,
        file,
        grouped.layers,
        scaling,
        metadata,
        grouped.spellings,
        TextPart(source, text, said[-1], known) if text else None,
        len(beside),
        grouped.unmatched,
        known,
    )


def check_contents(contents: Contents) -> None:
    """CheckpointError for a file that holds no adapter of PixArt-Sigma's transformer."""
    source, unmatched = contents.source, contents.unmatched
    for name in unmatched:
        if any(key.rstrip(".") in name or key.rstrip(".").replace(".", "_") in name for key in ALPHA_KEYS):
            raise CheckpointError(f"{source} is an adapter of PixArt-alpha ({name}), another model.")
    if not contents.layers:
        for model, marks in OTHER_MODELS.items():
            if any(mark in name for mark in marks for name in unmatched):
                raise CheckpointError(
                    f"{source} is an adapter of {model} ({unmatched[0]}), and not of PixArt-Sigma."
                )
        if contents.text and not unmatched:
            return
        raise CheckpointError(
            f"{source} is no adapter of PixArt-Sigma: it has {_named(unmatched) or 'no tensors'}."
        )
    kinds = {family.words for layer in contents.layers if (family := find_family(layer, source))}
    if kinds == {"replaced"}:
        raise CheckpointError(
            f"{source} holds whole weights and no changes of them: it is no adapter. Choose it as the "
            "transformer."
        )


def find_file(source: Path) -> Path:
    """The weight file of an adapter: itself, or that of a folder."""
    if os.path.isdir(source):
        for name in USUAL_FILES:
            if os.path.lexists(source / name):
                return source / name
    return locate(source)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder has an adapter under one of the usual names."""
    return any(os.path.isfile(folder / name) for name in USUAL_FILES)


def written_by(contents: Contents) -> str:
    """Who wrote an adapter, by what it says and by the spelling of its names."""
    metadata = contents.metadata
    said = ""
    if "ot_branch" in metadata or "ot_revision" in metadata:
        said = "OneTrainer"
    elif "ai-toolkit" in metadata.get("software", ""):
        said = "ai-toolkit"
    elif any(name.startswith("ss_") for name in metadata):
        said = "sd-scripts (kohya)"
    elif contents.scaling.kind:
        said = f"PEFT ({contents.scaling.kind})"
    spelled = ", ".join(contents.spellings)
    return f"{said}, in the names of {spelled}" if said else f"someone who names layers as {spelled}"


def any_names() -> LayerNames:
    """The names of the layers of any PixArt-Sigma transformer, with all that one may have."""
    layers = tuple(range(MOST_LAYERS))
    config = replace(XL_2, num_layers=MOST_LAYERS, qk_norm=True, kv_compression=KVWeights(2, layers))
    return LayerNames(expected_shapes(config))


def _notices(contents: Contents) -> list[str]:
    notices = []
    name = contents.source.name
    if contents.embeddings:
        notices.append(
            f"{name} also holds embeddings of its own words ({contents.embeddings} tensors), which are not "
            "used here."
        )
    if contents.spellings.get("PEFT") and contents.scaling == Scaling():
        notices.append(
            f"{name} is PEFT's, and there is no {CONFIG} beside an adapter_model file, which says its alpha: "
            "it is taken to be as large as the rank."
        )
    return notices


def _named(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def kinds_of(contents: Contents) -> Counter:
    """How many layers are changed in which way, in words."""
    counted: Counter = Counter()
    for layer in contents.layers:
        family = find_family(layer, contents.source)
        words = family.words if family else "bias"
        if {"magnitude", "dora_scale"} & layer.tensors.keys():
            words += " with DoRA"
        counted[words] += 1
    return counted


def alphas_of(contents: Contents) -> set[float]:
    """The alphas that the tensors and what lies beside them say."""
    own = {float(layer.tensors["alpha"].float()) for layer in contents.layers if "alpha" in layer.tensors}
    if own or contents.scaling.alpha is None:
        return own
    return {float(contents.scaling.alpha), *map(float, contents.scaling.patterns.values())}


def ranks_of(contents: Contents) -> set[int]:
    """The ranks of low-rank layers, and the block sizes of rotations."""
    ranks = set()
    for layer in contents.layers:
        for part in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if part in layer.tensors:
                ranks.add(len(layer.tensors[part]))
                break
    return ranks


def merged(state_dict: dict[str, torch.Tensor], changes: dict[str, Change]) -> dict[str, torch.Tensor]:
    """The weights with the changes made, in float32 where something changes."""
    return {
        name: changes[name](weight.to(torch.float32)) if name in changes else weight
        for name, weight in state_dict.items()
    }
