"""The SDXL VAE from a diffusers folder or a single file."""

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from ..errors import CheckpointError
from ..files.parts import kind_of, models
from ..files.quantization import quantization_of
from ..files.reading import parsing, read_json
from ..files.weight_files import read_header, read_state_dict

SDXL_SCALING_FACTOR = 0.13025
SD15_SCALING_FACTOR = 0.18215
# In a config.json, by the only value beside null that is taken.
NOT_DONE = {"shift_factor": 0, "latents_mean": None, "latents_std": None, "act_fn": "silu"}
ANOTHER = "it is damaged, or the VAE of another model."
KINDS = {
    "down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
# The published VAE, in diffusers' words.
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
MOST_LEVELS, MOST_LAYERS, MOST_CHANNELS = 8, 16, 2**16


def _whole(value, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _all(value, is_right) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MOST_LEVELS and all(map(is_right, value))


# All that is taken from a config.json beside the scaling factor, and what each may be. What another key says
# reaches nobody.
OBEYED: dict[str, Callable[[Any], bool]] = {
    "in_channels": lambda value: _whole(value, MOST_CHANNELS),
    "out_channels": lambda value: _whole(value, MOST_CHANNELS),
    "latent_channels": lambda value: _whole(value, MOST_CHANNELS),
    "block_out_channels": lambda value: _all(value, lambda width: _whole(width, MOST_CHANNELS)),
    "down_block_types": lambda value: _all(value, lambda kind: kind in KINDS["down"]),
    "up_block_types": lambda value: _all(value, lambda kind: kind in KINDS["up"]),
    "layers_per_block": lambda value: _whole(value, MOST_LAYERS),
    "norm_num_groups": lambda value: _whole(value, MOST_CHANNELS),
    "sample_size": lambda value: _whole(value, MOST_CHANNELS),
    "force_upcast": lambda value: isinstance(value, bool),
    "use_quant_conv": lambda value: isinstance(value, bool),
    "use_post_quant_conv": lambda value: isinstance(value, bool),
    "mid_block_add_attention": lambda value: isinstance(value, bool),
}
# What the training of a VAE leaves beside it.
TRAINING = ("loss.", "discriminator.", "perceptual_loss.", "lpips.")
# The mid block's attention: diffusers' names of before 0.18, its own of today, and the original release's.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTION = re.compile(
    r"(.+\.mid_block\.attentions\.0\.)(to_[qkv]|to_out\.0|query|key|value|proj_attn)\.(.+)"
)
ORIGINAL_ATTENTION = re.compile(r".+\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight")
ORIGINAL = re.compile(
    r"(?:en|de)coder\.(?:conv_in|conv_out|norm_out|mid\.(?:block_[12]|attn_1)\.\w+"
    r"|(?:down|up)\.\d+\.(?:block\.\d+\.\w+|(?:down|up)sample\.conv))\.(?:weight|bias)"
    r"|(?:post_)?quant_conv\.(?:weight|bias)"
)


def load_vae(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """An AutoencoderKL in eval mode, without gradients, from what `read_vae` reads; it raises the same."""
    state_dict, config = read_vae(path)
    vae = build_vae(config)
    # Copies: a small model is not worth watching its file for.
    state_dict = {
        key: tensor.to(device, dtype, copy=True) for key, tensor in _in_diffusers(state_dict, config).items()
    }
    vae.load_state_dict(state_dict, assign=True)
    return vae.eval().requires_grad_(False)


def build_vae(config: dict) -> AutoencoderKL:
    """The VAE of a configuration in diffusers' words, without weights (on the meta device), in eval mode."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(config).eval()


def read_vae(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights of a VAE and its configuration in diffusers' words.

    `path` is a diffusers folder (`config.json` and weights), or a pipeline's that has it, or one file, in
    diffusers' keys or in the original release's keys that ComfyUI uses, alone or beside other models. Older
    names of the attention become those of today, and its weights (C, C) in diffusers' keys and (C, C, 1, 1)
    in the original ones.
    Raises CheckpointError for another kind of model, for one that is quantised or not whole, and for the VAE
    of Stable Diffusion 1.x.
    """
    path = Path(path)
    if (path / "vae").is_dir() and not (path / "config.json").exists():
        path = path / "vae"
    state_dict = _with_todays_names(read_state_dict(path, part="vae"))
    if "decoder.conv_in.weight" not in state_dict:
        raise CheckpointError(
            f"{path} is not a VAE: it has no decoder.conv_in.weight. Choose the SDXL VAE "
            "(the vae folder of PixArt-Sigma-XL-2-1024-MS, or sdxl_vae.safetensors)."
        )
    settings = _read_settings(path)
    dtypes = [tensor.dtype for tensor in state_dict.values()]
    if quantization := quantization_of(state_dict, dtypes, settings):
        raise CheckpointError(
            f"{path} is a quantised VAE ({quantization}), which is not read here. Use one in float32, "
            "float16 or bfloat16; it is small."
        )
    other = next((key for key, tensor in state_dict.items() if not tensor.is_floating_point()), None)
    if other is not None:
        raise CheckpointError(f"{path}: {other} holds {state_dict[other].dtype} numbers: {ANOTHER}")
    config = _obeyed(settings, path) if settings else _config_from(state_dict, path)
    if config.get("scaling_factor") == SD15_SCALING_FACTOR or _is_beside_sd15(path):
        raise CheckpointError(
            f"{path} has the VAE of Stable Diffusion 1.x or 2.x (scaling factor {SD15_SCALING_FACTOR}); "
            f"PixArt-Sigma needs the SDXL VAE ({SDXL_SCALING_FACTOR})."
        )
    if config.get("latent_channels", 4) != 4:
        raise CheckpointError(
            f"{path} makes latents of {config['latent_channels']} channels; "
            "PixArt-Sigma needs the SDXL VAE with 4."
        )
    _check(state_dict, config, path)
    return state_dict, config


def _read_settings(path: Path) -> dict:
    """The config.json of a folder, or beside a file that diffusers names so."""
    folder = path if os.path.isdir(path) else path.parent
    if folder != path and not path.name.startswith("diffusion_pytorch_model"):
        return {}
    config = folder / "config.json"
    return read_json(config) if os.path.isfile(config) else {}


def _obeyed(settings: dict, path: Path) -> dict:
    """A config.json with all that it leaves out, as diffusers has it but for the scaling factor: without one
    it is SDXL's, as for a file without config.json. Raises CheckpointError for what is not done here."""
    for name, only in NOT_DONE.items():
        if settings.get(name, only) not in (None, only):
            raise CheckpointError(
                f"The config.json of {path} says {name} {settings[name]!r}, which PixArt-Sigma is run "
                "without: it is the VAE of another model."
            )
    for name, is_right in OBEYED.items():
        if settings.get(name) is not None and not is_right(settings[name]):
            raise CheckpointError(
                f"The config.json of {path} says {name} {settings[name]!r}, which no VAE of SDXL's kind has: "
                f"{ANOTHER}"
            )
    scale = settings.get("scaling_factor", SDXL_SCALING_FACTOR)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1000:
        raise CheckpointError(
            f"The config.json of {path} says scaling_factor {scale!r}; SDXL's VAE has 0.13025."
        )
    parameters = inspect.signature(AutoencoderKL).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    known = {name: settings[name] for name in OBEYED if settings.get(name) is not None}
    return defaults | known | {"scaling_factor": scale}


def _is_beside_sd15(path: Path) -> bool:
    """Whether the file is a checkpoint of Stable Diffusion 1.x or 2.x; its VAE alone looks like SDXL's."""
    transformer = models(read_header(path)).get("transformer")
    kind = kind_of(transformer.names) if transformer else None
    return kind is not None and kind.words == "Stable Diffusion"


def _with_todays_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, tensor in state_dict.items():
        if key.startswith(TRAINING):
            continue
        if attention := ATTENTION.fullmatch(key):
            block, name, parameter = attention.groups()
            key = f"{block}{OLD_ATTENTION.get(name, name)}.{parameter}"
            if parameter == "weight" and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        elif ORIGINAL_ATTENTION.fullmatch(key) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[key] = tensor
    return renamed


def _in_diffusers(state_dict: dict, config: dict) -> dict:
    original = any(key.startswith("decoder.mid.") for key in state_dict)
    return convert_ldm_vae_checkpoint(state_dict, config) if original else state_dict


def _check(state_dict: dict, config: dict, path: Path) -> None:
    """Raise CheckpointError unless these are the weights of a VAE of this configuration, all of them."""
    with parsing(path, "is not a VAE that can be built", ANOTHER):
        expected = {key: tuple(tensor.shape) for key, tensor in build_vae(config).state_dict().items()}
        found = _in_diffusers(state_dict, config)
    left_over = sorted(found.keys() - expected.keys())
    if found is not state_dict:  # what the conversion does not know it leaves out
        left_over += [key for key in state_dict if not ORIGINAL.fullmatch(key)]
    missing = sorted(expected.keys() - found.keys())
    if missing or left_over:
        word, key = ("lacks", missing[0]) if missing else ("has the unknown key", left_over[0])
        raise CheckpointError(f"{path} {word} {key}: {ANOTHER}")
    for key, shape in expected.items():
        if tuple(found[key].shape) != shape:
            raise CheckpointError(f"{path}: {key} is {tuple(found[key].shape)}, not {shape}: {ANOTHER}")


def read_config(path: str | Path) -> dict:
    """The configuration alone, in diffusers' words. It raises as `read_vae`, which maps the weights and reads
    none of them."""
    return read_vae(path)[1]


def _config_from(state_dict: dict[str, torch.Tensor], path: Path) -> dict:
    """The configuration that the shapes of a single file imply."""
    diffusers_keys = "decoder.mid_block.resnets.0.conv1.weight" in state_dict
    first = (
        "encoder.down_blocks.{}.resnets.{}.conv1.weight"
        if diffusers_keys
        else "encoder.down.{}.block.{}.conv1.weight"
    )
    widths: list[int] = []
    while (key := first.format(len(widths), 0)) in state_dict:
        widths.append(_convolution(state_dict, key, path)[0])
    layers = 0
    while first.format(0, layers) in state_dict:
        layers += 1
    if not widths:
        raise CheckpointError(f"{path} has a decoder but no encoder; choose the whole SDXL VAE.")
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": _convolution(state_dict, "decoder.conv_in.weight", path)[1],
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": SDXL_SCALING_FACTOR,
    }


def _convolution(state_dict: dict[str, torch.Tensor], key: str, path: Path) -> tuple[int, ...]:
    shape = tuple(state_dict[key].shape)
    if len(shape) != 4:
        raise CheckpointError(f"{path}: {key} is {shape}, not that of a picture's convolution: {ANOTHER}")
    return shape
