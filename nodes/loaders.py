"""The three models, and ControlNets for the transformer, each loaded by a node of its own."""

from ..pixart_sigma.choices import DTYPES, T5_DEVICES, T5_PRECISIONS, VARIANTS
from .host.api import io
from .host.folders import DEMO_CHOICE, check, choices, find


class LoadTransformer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaLoadTransformer",
            display_name="Load Σ Transformer",
            category="PixArt Sigma",
            description="Loads a PixArt-Σ transformer from any published format, or the small demo model "
            "that comes with the pack. What it loads is an ordinary MODEL: LoRAs of PixArt-Σ go into "
            "Load Σ LoRA or ComfyUI's own Load LoRA behind it.",
            search_aliases=[
                "pixart",
                "pixart sigma",
                "load diffusion model",
                "unet loader",
                "model loader",
                "dit",
            ],
            inputs=[
                io.Combo.Input(
                    "transformer",
                    options=choices("transformer"),
                    default=DEMO_CHOICE,
                    tooltip="A file from models/diffusion_models or models/checkpoints, or a folder from "
                    "models/diffusers. The demos need no download; one was trained with KV compression.",
                ),
                io.Combo.Input(
                    "variant",
                    options=["auto", *VARIANTS],
                    default="auto",
                    advanced=True,
                    tooltip="Which size the file was trained for. The picture is the same with each: nodes "
                    "that pick a size, or warn of one, go by it. 1024 and 2K files look alike: choose it "
                    "here if the file's name does not say.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    tooltip="Precision of the weights. auto is what ComfyUI picks for this device.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The transformer, for our sampler or any of ComfyUI's.")],
        )

    @classmethod
    def validate_inputs(cls, transformer):
        return check("transformer", transformer)

    @classmethod
    def execute(cls, transformer, variant, dtype):
        from .host.notice import show_notice
        from .host.transformer import load_model

        path = find("transformer", transformer)
        model = load_model(path, None if variant == "auto" else variant, None if dtype == "auto" else dtype)
        guessed = model.model.variant_notice
        show_notice(f"{guessed} If it was trained for another, choose it under variant." if guessed else "")
        return io.NodeOutput(model)


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaLoadTextEncoder",
            display_name="Load Σ Text Encoder (T5)",
            category="PixArt Sigma",
            description="Loads the T5 text encoder in 8 or 4 bit, or unquantised. It is read when the first "
            "prompt is encoded, and not at all if every prompt is cached.",
            search_aliases=[
                "t5 loader",
                "load t5",
                "t5xxl",
                "pixart text encoder",
                "text encoder loader",
                "clip loader",
                "load clip",
                "bitsandbytes",
                "8 bit",
                "int8",
                "nf4",
            ],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=choices("text_encoder"),
                    default=DEMO_CHOICE,
                    tooltip="A file or folder from models/text_encoders, or a folder from models/diffusers. "
                    "The demo transformer understands the demo encoder only.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(T5_PRECISIONS),
                    default="int8",
                    tooltip="int8 takes a quarter of fp32 and is close to it; nf4 and fp4 take an eighth. A "
                    "folder that was saved in 8 or 4 bit loads in that precision only.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(T5_DEVICES),
                    default="auto",
                    advanced=True,
                    tooltip="auto is where ComfyUI puts text encoders; cpu leaves the GPU alone and is slow. "
                    "stream keeps T5 in RAM and passes it through the GPU block by block: the same result "
                    "from under 1 GB of GPU memory, but slower for each prompt. Not with nf4 or fp4.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The encoder, for Σ Text Encode or CLIP Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, text_encoder):
        return check("text_encoder", text_encoder)

    @classmethod
    def execute(cls, text_encoder, precision, device):
        from .host.text_encoder import load_clip

        return io.NodeOutput(load_clip(find("text_encoder", text_encoder), precision, device))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaLoadVAE",
            display_name="Load Σ VAE",
            category="PixArt Sigma",
            description="Loads the SDXL VAE that PixArt-Σ uses, or the demo's, as ComfyUI's own VAE. A VAE "
            "of Stable Diffusion 1.x in a folder is refused.",
            search_aliases=["pixart vae", "sdxl vae", "load vae", "vae loader", "autoencoder"],
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=choices("vae"),
                    default=DEMO_CHOICE,
                    tooltip="A file from models/vae, or a folder from models/diffusers. The demo transformer "
                    "draws for the demo VAE only.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE, for Σ VAE Decode and all of ComfyUI's VAE nodes.")],
        )

    @classmethod
    def validate_inputs(cls, vae):
        return check("vae", vae)

    @classmethod
    def execute(cls, vae):
        from .host.vae import load_vae

        return io.NodeOutput(load_vae(find("vae", vae)))


class LoadControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaLoadControlNet",
            display_name="Load Σ ControlNet",
            category="PixArt Sigma",
            description="Loads a ControlNet of PixArt: as SimpleTuner trains it for PixArt-Σ, or diffusers "
            "and the authors for PixArt-α. It goes into ComfyUI's Apply ControlNet, with the VAE connected "
            "there, and acts on a MODEL from Load Σ Transformer.",
            search_aliases=[
                "pixart controlnet",
                "controlnet loader",
                "load controlnet model",
                "control net",
                "hed",
                "canny",
                "edges",
            ],
            inputs=[
                io.Combo.Input(
                    "control_net",
                    options=choices("controlnet"),
                    tooltip="A file or a folder from models/controlnet. It must be of the transformer's "
                    "width: there are none for the demo.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(
                    tooltip="The ControlNet, for Apply ControlNet. Connect the VAE there: it reads the "
                    "picture in latents."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, control_net):
        return check("controlnet", control_net)

    @classmethod
    def execute(cls, control_net):
        from .host.controlnet import load_control_net

        return io.NodeOutput(load_control_net(find("controlnet", control_net)))


NODES = [LoadTransformer, LoadTextEncoder, LoadVAE, LoadControlNet]
