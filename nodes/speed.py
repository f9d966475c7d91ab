"""Steps that are forecast in place of being computed, for any sampler's model."""

from ..pixart_sigma.speed import CAUTIOUS, spell
from .choice import CUSTOM, custom_input, list_input, spelled
from .host.api import io

# What the list offers -> its spelling on the command line.
PRESETS = {
    "off": "off",
    "auto": "auto",
    "every other step": spell(CAUTIOUS),
    "every third step": "forecast:1:2:10-95%",
}
EXAMPLE = spell(CAUTIOUS)


class Speed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaSpeed",
            display_name="Σ Speed",
            category="PixArt Sigma",
            description="Lets KSampler and any other sampler forecast steps from those before, in place of "
            "computing them: nearly twice as fast, and pictures change a little. Σ Sampler has the same "
            "setting itself.",
            search_aliases=["speed", "faster", "step cache", "easycache", "teacache", "taylorseer", "skip"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="PixArt-Σ from Load Σ Transformer, or from ComfyUI's own or a GGUF loader. Not "
                    "together with EasyCache or LazyCache.",
                ),
                list_input(
                    "speed",
                    [*PRESETS, CUSTOM],
                    "auto",
                    "auto does what was measured for the checkpoint, or where nothing was every other step. "
                    "every other step and every third step compute that one, and forecast the rest; the "
                    "first and the last steps are computed. Samplers that add noise, and fewer than 20 "
                    "steps, bear less.",
                ),
                custom_input(
                    "custom_speed",
                    EXAMPLE,
                    "For speed custom: forecast:ORDER:SKIPPED, guidance:ORDER:SKIPPED or unguided, "
                    "each with :START-END% for a part of the run; several are joined by +. Not read with "
                    "another choice.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for any sampler. The one that came in is unchanged.")
            ],
        )

    @classmethod
    def execute(cls, model, speed, custom_speed=""):
        from .host.speed import set_speed

        return io.NodeOutput(set_speed(model, spelled("speed", speed, custom_speed, PRESETS, EXAMPLE)))


NODES = [Speed]
