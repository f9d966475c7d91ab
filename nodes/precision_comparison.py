"""What T5 in 8 or 4 bit costs, before it is trusted."""

from ..pixart_sigma.choices import MAX_STEPS, T5_DEVICES, T5_PRECISIONS
from ..pixart_sigma.setting_checks import MAX_SEED
from ..pixart_sigma.settings import Settings
from .host.api import io
from .host.folders import DEMO_CHOICE, choices, find


class CompareT5Precisions(io.ComfyNode):
    # Long because a node's inputs stand in one place, each with its tooltip.
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaCompareT5Precisions",
            display_name="Compare Σ T5 Precisions",
            category="PixArt Sigma",
            description="Shows what T5 in 8 or 4 bit costs: the same prompts in two precisions, how far each "
            "word moves, and both pictures with their difference. One encoder is in memory at a time.",
            search_aliases=["t5", "quantization", "8 bit", "int8", "nf4", "quality", "compare", "fidelity"],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=choices("text_encoder"),
                    default=DEMO_CHOICE,
                    tooltip="As in Load Σ Text Encoder (T5). It must not have been saved in 8 or 4 bit, "
                    "since such a file loads in that precision only.",
                ),
                io.Combo.Input(
                    "reference",
                    options=list(T5_PRECISIONS),
                    default="bf16",
                    tooltip="The precision to compare with. bf16 needs twice the memory of int8; fp32 is "
                    "exact and needs four times.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(T5_PRECISIONS),
                    default="int8",
                    tooltip="The precision that you mean to use.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a portrait of an old fisherman with a grey beard, soft window light\n"
                    "three green apples to the left of a glass vase, still life, oil on canvas",
                    tooltip="One prompt in each line, of the kind that you mean to use.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    # If this is left out, the frontend changes a seed after each run.
                    control_after_generate=False,
                    tooltip="The noise that all pictures start from.",
                ),
                io.Int.Input(
                    "steps", default=20, min=1, max=MAX_STEPS, tooltip="As many as you mean to sample with."
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
                io.Combo.Input(
                    "device",
                    options=list(T5_DEVICES),
                    default="auto",
                    advanced=True,
                    tooltip="As in Load Σ Text Encoder (T5). Where the reference does not fit on the GPU, "
                    "stream it; nf4 and fp4 can not be streamed, and need cpu then.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The transformer. With it and a VAE the pictures are compared too.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE, for the pictures."),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="Empty latents from Σ Aspect-Ratio Bucket, of the pictures' size. Without them "
                    "it is the square that the model was trained for.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="comparison",
                    tooltip="The pictures side by side with their difference, and the words by how far "
                    "they moved.",
                ),
                io.String.Output(
                    display_name="table", tooltip="Cosine, SNR and PSNR of each prompt, as text."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        text_encoder,
        reference,
        precision,
        prompts,
        device,
        model=None,
        vae=None,
        latent_image=None,
        **chosen,
    ):
        import numpy
        import torch

        from ..pixart_sigma.studies.precision_picture import draw
        from .host.precision_comparison import Drawing, compare

        lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
        settings = Settings(seed=chosen["seed"], steps=chosen["steps"], guidance_scale=chosen["cfg"])
        comparison = compare(
            find("text_encoder", text_encoder),
            (reference, precision),
            device,
            lines,
            Drawing(model, vae, latent_image),
            settings,
        )
        picture = torch.from_numpy(numpy.asarray(draw(comparison)).astype("float32") / 255)
        return io.NodeOutput(picture[None], comparison.table())


NODES = [CompareT5Precisions]
