"""Adapters of the transformer and of T5: LoRA and its kin."""

from .host.api import io
from .host.folders import check, choices, find

MOST_STRENGTH = 100.0  # as in ComfyUI's Load LoRA

ALIASES = [
    "pixart lora",
    "lora",
    "load lora",
    "lora loader",
    "peft",
    "adapter",
    "dora",
    "lokr",
    "loha",
    "oft",
    "lycoris",
]


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaLoadLoRA",
            display_name="Load Σ LoRA",
            category="PixArt Sigma",
            description="Changes PixArt-Σ by a LoRA, LoHa, LoKr, DoRA or OFT of any trainer, as the trainer "
            "itself would: with the alpha that lies beside the weights (PEFT's adapter_config.json, the "
            "metadata of diffusers), which ComfyUI's Load LoRA does not read. T5 is changed too, where the "
            "file has something for it. A file that does not fit as a whole is refused. Several may follow "
            "one another, of either kind.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A PixArt-Σ transformer, from Load Σ Transformer or from ComfyUI's own loader.",
                ),
                io.Combo.Input(
                    "lora",
                    options=choices("lora"),
                    tooltip="A file from models/loras, or a folder of PEFT there. Of such a folder keep the "
                    "adapter_config.json beside the weights: it says how strong they are.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-MOST_STRENGTH,
                    max=MOST_STRENGTH,
                    step=0.01,
                    tooltip="1 is as it was trained, 0 is exactly off, and below 0 it acts the other way "
                    "round.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="T5, for files that change it too, which few do: the node says so when it runs. "
                    "Not one that was saved in 8 or 4 bit.",
                ),
                io.Float.Input(
                    "strength_clip",
                    optional=True,
                    default=1.0,
                    min=-MOST_STRENGTH,
                    max=MOST_STRENGTH,
                    step=0.01,
                    tooltip="The same for T5.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer with the LoRA; the one that came in stays."),
                io.Clip.Output(
                    tooltip="T5 with its part of the LoRA, or as it came in where there is none. Nothing "
                    "where no clip is connected."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora):
        return check("lora", lora)

    @classmethod
    def execute(cls, model, lora, strength_model, clip=None, strength_clip=1.0):
        from .host.adapters import patch_clip, patch_model
        from .host.notice import show_notice

        patched, adapter = patch_model(model, find("lora", lora), strength_model)
        left_out: tuple[str, ...] = ()
        if clip is not None:
            clip, left_out = patch_clip(clip, adapter, strength_clip)
        elif adapter.text:
            left_out = (f"{adapter.text.left_out} Connect the CLIP to this node.",)
        show_notice("\n".join([*adapter.notices, *left_out]))
        return io.NodeOutput(patched, clip)


NODES = [LoadLoRA]
