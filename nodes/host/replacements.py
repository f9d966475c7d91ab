"""What stands in for the nodes of ComfyUI_ExtraModels in graphs that were made with it.

Ids, order of widgets and outputs are those of its sources (PixArt/nodes.py, T5/nodes.py, VAE/nodes.py at
92f556e). The host can rename an input and set a value, but not turn one word into another: where that would
be needed, `docs/old_graphs.md` says what becomes of it.
"""

from .api import ComfyAPI, io


class Replacement(io.NodeReplace):
    """One whose outputs stay in their places.

    The frontend wants to be told of each of them, or it cuts their links. The server leaves them by itself,
    and told of them it fails wherever it has replaced the node at the other end of a link before.
    """

    def __init__(self, *arguments, outputs: int = 1, **named):
        super().__init__(*arguments, **named)
        self.outputs = outputs

    def as_dict(self) -> dict:
        kept = [{"old_idx": index, "new_idx": index} for index in range(self.outputs)]
        return super().as_dict() | {"output_mapping": kept}


def _same(new_id: str, old_id: str) -> dict:
    return {"new_id": new_id, "old_id": old_id}


def _always(new_id: str, value) -> dict:
    return {"new_id": new_id, "set_value": value}


def _replace(old: str, new: str, widgets: list[str], inputs: list[dict], outputs: int = 1) -> Replacement:
    return Replacement(new, old, old_widget_ids=widgets, input_mapping=inputs, outputs=outputs)


def _transformer(old: str, widgets: list[str]):
    # Which of its models it was: our loader sees that in the file.
    inputs = [_same("transformer", "ckpt_name"), _always("variant", "auto"), _always("dtype", "auto")]
    return _replace(old, "PixArtSigmaLoadTransformer", widgets, inputs)


def _prompt(old: str):
    return _replace(old, "CLIPTextEncode", ["text"], [_same("text", "text"), _same("clip", "T5")])


REPLACEMENTS = [
    _transformer("PixArtCheckpointLoader", ["ckpt_name", "model"]),
    _transformer("PixArtCheckpointLoaderSimple", ["ckpt_name"]),
    _replace(
        "PixArtResolutionSelect",
        "PixArtSigmaResolutionSelect",
        ["model", "ratio"],
        [_same("model", "model"), _same("ratio", "ratio")],
        outputs=2,
    ),
    _replace(
        "PixArtLoraLoader",
        "LoraLoaderModelOnly",
        ["lora_name", "strength"],
        [_same("model", "model"), _same("lora_name", "lora_name"), _same("strength_model", "strength")],
    ),
    _replace(
        "T5v11Loader",
        "PixArtSigmaLoadTextEncoder",
        ["t5v11_name", "t5v11_ver", "path_type", "device", "dtype"],
        [_same("text_encoder", "t5v11_name"), _always("precision", "int8"), _always("device", "auto")],
    ),
    _replace(
        "PixArtT5FromSD3CLIP",
        "PixArtSigmaT5FromCLIP",
        ["padding"],
        [_same("clip", "sd3_clip"), _same("padding", "padding")],
    ),
    _prompt("T5TextEncode"),
    _prompt("PixArtT5TextEncode"),
    _replace(
        "ExtraVAELoader", "PixArtSigmaLoadVAE", ["vae_name", "vae_type", "dtype"], [_same("vae", "vae_name")]
    ),
]


async def register():
    """Tells the host; it offers them in the frontend, and replaces by itself in prompts of its API."""
    api = ComfyAPI()
    for replacement in REPLACEMENTS:
        await api.node_replacement.register(replacement)
