"""From latents to pictures, at the size that was asked for."""

from ..pixart_sigma.choices import RELEASES
from ..pixart_sigma.errors import SigmaError
from .host.api import io
from .host.checks import check_latents

TILINGS = ("auto", "off", "on", "strips")
# In latent pixels: tiles of 512 pixels.
TILE = 64
OVERLAP = 16


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaVAEDecode",
            display_name="Σ VAE Decode",
            category="PixArt Sigma",
            description="Turns latents into pictures, crops them to the size that was asked for, and "
            "can release the VAE.",
            search_aliases=["decode", "vae decode", "latent to image", "tiled decode", "crop", "4k"],
            inputs=[
                io.Latent.Input("samples", tooltip="What the sampler made."),
                io.Vae.Input("vae", tooltip="The SDXL VAE, or the demo's for the demo transformer."),
                io.Combo.Input(
                    "tiling",
                    options=list(TILINGS),
                    default="auto",
                    tooltip="auto decodes the whole picture where memory allows it, else in strips, which "
                    "give the same picture in less memory. off: always whole. strips: always in strips. "
                    "on: in ComfyUI's tiles, which can differ in tone.",
                ),
                io.Int.Input(
                    "asked_width",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Scale and crop to this width, from Σ Aspect-Ratio Bucket. 0 leaves the size.",
                ),
                io.Int.Input(
                    "asked_height",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="With asked_width. 0 leaves the size.",
                ),
                io.Combo.Input(
                    "after_use",
                    options=list(RELEASES),
                    default="keep",
                    tooltip="What happens to the VAE afterwards. keep leaves it where it is, offload moves "
                    "it out of the GPU, free also drops it from RAM where it can.",
                ),
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="GB of graphics memory for the decode; auto and strips keep to it. 0 is what is "
                    "free. A smaller one is slower and parks more in RAM: 4096x4096 up to about 9 GB.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, samples, vae, tiling, asked_width, asked_height, after_use, budget=0.0):
        from .host.memory import record
        from .host.release import release

        latents = samples["samples"]
        check_latents(latents)
        if not latents.isfinite().all():
            raise SigmaError(
                "The latents contain values that are not numbers, so there is no picture in them. Sample "
                "again in bf16 or fp32, or with a lower cfg."
            )
        if bool(asked_width) != bool(asked_height):
            raise ValueError(
                f"The asked size is {asked_width}x{asked_height}. Give both, or 0 for both to leave the size."
            )
        with record("Decode"):
            try:
                pictures = _decode(vae, latents, tiling, budget)
            finally:
                release(vae, after_use)
        if asked_width:
            from ..pixart_sigma.aspect_ratio import crop_back

            pictures = crop_back(pictures.movedim(-1, 1), asked_width, asked_height).movedim(1, -1)
        return io.NodeOutput(pictures)


def _decode(vae, latents, tiling, budget):
    if tiling == "on":
        return vae.decode_tiled(latents, tile_x=TILE, tile_y=TILE, overlap=OVERLAP)
    from .host.vae import decode

    return decode(vae, latents, "whole" if tiling == "off" else tiling, budget * 1e9 or None)


NODES = [VAEDecode]
