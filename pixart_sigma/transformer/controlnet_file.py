"""A ControlNet from its file, in either spelling."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files.parts import kind_of, place
from ..files.quantization import quantization_of
from ..files.reading import read_json
from ..files.weight_files import read_header, read_state_dict
from .attention import torch_attention
from .config import XL_2, TransformerConfig, find_heads
from .controlnet import ControlNet
from .keys import to_diffusers_keys
from .network import build_transformer, layer_classes

# As diffusers' and SimpleTuner's trainers write it, and as the authors' of PixArt-alpha do, whose file holds
# the transformer too; what stands in front is a wrapper's.
KEY = re.compile(r"(?:.*\.)?controlnet_blocks\.(\d{1,4})\.(before_proj|transformer_block|after_proj)\.(.+)")
AUTHORS_KEY = re.compile(r"(?:.*\.)?controlnet\.(\d{1,4})\.(before_proj|copied_block|after_proj)\.(.+)")
OF_TRANSFORMER = re.compile(r"(?:.*\.)?(?:base_model|transformer)\.")
ADAPTER = re.compile(r"\.(?:lora_[AB]|lora_down|lora_up|lokr_w[12]|hada_w[12]_[ab])\b")


def is_controlnet(path: str | Path) -> bool:
    """Whether a file or folder holds a ControlNet of PixArt, by the names in its header alone.

    Raises CheckpointError for what can not be read.
    """
    return any(KEY.fullmatch(name) or AUTHORS_KEY.fullmatch(name) for name in read_header(path))


def inspect_controlnet(path: str | Path) -> TransformerConfig:
    """The transformer that has this ControlNet's blocks alone, from the header.

    Raises CheckpointError for anything but a ControlNet of PixArt, for weights that are missing, left over,
    twice, quantised or of another shape.
    """
    header = read_header(path)
    _check_kind(header, path)
    held = _rename_all(header, _split_shape, path)
    shapes = {name: shape for name, (shape, _) in held.items()}
    config = _read_config(shapes, Path(path))
    _check_shapes(shapes, build_controlnet(config), path)
    for name, (_, dtype) in held.items():
        if not dtype.is_floating_point:
            raise CheckpointError(f"{path} is damaged: {name} holds {dtype} numbers. Download it again.")
    return config


def describe_controlnet(path: str | Path) -> str:
    """A few lines for people. Raises CheckpointError for anything but a ControlNet of PixArt."""
    config = inspect_controlnet(path)
    return (
        f"{path}: a ControlNet of PixArt\n"
        f"layers          {config.num_layers}, width {config.cross_attention_dim} in "
        f"{config.num_attention_heads} heads: for a transformer of this width and more layers"
    )


def load_controlnet(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> ControlNet:
    """The ControlNet in a file or folder, in eval mode and without gradients.

    Weights are cast one by one. Raises CheckpointError for anything else, and for weights that are missing,
    left over or not finite.
    """
    config, state_dict = read_controlnet(path)
    for name in state_dict:
        state_dict[name] = state_dict[name].to(device=device, dtype=dtype)
    controlnet = build_controlnet(config)
    controlnet.load_state_dict(state_dict, assign=True)
    return controlnet.eval().requires_grad_(False)


def read_controlnet(path: str | Path) -> tuple[TransformerConfig, dict[str, torch.Tensor]]:
    """Its config and its weights by the names of diffusers' format, in the file's dtype; memory-mapped where
    they can be. Raises as `load_controlnet`."""
    config = inspect_controlnet(path)
    state_dict = _rename_all(read_state_dict(path), torch.chunk, path)
    for name, weight in state_dict.items():
        if not weight.float().isfinite().all():
            raise CheckpointError(f"{path} is damaged: {name} is not finite. Download it again.")
    return config, state_dict


def build_controlnet(config: TransformerConfig, operations=torch.nn, attention=torch_attention) -> ControlNet:
    """A ControlNet without weights (on the meta device), with copies of all blocks of a transformer of this
    config; the arguments are those of `build_transformer`."""
    transformer = build_transformer(config, operations, attention)
    with layer_classes(operations), torch.device("meta"):
        return ControlNet(config, transformer.transformer_blocks)


def _read_config(shapes: dict[str, tuple[int, ...]], path: Path) -> TransformerConfig:
    """From the shapes by name, and the head count from a config.json if there is one."""
    layers = {int(found[1]) for found in map(KEY.fullmatch, shapes) if found}
    missing = next((index for index in range(len(layers)) if index not in layers), None)
    shape = shapes.get("controlnet_blocks.0.after_proj.bias", ())
    if missing is not None or len(shape) != 1 or not shape[0]:
        raise CheckpointError(f"{path} is a ControlNet without its layer {missing or 0}. Download it again.")
    settings = path / "config.json"
    heads, head_dim = find_heads(shape[0], read_json(settings) if settings.is_file() else {}, path)
    return replace(
        XL_2,
        num_layers=len(layers),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=shape[0],
        qk_norm=any(".attn1.norm_q." in name for name in shapes),
    )


def _check_kind(header: dict, path) -> None:
    """Raise CheckpointError for another model, by its name, for a LoRA and for quantised weights."""
    names = list(header)
    adapter = next(filter(ADAPTER.search, names), None)
    if adapter is not None:
        raise CheckpointError(
            f"{path} is a LoRA for a ControlNet ({adapter}), which is not read here. Merge it into the "
            "ControlNet with the program that trained it."
        )
    if not any(KEY.fullmatch(name) or AUTHORS_KEY.fullmatch(name) for name in names):
        kind = kind_of(place(name).bare for name in names)
        held = f"it holds {names[0]}" if names else "it holds nothing"
        words = "not a ControlNet of PixArt" if kind is None else f"{kind.words}, not a ControlNet of PixArt"
        if kind is not None and kind.words == "a ControlNet":
            words = "a ControlNet for another kind of model than PixArt"
        raise CheckpointError(f"{path} is {words}: {held}. Choose another file.")
    quantised = quantization_of(names, (dtype for _, dtype in header.values()))
    if quantised:
        raise CheckpointError(
            f"{path} is a quantised ControlNet ({quantised}), which is not read here. Use its weights in "
            "float32, float16 or bfloat16."
        )


def _rename_all(values: dict, split, path) -> dict:
    """What a file holds, by the names of diffusers' format; `split` is as in `_rename`."""
    renamed: dict = {}
    for key, value in values.items():
        for name, part in _rename(key, value, split, path).items():
            if name in renamed:
                raise CheckpointError(f"{path} holds {name} twice. Choose another file.")
            renamed[name] = part
    return renamed


def _split_shape(value, parts: int) -> list:
    """Of a weight in a header, (shape, dtype), what each of so many parts has. A wrong shape stays whole, to
    be named by `_check_shapes`."""
    shape, dtype = value
    if not shape or shape[0] % parts:
        return [value] * parts
    return [((shape[0] // parts, *shape[1:]), dtype)] * parts


def _rename(key: str, value, split, path) -> dict:
    """What a key of the file comes to, by the names of diffusers' format: several for q, k and v in one,
    nothing for the transformer's own weights. `split(value, parts)` takes one apart."""
    if found := KEY.fullmatch(key):
        return {f"controlnet_blocks.{found[1]}.{found[2]}.{found[3]}": value}
    found = AUTHORS_KEY.fullmatch(key)
    if found is None:
        if OF_TRANSFORMER.match(key):
            return {}
        raise CheckpointError(f"{path} holds {key}, which no ControlNet of PixArt has. Choose another file.")
    index, part, rest = found.groups()
    if part != "copied_block":
        return {f"controlnet_blocks.{index}.{part}.{rest}": value}
    names = to_diffusers_keys(f"blocks.0.{rest}")
    if not names:
        raise CheckpointError(f"{path} holds {key}, which no ControlNet of PixArt has. Choose another file.")
    parts = split(value, len(names)) if len(names) > 1 else [value]
    bare = (name.removeprefix("transformer_blocks.0.") for name in names)
    return {
        f"controlnet_blocks.{index}.transformer_block.{name}": part
        for name, part in zip(bare, parts, strict=True)
    }


def _check_shapes(shapes: dict[str, tuple[int, ...]], controlnet: ControlNet, path) -> None:
    expected = {name: tuple(weight.shape) for name, weight in controlnet.state_dict().items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{path} is a ControlNet without {name}. Download it again.")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{path} is damaged: {name} is {shapes[name]} where its width makes it {shape}. "
                "Download it again."
            )
    left_over = next((name for name in shapes if name not in expected), None)
    if left_over is not None:
        raise CheckpointError(
            f"{path} holds {left_over}, which no ControlNet of PixArt has. Choose another file."
        )
