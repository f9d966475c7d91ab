"""The size of the picture: one that the checkpoint was trained for."""

import torch

from ..pixart_sigma import aspect_ratio
from ..pixart_sigma.errors import SigmaError
from .host.api import io
from .host.devices import latent_device

RATIOS = ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "21:9", "3:1", "4:1")


class AspectRatioBucket(io.ComfyNode):
    # Long because a node's inputs stand in one place, each with its tooltip.
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaAspectRatioBucket",
            display_name="Σ Aspect-Ratio Bucket",
            category="PixArt Sigma",
            description="Picks the size nearest to what you ask for among those PixArt-Σ was trained on, and "
            "makes an empty latent of it. Other sizes work, but these draw best.",
            search_aliases=["empty latent", "resolution", "aspect ratio", "bucket", "size", "width height"],
            inputs=[
                io.Combo.Input(
                    "base",
                    options=["auto", *map(str, aspect_ratio.TABLES)],
                    default="auto",
                    tooltip="The size the transformer was trained for, as the side of a square. auto is that "
                    "of the connected model. 4096 is for the 2K transformer, beyond its training.",
                ),
                io.Combo.Input(
                    "ratio",
                    options=list(RATIOS),
                    default="1:1",
                    tooltip="Longer side : shorter side. Not read if width and height or an image are given.",
                ),
                io.Combo.Input(
                    "orientation",
                    options=["landscape", "portrait"],
                    default="landscape",
                    tooltip="Whether the ratio's longer side lies or stands.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=aspect_ratio.MAX_SIZE,
                    tooltip="With height: find the bucket of nearest ratio, and remember this size for the "
                    "decode to crop to. 0 to use the ratio.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=aspect_ratio.MAX_SIZE,
                    tooltip="With width. 0 to use the ratio.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="How many pictures are made at once."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Take the bucket nearest to this picture's ratio; before all other settings.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The transformer, from Load Σ Transformer: base auto follows it. Not read with "
                    "another base.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="An empty latent of the bucket's size."),
                io.Int.Output("width", display_name="width", tooltip="The bucket's width in pixels."),
                io.Int.Output("height", display_name="height", tooltip="The bucket's height in pixels."),
                io.Int.Output(
                    "asked_width",
                    display_name="asked_width",
                    tooltip="The width to crop to, for Σ VAE Decode; the bucket's own if none was asked for.",
                ),
                io.Int.Output(
                    "asked_height",
                    display_name="asked_height",
                    tooltip="The height to crop to, for Σ VAE Decode.",
                ),
            ],
        )

    @classmethod
    def execute(cls, base, ratio, orientation, width, height, batch_size, image=None, model=None):
        base = _trained_base(model) if base == "auto" else int(base)
        if image is not None:
            bucket, asked = fit_image(image.shape[2], image.shape[1], base)
        elif width and height:
            bucket, asked = aspect_ratio.nearest(width, height, base), (width, height)
        elif width or height:
            raise ValueError(
                f"The width is {width} and the height {height}. Give both, or 0 for both to use the ratio."
            )
        else:
            longer, shorter = ratio.split(":")
            bucket = aspect_ratio.by_ratio(
                f"{longer}:{shorter}" if orientation == "landscape" else f"{shorter}:{longer}", base
            )
            asked = bucket.width, bucket.height
        latent = torch.zeros(batch_size, 4, bucket.height // 8, bucket.width // 8, device=latent_device())
        return io.NodeOutput(
            {"samples": latent, "downscale_ratio_spacial": 8}, bucket.width, bucket.height, *asked
        )


def fit_image(width: int, height: int, base: int) -> tuple[aspect_ratio.Bucket, tuple[int, int]]:
    """The bucket nearest to a picture's ratio, and the largest size of exactly that ratio within it."""
    longest = max(width, height)
    if longest > aspect_ratio.MAX_SIZE:
        width, height = (round(side * aspect_ratio.MAX_SIZE / longest) for side in (width, height))
    bucket = aspect_ratio.nearest(width, height, base)
    scale = min(bucket.width / width, bucket.height / height)
    return bucket, (round(width * scale), round(height * scale))


def _trained_base(model) -> int:
    from .host.base_size import base_size

    if model is None:
        raise SigmaError(
            "The base is auto, and no model is connected that it could follow. Connect Load Σ Transformer's "
            "output to model, or choose a base: 256 for the demo, 1024 or 2048 for PixArt-Sigma."
        )
    base = base_size(model)
    if base not in aspect_ratio.TABLES:
        made_for = "does not say which size it is made for" if base is None else f"is made for {base} pixels"
        bases = ", ".join(map(str, aspect_ratio.TABLES))
        raise SigmaError(
            f"The base is auto, and the connected model {made_for}, for which there are no buckets. Choose a "
            f"base: {bases}."
        )
    return base


NODES = [AspectRatioBucket]
