"""Which model of a file a weight belongs to, its bare name there, and what kind of model the names make.

Pure functions over names; nothing is read. A file may hold several models, each behind its own prefix, and
wrappers, trainers and averages put more in front of a name or into it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

# What the loaders ask for, in words.
PARTS = {
    "transformer": "a PixArt-Sigma transformer",
    "text_encoder": "a T5 text encoder",
    "vae": "a VAE",
}

# Parts of a name that say nothing: anywhere in it (DataParallel, torch.compile, FSDP, checkpointing), and
# in front (what a training run keeps beside other things).
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
CONTAINERS = {"state_dict", "model_state_dict", "model", "base_model", "net", "params", "weights"}
AVERAGES = {"ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "params_ema"}
# In front of one model of several: whose it is. "other" is no part of PixArt-Sigma.
OWNERS = {
    "diffusion_model": "transformer",
    "transformer": "transformer",
    "unet": "transformer",
    "dit": "transformer",
    "vae": "vae",
    "first_stage_model": "vae",
    "text_encoders": "text_encoder",
    "text_encoder": "text_encoder",
    "text_encoder_3": "text_encoder",  # of Stable Diffusion 3, which has T5 there
    "cond_stage_model": "text_encoder",
    "t5xxl": "text_encoder",
    "t5": "text_encoder",
    "text_encoder_2": "other",
    "conditioner": "other",
    "clip_vision": "other",
}
# Between the owner and the bare name.
INNER = {
    "transformer": {"diffusion_model", "transformer"},
    "text_encoder": {"t5xxl", "t5", "transformer"},
    "vae": {"vae", "first_stage_model"},
}
OTHER_TEXT_ENCODERS = {
    "clip_l",
    "clip_g",
    "clip_h",
    "gemma2_2b",
    "llama",
    "qwen25_7b",
    "byt5_small",
    "umt5xxl",
}
# Of a training run, at the top of a pickle: not weights.
TRAINING_STATE = {"optimizer", "optimizers", "opt", "optimizer_states", "optimizer_state_dict"}
TRAINING_STATE |= {"lr_scheduler", "lr_schedulers", "scheduler", "scaler", "grad_scaler"}
TRAINING_STATE |= {"callbacks", "loops", "rng_state", "rng_states"}
# Single tensors that count, or that describe a schedule of Stable Diffusion.
COUNTERS = {"num_updates", "decay", "n_averaged", "step", "global_step", "epoch", "iteration", "initted"}
# Empty tensors by which ComfyUI's CheckpointSave says that a model predicts v, and that its last timestep is
# noise alone.
MARKERS = ("v_pred", "ztsnr")
# Facts that a file holds as a tensor of JSON, where its writer can set no metadata.
FACTS = "pixart_sigma.facts"


@dataclass(frozen=True)
class Kind:
    """A kind of model by what its bare names contain: all parts of one of `marks`.

    part: which of ours it is, or "".
    """

    words: str
    marks: tuple[tuple[str, ...], ...]
    part: str = ""


# The first that fits, so that what is built upon a model goes before it.
KINDS = (
    Kind("a LoRA", (("lora_",), ("lycoris_",), (".lora_A.",), (".lokr_",), (".hada_w1",), (".oft_",))),
    Kind("an embedding for prompts", (("bundle_emb.",), ("emb_params",), ("string_to_param",), ("t5_out",))),
    Kind(
        "a ControlNet",
        (("controlnet_blocks.",), ("controlnet.",), ("control_model.",), ("controlnet_cond_embedding.",)),
    ),
    Kind("an IP-Adapter", (("to_k_ip.",), ("ip_adapter.",))),
    Kind("a CLIP vision model", (("vision_model.encoder.",),)),
    Kind("a CLIP text encoder", (("text_model.encoder.",), ("transformer.resblocks.0.",))),
    Kind("SDXL", (("label_emb.0.0.weight",), ("add_embedding.linear_1",))),
    Kind("Stable Diffusion", (("input_blocks.0.0.weight",), ("down_blocks.0.attentions",))),
    Kind("Stable Diffusion 3", (("joint_blocks.0.",),)),
    Kind("Flux or a model like it", (("double_blocks.0.",), ("single_transformer_blocks.0.",))),
    Kind(
        PARTS["transformer"],
        (
            ("t_block.1.", "y_embedder.y_proj."),
            ("blocks.0.cross_attn.kv_linear.", "x_embedder.proj."),
            ("adaln_single.", "pos_embed.proj."),
        ),
        "transformer",
    ),
    Kind(
        PARTS["text_encoder"],
        (("encoder.block.0.layer.0.SelfAttention.",), ("shared.weight",)),
        "text_encoder",
    ),
    Kind(PARTS["vae"], (("decoder.conv_in.",), ("decoder.conv_out.",), ("encoder.conv_in.",)), "vae"),
)


@dataclass(frozen=True)
class Place:
    """What a name in a file says: whose weight it is ("" for nobody's), whether averaged, its bare name."""

    owner: str
    averaged: bool
    bare: str


@dataclass(frozen=True)
class Choice:
    """The weights of one part: by bare name the name in the file.

    average: "taken" where the file has nothing else, "left" where its averages were left out, or "".
    """

    names: dict[str, str]
    average: str = ""


def place(name: str) -> Place:
    """Take a name apart."""
    owner, averaged = "", False
    segments = [segment for segment in name.split(".") if segment not in WRAPPERS]
    while len(segments) > 1:
        first = segments[0]
        if first in AVERAGES:
            averaged = True
        elif owner == "text_encoder" and first in OTHER_TEXT_ENCODERS:
            owner = "other"
        elif not owner and first in OWNERS:
            owner = OWNERS[first]
        elif first not in CONTAINERS and first not in INNER.get(owner, ()):
            break
        segments.pop(0)
    return Place(owner, averaged, ".".join(segments) or name)


def kind_of(bare_names: Iterable[str]) -> Kind | None:
    """What the bare names of one model make it, or None."""
    bare_names = list(bare_names)
    for kind in KINDS:
        for marks in kind.marks:
            if all(any(mark in name for name in bare_names) for mark in marks):
                return kind
    return None


def choose(names: Iterable[str], part: str) -> Choice:
    """The weights of "transformer", "text_encoder" or "vae" among all names of a file.

    Those that stand behind the part's prefix, or else behind none. Names that nobody owns are kept beside
    them, so that who knows the model can say what they are. The weights go before their averages. Raises
    ValueError, with both names, for two that mean the same weight.
    """
    groups = _by_owner(names)
    owned, loose = groups.get(part, []), groups.get("", [])
    if not owned and not _is(part, loose):
        # An encoder may stand behind "transformer", which is what transformers calls every model.
        owned = next((group for group in groups.values() if _is(part, group)), [])
    if owned and kind_of(found.bare for _, found in loose):
        loose = []  # another model
    return _one_of_each(owned + loose)


def models(names: Iterable[str]) -> dict[str, Choice]:
    """All models of a file by their owner, "" for those without a prefix."""
    groups = _by_owner(names)
    return {owner: _one_of_each(found) for owner, found in groups.items()}


def _is(part: str, group: list) -> bool:
    kind = kind_of(found.bare for _, found in group)
    return kind is not None and kind.part == part


def _by_owner(names: Iterable[str]) -> dict[str, list[tuple[str, Place]]]:
    groups: dict[str, list[tuple[str, Place]]] = {}
    for name in names:
        found = place(name)
        if name not in (FACTS, *MARKERS) and found.bare not in COUNTERS:
            groups.setdefault(found.owner, []).append((name, found))
    return groups


def _one_of_each(group: list[tuple[str, Place]]) -> Choice:
    """The weights without their averages, or the averages where there is little else."""
    plain = [(name, found) for name, found in group if not found.averaged]
    averaged = [(name, found) for name, found in group if found.averaged]
    average = ""
    if averaged and len(averaged) > len(plain):
        plain, average = plain + averaged, "taken"
    elif averaged:
        # Averages of what is not here are kept, to be named. Some are without the dots of the name.
        known = {ending for name, _ in plain for ending in _endings(name)}
        known |= {ending.replace(".", "") for ending in known}
        kept = [(name, found) for name, found in averaged if found.bare not in known]
        plain, average = plain + kept, "left" if len(kept) < len(averaged) else ""
    chosen: dict[str, str] = {}
    for name, found in plain:
        if found.bare in chosen:
            raise ValueError(chosen[found.bare], name)
        chosen[found.bare] = name
    return Choice(chosen, average)


def _endings(name: str) -> list[str]:
    """A name, and what is left of it without its first words."""
    segments = [segment for segment in name.split(".") if segment not in WRAPPERS]
    return [".".join(segments[start:]) for start in range(min(len(segments), 5))]
