"""Adapters of the transformer: LoRA and its kin."""

from .host.api import io
from .host.folders import check, choices, find

MOST_STRENGTH = 100.0  # as in ComfyUI's Load LoRA


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaLoadLoRA",
            display_name="Load Σ LoRA",
            category="PixArt Sigma",
            description="Changes PixArt-Σ by a LoRA, LoHa, LoKr, DoRA or OFT of any trainer, as the trainer "
            "itself would: with the alpha that lies beside the weights (PEFT's adapter_config.json, the "
            "metadata of diffusers), which ComfyUI's Load LoRA does not read. A file that does not fit as a "
            "whole is refused. Several may follow one another, of either kind.",
            search_aliases=[
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
            ],
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
            ],
            outputs=[io.Model.Output(tooltip="The transformer with the LoRA; the one that came in stays.")],
        )

    @classmethod
    def validate_inputs(cls, lora):
        return check("lora", lora)

    @classmethod
    def execute(cls, model, lora, strength_model):
        from .host.adapters import patch_model
        from .host.notice import show_notice

        patched, notices = patch_model(model, find("lora", lora), strength_model)
        show_notice("\n".join(notices))
        return io.NodeOutput(patched)


NODES = [LoadLoRA]
