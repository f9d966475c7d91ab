"""From noise to latents: the reference pipeline's schedule, and a sampler with KV compression."""

from ..pixart_sigma.choices import MAX_STEPS, RELEASES
from ..pixart_sigma.setting_checks import MAX_SEED
from .choice import list_input
from .host.api import io
from .host.sampling import SamplerSettings, reference_sigmas, sample, sampler_names, schedule_names
from .kv_compression import choice_input, spelled_kv_compression, text_input
from .speed import PRESETS as SPEEDS


class ReferenceSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaReferenceSchedule",
            display_name="Σ Reference Schedule",
            category="PixArt Sigma",
            description="The noise levels of the reference pipeline, for SamplerCustom. With dpmpp_2m the "
            "result equals that of diffusers' PixArtSigmaPipeline.",
            search_aliases=["sigmas", "scheduler", "basic scheduler", "diffusers", "linspace"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the noise levels are for."),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="How many steps to take. 14 to 20 are usual; more are slower and rarely better.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from pure noise. Lower starts from the given latents and keeps more of "
                    "them.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="The noise levels, for SamplerCustom.")],
        )

    @classmethod
    def execute(cls, model, steps, denoise):
        return io.NodeOutput(reference_sigmas(model, steps, denoise))


class Sampler(io.ComfyNode):
    # Long because a node's inputs stand in one place, each with its tooltip.
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaSampler",
            display_name="Σ Sampler (KV-compressed)",
            category="PixArt Sigma",
            description="Denoises latents as the reference pipeline does. For large pictures it compresses "
            "keys and values, which makes 2K and 4K affordable. Can then release the transformer.",
            search_aliases=["ksampler", "sample", "denoise", "kv compression", "txt2img", "img2img", "4k"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from Load Σ Transformer."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Conditioning.Input("negative", tooltip="What to avoid."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Empty latents from Σ Aspect-Ratio Bucket, or an encoded picture with denoise "
                    "below 1. A noise mask is respected.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The noise to start from. The same seed and settings give the same picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="How many steps to take. 14 to 20 are usual; more are slower and rarely better.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely to follow the prompt. 4.5 is the model's own; 1 ignores the "
                    "negative prompt and takes half the time.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=sampler_names(),
                    default="dpmpp_2m",
                    tooltip="dpmpp_2m is the reference pipeline's. Not read where schedule is a few-step "
                    "recipe, which has its own.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=schedule_names(),
                    default="reference",
                    tooltip="reference is the checkpoint's own, as the reference pipeline has it. After "
                    "ComfyUI's come recipes for weights that were distilled to few steps, one-step to tcd-8, "
                    "which decide steps and sampler and run with cfg 1.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from pure noise. Lower keeps more of the given latents.",
                ),
                choice_input(),
                io.Combo.Input(
                    "after_use",
                    options=list(RELEASES),
                    default="keep",
                    tooltip="What happens to the transformer afterwards. keep leaves it where it is, offload "
                    "moves it out of the GPU, free also lets the system drop it from RAM.",
                ),
                text_input(),
                list_input(
                    "speed",
                    list(SPEEDS),
                    "off",
                    "Which steps are forecast from those before, in place of being computed. off and auto "
                    "leave what Σ Speed has set, whose help says what each choice does.",
                    optional=True,
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latents, for Σ VAE Decode or VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        kv_compression,
        after_use,
        custom_kv_compression="",
        speed="off",
        **chosen,
    ):
        from .host.memory import record
        from .host.release import release

        settings = SamplerSettings(
            **chosen,
            kv_compression=spelled_kv_compression(kv_compression, custom_kv_compression),
            speed=SPEEDS.get(speed, speed),
        )
        with record("Sample"):
            try:
                latent = sample(model, positive, negative, latent_image, settings)
            finally:
                release(model, after_use)
        return io.NodeOutput(latent)


NODES = [ReferenceSchedule, Sampler]
