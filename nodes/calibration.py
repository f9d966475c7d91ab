"""Calibration of speed and of KV compression on one's own checkpoint."""

from ..pixart_sigma.choices import CALIBRATION_COSTS, CALIBRATION_REFERENCES, MAX_STEPS
from ..pixart_sigma.errors import SigmaError
from ..pixart_sigma.settings import Settings
from .host.api import io
from .text import encode


class Calibrate(io.ComfyNode):
    # Long because a node's inputs stand in one place, each with its tooltip.
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaCalibrateKVCompression",
            display_name="Calibrate Σ Speed",
            category="PixArt Sigma",
            description="Measures on your own checkpoint what forecast steps, forecast guidance, compressed "
            "layers and fewer steps change, and picks what is fastest within the error that you allow. Done "
            "once; auto then uses it.",
            search_aliases=[
                "speed",
                "faster",
                "kv compression",
                "calibration",
                "error budget",
                "cache",
                "2k",
            ],
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
                    tooltip="How far the finished latents may be from the reference, in percent. More is "
                    "faster, and pictures change more.",
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
                    default=False,  # a workflow from elsewhere writes beside nobody's models unasked
                    tooltip="Write the result beside the model, where auto finds it from now on. Off, it is "
                    "only in the outputs.",
                ),
                io.Combo.Input(
                    "reference",
                    options=list(CALIBRATION_REFERENCES),
                    default=CALIBRATION_REFERENCES[0],
                    optional=True,
                    tooltip="Where the error is counted from: own is the same run without savings, converged "
                    "a run of 80 steps, from which your own steps may be further than the error allows.",
                ),
                io.Combo.Input(
                    "cost",
                    options=list(CALIBRATION_COSTS),
                    default=CALIBRATION_COSTS[0],
                    optional=True,
                    tooltip="What is saved: multiply_adds, counted, which is the same on every machine, or "
                    "seconds as they are measured on this one.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="kv_compression",
                    tooltip="KV compression alone, for kv_compression of Σ Sampler or Σ KV Compression.",
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="Error over cost of all that was measured, and the error of each layer.",
                ),
                io.String.Output(
                    display_name="speed",
                    tooltip="The forecasts of the best choice that keeps your steps, for speed of Σ Sampler "
                    "or Σ Speed. auto there also brings the KV compression that belongs to it.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        latent_image,
        prompts,
        error_percent,
        save,
        reference=CALIBRATION_REFERENCES[0],
        cost=CALIBRATION_COSTS[0],
        **chosen,
    ):
        import numpy
        import torch

        from ..pixart_sigma.speed import spell as spell_speed
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
        with record("Calibrate speed"):
            calibration = host.calibrate(
                model,
                conditionings,
                encode(clip, "", False),
                latent_image,
                lines,
                settings,
                error_percent / 100,
                reference,
                cost,
            )
        if save:
            host.save(calibration, model)
        plot = torch.from_numpy(numpy.asarray(draw(calibration)).astype("float32") / 255)
        in_place = calibration.speed_in_place
        savings = in_place.choice.savings if in_place else ()
        return io.NodeOutput(spell(calibration.rules), plot[None], spell_speed(savings))


NODES = [Calibrate]
