"""KV compression of any sampler's model, and its calibration."""

from ..pixart_sigma.errors import SigmaError
from ..pixart_sigma.settings import MAX_STEPS, Settings
from .host.api import io
from .text import encode

# What the list offers -> its spelling on the command line.
PRESETS = {"off": "off", "auto": "auto", "deep half": "mean:2:deep", "all": "mean:2:all"}
CUSTOM = "custom"


def choice_input():
    """`kv_compression`: a list, into which a spelling may come by a link, and from workflows that were saved
    when it was a text. The host holds a list to its options only where it takes nothing else."""
    return io.MultiType.Input(
        io.Combo.Input(
            "kv_compression",
            options=[*PRESETS, CUSTOM],
            default="auto",
            tooltip="auto is as the checkpoint was trained; for all public ones it compresses above "
            "1024x1024 only, by the calibration if there is one. deep half and all average keys and values "
            "over 2x2 tokens in so many of the layers. custom is what custom_kv_compression says. Without "
            "trained weights pictures change a little.",
        ),
        types=[io.String],
    )


def custom_input():
    """`custom_kv_compression`, the last input of a node: saved workflows hold values by their place."""
    return io.String.Input(
        "custom_kv_compression",
        optional=True,
        default="",
        placeholder="mean:2:14-27",
        tooltip="For kv_compression custom: OPERATOR:RATIO:LAYERS such as mean:2:14-27 or "
        "mean:2:deep:20-80%; several are joined by +. Not read with another choice.",
    )


def spelled(choice: str, custom: str) -> str:
    """The setting as on the command line. SigmaError where it is custom, and the text is empty."""
    if choice != CUSTOM:
        return PRESETS.get(choice, choice)
    if not custom.strip():
        raise SigmaError(
            "kv_compression is custom, and custom_kv_compression is empty. Write OPERATOR:RATIO:LAYERS "
            f"there, such as mean:2:14-27, or choose {', '.join(PRESETS)}."
        )
    return custom


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
                custom_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for any sampler. The one that came in is unchanged.")
            ],
        )

    @classmethod
    def execute(cls, model, kv_compression, custom_kv_compression=""):
        from .host.kv_compression import set_kv_compression

        return io.NodeOutput(set_kv_compression(model, spelled(kv_compression, custom_kv_compression)))


class CalibrateKVCompression(io.ComfyNode):
    # Long because a node's inputs stand in one place, each with its tooltip.
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaCalibrateKVCompression",
            display_name="Calibrate Σ KV Compression",
            category="PixArt Sigma",
            description="Measures on your own checkpoint how much KV compression each layer bears, and picks "
            "layers, ratios and steps for the error that you allow. Done once; auto then uses it.",
            search_aliases=["kv compression", "calibration", "measure", "error budget", "2k", "4k"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from Load Σ Transformer."),
                io.Clip.Input("clip", tooltip="The text encoder for the prompts."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Empty latents from Σ Aspect-Ratio Bucket, of the size that you mean to make.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a portrait of an old fisherman with a grey beard, soft window light\n"
                    "a busy street market at night, neon signs, many small details",
                    tooltip="What to measure with, one prompt in each line. Two to four of the kind that you "
                    "mean to make are enough; more take longer.",
                ),
                io.Float.Input(
                    "error_percent",
                    default=5.0,
                    min=0.1,
                    max=50.0,
                    step=0.1,
                    tooltip="How far the finished latents may be from the uncompressed ones, in percent. "
                    "More is faster, and pictures change more.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    # If this is left out, the frontend changes a seed after each run.
                    control_after_generate=False,
                    tooltip="Of the first prompt's noise; the next prompt has the next seed.",
                ),
                io.Int.Input(
                    "steps", default=20, min=4, max=MAX_STEPS, tooltip="As many as you mean to sample with."
                ),
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="As you mean to sample with.",
                ),
                io.Boolean.Input(
                    "save",
                    default=True,
                    tooltip="Write the result beside the model, where auto finds it from now on.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="kv_compression",
                    tooltip="What was chosen, for kv_compression of Σ Sampler or Σ KV Compression.",
                ),
                io.Image.Output(display_name="plot", tooltip="The error of each layer, and what was chosen."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, latent_image, prompts, error_percent, save, **chosen):
        import numpy
        import torch

        from ..pixart_sigma.errors import SigmaError
        from ..pixart_sigma.studies.calibration_picture import draw
        from ..pixart_sigma.transformer.kv_rules import spell
        from .host import calibration as host
        from .host.memory import record

        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise SigmaError("There is no prompt to calibrate with; write one in each line.")
        conditionings = [encode(clip, line, False) for line in lines]
        height, width = (8 * side for side in latent_image["samples"].shape[-2:])
        settings = Settings(
            width=width,
            height=height,
            seed=chosen["seed"],
            steps=chosen["steps"],
            guidance_scale=chosen["cfg"],
        )
        with record("Calibrate KV compression"):
            calibration = host.calibrate(
                model,
                conditionings,
                encode(clip, "", False),
                latent_image,
                lines,
                settings,
                error_percent / 100,
            )
        if save:
            host.save(calibration, model)
        plot = torch.from_numpy(numpy.asarray(draw(calibration)).astype("float32") / 255)
        return io.NodeOutput(spell(calibration.rules), plot[None])


NODES = [KVCompression, CalibrateKVCompression]
