"""Settings for the other nodes that keep a memory budget."""

from ..pixart_sigma.choices import T5_DEVICES, T5_PRECISIONS
from .decode import TILINGS
from .host.api import io

DECODES = {"whole": "off", "strips": "strips"}  # a plan's words in those of Σ VAE Decode


class VRAMPlanner(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaVRAMPlanner",
            display_name="Σ VRAM Planner",
            category="PixArt Sigma",
            description="Says what each stage of PixArt-Σ needs in memory for a picture of this size, and "
            "gives the settings with which a budget holds. It reads no files: it knows the models' shapes.",
            search_aliases=["vram", "memory budget", "low vram", "8gb", "6gb", "4gb", "plan"],
            inputs=[
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="GB (10^9 bytes) of graphics memory for the whole run. 0 is what the card has, "
                    "without what ComfyUI keeps free.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=64,
                    max=8192,
                    tooltip="From Σ Aspect-Ratio Bucket, or your own.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=64,
                    max=8192,
                    tooltip="From Σ Aspect-Ratio Bucket, or your own.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="How many pictures are made at once."
                ),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="precision",
                    options=list(T5_PRECISIONS),
                    tooltip="For Load Σ Text Encoder (T5).",
                ),
                io.Combo.Output(
                    display_name="device", options=list(T5_DEVICES), tooltip="For Load Σ Text Encoder (T5)."
                ),
                io.String.Output(
                    display_name="kv_compression", tooltip="For Σ Sampler, or Σ KV Compression."
                ),
                io.Combo.Output(display_name="tiling", options=list(TILINGS), tooltip="For Σ VAE Decode."),
                io.Float.Output(display_name="decode_budget", tooltip="For Σ VAE Decode, its budget."),
                io.String.Output(
                    display_name="table", tooltip="What each stage needs, and why the settings are so."
                ),
            ],
        )

    @classmethod
    def execute(cls, budget, width, height, batch_size):
        from .host.planner import make_plan

        plan = make_plan(budget * 1e9, width, height, batch_size)
        return io.NodeOutput(
            plan.ways.t5_precision,
            plan.ways.t5_device,
            "auto",  # the sampler's own default: KV compression saves work, and no memory at the peak
            DECODES[plan.ways.decode],
            (plan.ways.decode_budget or 0) / 1e9,
            plan.table(),
        )


NODES = [VRAMPlanner]
