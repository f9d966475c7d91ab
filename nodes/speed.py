"""Steps that are forecast in place of being computed, for any sampler's model."""

from ..pixart_sigma.errors import SigmaError
from .host.api import io

# What the list offers -> its spelling on the command line.
PRESETS = {
    "off": "off",
    "auto": "auto",
    "every other step": "forecast:1:1:10-95%",
    "every third step": "forecast:1:2:10-95%",
}
CUSTOM = "custom"


def speed_input(options: list[str], default: str, tooltip: str, optional=False):
    """`speed`: a list, into which a spelling may come by a link."""
    return io.MultiType.Input(
        io.Combo.Input("speed", options=options, default=default, tooltip=tooltip, optional=optional),
        types=[io.String],
    )


def spelled(choice: str, custom: str = "") -> str:
    """The setting as on the command line. SigmaError where it is custom, and the text is empty."""
    if choice != CUSTOM:
        return PRESETS.get(choice, choice)
    if not custom.strip():
        raise SigmaError(
            "speed is custom, and custom_speed is empty. Write forecast:ORDER:SKIPPED:START-END% there, such "
            f"as forecast:1:1:10-95%, or choose {', '.join(PRESETS)}."
        )
    return custom


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
                speed_input(
                    [*PRESETS, CUSTOM],
                    "auto",
                    "auto does what was measured for the checkpoint, or where nothing was every other step. "
                    "every other step and every third step compute that one, and forecast the rest; the "
                    "first and the last steps are computed. Samplers that add noise, and fewer than 20 "
                    "steps, bear less.",
                ),
                io.String.Input(
                    "custom_speed",
                    optional=True,
                    default="",
                    placeholder="forecast:1:1:10-95%",
                    tooltip="For speed custom: forecast:ORDER:SKIPPED, guidance:ORDER:SKIPPED or unguided, "
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

        return io.NodeOutput(set_speed(model, spelled(speed, custom_speed)))


NODES = [Speed]
