"""The engine's adapters (LoRA and its kin) on a MODEL, ours or the host's own PixArt, as the host's patches;
and on a CLIP, of either kind too."""

from pathlib import Path

import comfy.model_base

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.transformer.config import expected_shapes
from ...pixart_sigma.transformer.keys import to_diffusers_keys, to_original_keys
from ...pixart_sigma.transformer.lora import Adapter, fit_adapter
from ...pixart_sigma.transformer.other_models import ALPHA_KEYS
from .kv_compression import is_ours
from .lora import PREFIX
from .text_encoder import SigmaClip
from .whole_matrix import KindAdapter

T5 = "t5xxl.transformer."  # in front of the weights of the host's own T5
Shapes = dict[str, tuple[int, ...]]


def patch_model(model, path: Path, strength: float):
    """(a clone of the MODEL with an adapter, the adapter).

    Raises CheckpointError for an adapter that does not fit, SigmaError for a MODEL that is not PixArt-Sigma.
    """
    shapes = _shapes_of(model)
    adapter = fit_adapter(path, shapes)
    patched = model.clone()
    for patches in _rounds_of(adapter, shapes) if strength else ():
        done = patched.add_patches(patches, strength)
        if left := [key for key in patches if key not in done]:
            raise SigmaError(f"This MODEL has no {left[0]}, which {path} changes.")
    return patched, adapter


def patch_clip(clip, adapter: Adapter, strength: float):
    """(a clone of the CLIP with what an adapter has for T5, what of that is not done, for people).

    Raises CheckpointError for what does not fit the encoder, SigmaError for a CLIP without T5.
    """
    if adapter.text is None or not strength:
        return clip, ()
    if isinstance(clip, SigmaClip):
        return clip.with_adapter(adapter, strength)
    weights = clip.cond_stage_model.state_dict()
    shapes = {
        name.removeprefix(T5): tuple(weight.shape) for name, weight in weights.items() if name.startswith(T5)
    }
    if not shapes:
        raise SigmaError("This CLIP has no T5-XXL, which the LoRA changes. Load T5 with CLIPLoader (pixart).")
    patches = {T5 + edit.names[0]: KindAdapter.of(edit) for edit in adapter.text.edits(shapes)}
    patched = clip.clone()
    if left := patches.keys() - set(patched.add_patches(patches, strength)):
        raise SigmaError(f"This CLIP has no {min(left)}, which {adapter.source} changes.")
    return patched, ()


def _shapes_of(model) -> Shapes:
    """By diffusers' names."""
    if is_ours(model):
        return expected_shapes(model.model.diffusion_model.sigma_config)
    weights = model.model_state_dict(PREFIX)
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    if not isinstance(model.model, comfy.model_base.PixArt):
        raise SigmaError(
            f"This MODEL is a {type(model.model).__name__}, and Load Σ LoRA is for PixArt-Sigma. Use Load "
            "LoRA."
        )
    if any(name.startswith(ALPHA_KEYS) for name in weights):
        raise SigmaError("This MODEL is PixArt-alpha, and Load Σ LoRA is for PixArt-Sigma. Use Load LoRA.")
    shapes = {}
    for name, weight in weights.items():
        ours = to_diffusers_keys(name)
        for part in ours:
            shapes[part] = (len(weight) // len(ours), *weight.shape[1:])
    return shapes


def _rounds_of(adapter: Adapter, shapes: Shapes) -> list[dict]:
    """The host's patches by its keys, in dicts that are added one after the other: a file may change a weight
    twice, as q, k and v together and as q."""
    keys = _hosts_keys(shapes)
    rounds: list[dict] = []
    latest: dict[str, int] = {}  # the round that changed a weight last
    for edit in adapter.edits:
        chosen = 1 + max(latest.get(name, -1) for name in edit.names)
        if chosen == len(rounds):
            rounds.append({})
        rounds[chosen][keys[edit.names]] = KindAdapter.of(edit)
        latest |= dict.fromkeys(edit.names, chosen)
    return rounds


def _hosts_keys(shapes: Shapes) -> dict[tuple[str, ...], str | tuple]:
    """The host's key of each weight, and of several together, by diffusers' names: the authors' name, and of
    a part of a fused weight its rows."""
    keys: dict[tuple[str, ...], str | tuple] = {}
    for name, parts in to_original_keys(shapes).items():
        keys[parts] = PREFIX + name
        if len(parts) > 1:
            for index, part in enumerate(parts):
                rows = shapes[part][0]
                keys[(part,)] = (PREFIX + name, (0, index * rows, rows))
    return keys
