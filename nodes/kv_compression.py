"""KV compression of any sampler's model."""

from .choice import CUSTOM, custom_input, list_input, spelled
from .host.api import io

# What the list offers -> its spelling on the command line.
PRESETS = {"off": "off", "auto": "auto", "deep half": "mean:2:deep", "all": "mean:2:all"}
EXAMPLE = "mean:2:14-27"


def choice_input():
    """`kv_compression`."""
    return list_input(
        "kv_compression",
        [*PRESETS, CUSTOM],
        "auto",
        "auto is as the checkpoint was trained; for all public ones it compresses above "
        "1024x1024 only, by the calibration if there is one. deep half and all average keys and values "
        "over 2x2 tokens in so many of the layers. custom is what custom_kv_compression says. Without "
        "trained weights pictures change a little.",
    )


def text_input():
    """`custom_kv_compression`."""
    return custom_input(
        "custom_kv_compression",
        EXAMPLE,
        "For kv_compression custom: OPERATOR:RATIO:LAYERS such as mean:2:14-27 or "
        "mean:2:deep:20-80%; several are joined by +. Not read with another choice.",
    )


def spelled_kv_compression(choice: str, custom: str) -> str:
    """The setting as on the command line."""
    return spelled("kv_compression", choice, custom, PRESETS, EXAMPLE)


class KVCompression(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaKVCompression",
            display_name="Σ KV Compression",
            category="PixArt Sigma",
            description="Lets KSampler and any other sampler compress keys and values, which makes 2K and 4K "
            "affordable. Σ Sampler has the same setting itself.",
            search_aliases=["kv compression", "token merging", "tome", "faster", "speed", "2k", "4k"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="PixArt-Σ from Load Σ Transformer, or from ComfyUI's own or a GGUF loader. "
                    "Trained KV weights work only from Load Σ Transformer.",
                ),
                choice_input(),
                text_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for any sampler. The one that came in is unchanged.")
            ],
        )

    @classmethod
    def execute(cls, model, kv_compression, custom_kv_compression=""):
        from .host.kv_compression import set_kv_compression

        return io.NodeOutput(
            set_kv_compression(model, spelled_kv_compression(kv_compression, custom_kv_compression))
        )


NODES = [KVCompression]
