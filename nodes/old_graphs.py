"""For graphs that were made with ComfyUI_ExtraModels: what two of its nodes did and no other node does. The
rest of its nodes is replaced by ours and the host's, see `host/replacements.py`."""

from ..pixart_sigma.aspect_ratio import TABLES
from .host.api import io

# What ExtraModels calls its models -> the base of the sizes that it had for them.
MODELS = {
    "PixArtMS_XL_2": 1024,
    "PixArt_XL_2": 512,
    "PixArtMS_Sigma_XL_2_2K": 2048,
    "PixArtMS_Sigma_XL_2": 1024,
    "PixArtMS_Sigma_XL_2_512": 512,
}
# Its labels, with two decimals -> the key in our tables, which are the same for each of them.
RATIOS = {f"{float(ratio):.2f}": ratio for ratio in TABLES[1024]}


class ResolutionSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaResolutionSelect",
            display_name="Σ Resolution Select (old graphs)",
            category="PixArt Sigma",
            description="Takes the place of ExtraModels' PixArt Resolution Select in old graphs, and gives "
            "the same sizes. In new graphs use Σ Aspect-Ratio Bucket.",
            search_aliases=["pixart resolution select", "extramodels", "resolution", "width height"],
            is_deprecated=True,
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(MODELS),
                    default="PixArtMS_Sigma_XL_2",
                    tooltip="Whose sizes: those of 512, of 1024 (PixArtMS_Sigma_XL_2) or of 2K.",
                ),
                io.Combo.Input(
                    "ratio",
                    options=list(RATIOS),
                    default="1.00",
                    tooltip="Width : height. 2.00 is twice as wide as high.",
                ),
            ],
            outputs=[
                io.Int.Output("width", display_name="width", tooltip="The width in pixels."),
                io.Int.Output("height", display_name="height", tooltip="The height in pixels."),
            ],
        )

    @classmethod
    def execute(cls, model, ratio):
        # The authors' tables hold (height, width) by height / width; ExtraModels took them for (width,
        # height), so that its labels are width / height.
        width, height = TABLES[MODELS[model]][RATIOS[ratio]]
        return io.NodeOutput(width, height)


class T5FromClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaT5FromCLIP",
            display_name="Σ T5 from SD3 CLIP (old graphs)",
            category="PixArt Sigma",
            description="Takes the T5 out of a CLIP that was loaded for SD3, as ExtraModels' PixArt T5 from "
            "SD3 CLIP did in old graphs. In new graphs use Load Σ Text Encoder (T5), or Load CLIP with type "
            "pixart.",
            search_aliases=["pixart t5 from sd3 clip", "extramodels", "t5xxl", "sd3 clip"],
            is_deprecated=True,
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Loaded for SD3 with a T5-XXL among its text encoders, by any of ComfyUI's "
                    "loaders.",
                ),
                io.Int.Input(
                    "padding",
                    default=1,
                    min=1,
                    max=300,
                    tooltip="The prompt has at least as many tokens; 1 adds none, which is best.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="T5 alone, for CLIP Text Encode or Σ Text Encode.")],
        )

    @classmethod
    def execute(cls, clip, padding):
        from .host.t5_alone import t5_alone

        return io.NodeOutput(t5_alone(clip, padding))


NODES = [ResolutionSelect, T5FromClip]
