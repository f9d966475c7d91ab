"""What adapters call the layers of a PixArt-Sigma transformer, whoever wrote them.

A name is made of a prefix, a module of the network (diffusers' name or the authors', dotted or with "_" for
each dot) and what the tensor is of that layer. All modules come from the network itself, so that no "_" is
taken for a dot that is none. Sources: OneTrainer's modules/util/convert_lora_util.py, SimpleTuner's
helpers/training/lora_format.py, ai-toolkit's toolkit/network_mixins.py, LyCORIS' lycoris/wrapper.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import SigmaError
from .keys import to_original_keys

# In front of dotted names, and whose they are. PEFT's are those of whatever was wrapped.
DOTTED = {
    "": "diffusers or the authors",
    "base_model.model.": "PEFT",
    "unet.base_model.model.": "PixArt-Sigma's train_pixart_lora_hf",
    "transformer.base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "diffusion_model.": "ComfyUI",
    "model.diffusion_model.": "ComfyUI",
}
# In front of names without dots. Old files of ai-toolkit have one "_" more behind it.
FLATTENED = {
    "": "LyCORIS",
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer or ai-toolkit",
    "lycoris_": "LyCORIS",
    "lycoris_unet_": "LyCORIS",
    "lycoris_transformer_": "LyCORIS",
}
# In front of what is not the transformer's, and what only T5's layers are called.
TEXT_ENCODERS = ("text_encoder", "lora_te", "lycoris_te", "lycoris_text_encoder", "t5xxl.")
TEXT_LAYER = re.compile(r"encoder[._]block[._]\d+[._]layer[._]\d")
# As DOTTED and FLATTENED, for T5.
TEXT_DOTTED = {
    "": "transformers",
    "base_model.model.": "PEFT",
    "text_encoder.base_model.model.": "PEFT",
    "text_encoder.": "diffusers",
    "text_encoders.": "ComfyUI",
    "text_encoders.transformer.": "ComfyUI",
    "text_encoders.t5xxl.": "ComfyUI",
    "text_encoders.t5xxl.transformer.": "ComfyUI",
    "t5xxl.transformer.": "ComfyUI",
}
TEXT_FLATTENED = {
    "lora_te_": "OneTrainer",
    "lora_te1_": "kohya",
    "lora_te2_": "kohya",
    "lora_te3_": "kohya",
    "lora_text_encoder_": "OneTrainer",
    "lycoris_te_": "LyCORIS",
    "lycoris_text_encoder_": "LyCORIS",
}
EMBEDDINGS = ("bundle_emb.",)

# What a tensor is of its layer, by the end of its name.
PARTS = {
    **dict.fromkeys(
        ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight"), "lora_down"
    ),
    **dict.fromkeys(
        ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight"), "lora_up"
    ),
    **dict.fromkeys(("lora_B.bias", "lora_B.default.bias"), "lora_up_bias"),
    "lora_mid.weight": "lora_mid",
    **dict.fromkeys(
        (
            "lora_magnitude_vector",
            "lora_magnitude_vector.weight",
            "lora_magnitude_vector.default.weight",
            "lora_magnitude_vector.default",
        ),
        "magnitude",
    ),
    **dict.fromkeys(("oft_R.weight", "oft_R.default.weight"), "oft_R"),
    "oft_R.scaled_oft": "scaled_oft",
    **dict.fromkeys(("w_norm",), "diff"),
    **dict.fromkeys(("b_norm",), "diff_b"),
    **{
        name: name
        for name in (
            "alpha",
            "dora_scale",
            "diff",
            "diff_b",
            "oft_blocks",
            "rescale",
            *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        )
    },
    # PEFT's modules_to_save, and its biases.
    "weight": "weight",
    "bias": "bias",
}


Names = dict[str, set[tuple[str, ...]]]


@dataclass(frozen=True)
class Found:
    """A module by a name in a file: diffusers' names of it, several where it is a fused one, and whose
    spelling that is."""

    modules: tuple[str, ...]
    spelling: str


class LayerNames:
    """Every name of the layers of one transformer, or of one T5."""

    def __init__(
        self,
        weights: Iterable[str],
        dotted: Mapping[str, str] = DOTTED,
        flattened: Mapping[str, str] = FLATTENED,
    ):
        """weights: diffusers' names of all the transformer's weights, as its state dict has them, or
        transformers' of T5's; dotted, flattened: what stands in front of names, and whose it is."""
        self._prefixes = dotted, flattened
        weights = list(weights)
        modules = dict.fromkeys(map(module_of, weights))
        named: Names = {module: {(module,)} for module in modules}
        for original, parts in to_original_keys(weights).items():
            named.setdefault(module_of(original), set()).add(tuple(map(module_of, parts)))
        self._dotted = named
        self._flattened: Names = {}
        for name, found in named.items():
            self._flattened.setdefault(name.replace(".", "_"), set()).update(found)

    def find(self, name: str) -> Found | None:
        """The module of a name without its last part, or None. The longest prefix says whose spelling it is.

        Raises SigmaError for a name that means two modules.
        """
        found: dict[tuple[str, ...], str] = {}
        for spelled, prefixes in zip((self._dotted, self._flattened), self._prefixes, strict=True):
            for prefix in sorted(prefixes, key=len):
                if not name.startswith(prefix):
                    continue
                rest = name[len(prefix) :]
                if prefix and rest not in spelled:
                    rest = rest.removeprefix("_")
                for modules in spelled.get(rest, ()):
                    found[modules] = prefixes[prefix]
        if len(found) > 1:
            one, other = sorted(" and ".join(modules) for modules in found)[:2]
            raise SigmaError(f"{name} may be {one} or {other}.")
        return next((Found(*item) for item in found.items()), None)

    def spellings(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every name that `find` knows, with diffusers' names of its module or modules."""
        for spelled, prefixes in zip((self._dotted, self._flattened), self._prefixes, strict=True):
            for prefix in prefixes:
                for name, found in spelled.items():
                    if len(found) == 1:
                        for between in ("", "_") if spelled is self._flattened and prefix else ("",):
                            yield f"{prefix}{between}{name}", next(iter(found))


def module_of(weight: str) -> str:
    """The module that a weight belongs to; a table by itself is its own."""
    return weight.removesuffix(".weight").removesuffix(".bias")


def split_name(name: str) -> tuple[str, str]:
    """(the layer's name, what the tensor is of it, of PARTS); ("", "") for a name that ends otherwise."""
    segments = name.split(".")
    for count in (3, 2, 1):
        part = PARTS.get(".".join(segments[-count:]))
        if part and len(segments) > count:
            return ".".join(segments[:-count]), part
    return "", ""


def is_text_encoders(name: str) -> bool:
    return name.startswith(TEXT_ENCODERS) or TEXT_LAYER.search(name) is not None


def is_embedding(name: str) -> bool:
    return name.startswith(EMBEDDINGS)
