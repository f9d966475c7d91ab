"""Pictures to start from and masks, from files, from Pillow and as tensors: checked where they come in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..aspect_ratio import crop_back
from ..errors import SigmaError
from .fingerprint import digest
from .picture_files import named_if_damaged, open_picture

PAPER = "white"  # what shows where a picture is transparent, as in a browser
KEPT = "black"  # and where a mask is
# Of two shapes that are said to be one, the most that the ratios may differ: a pixel's rounding.
SAME_SHAPE = 0.01


@dataclass(frozen=True)
class Start:
    """What a run starts from beside noise: nothing, or a picture (3, H, W), and where that is painted anew
    (1, H, W), if not everywhere."""

    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, image: Any, mask: Any) -> "Start":
        """Raises SigmaError for what `as_picture` and `as_mask` refuse, and for a mask alone."""
        if image is None:
            if mask is not None:
                raise SigmaError("A mask says where a picture is painted anew; give the picture too.")
            return cls()
        picture = as_picture(image)
        return cls(picture, None if mask is None else as_mask(mask, picture))

    @property
    def image_sha256(self) -> str:
        """Of the picture's numbers; "" without one."""
        return "" if self.image is None else digest(self.image)

    @property
    def mask_sha256(self) -> str:
        """Of the mask's numbers; "" without one."""
        return "" if self.mask is None else digest(self.mask)


NO_PICTURE = Start()


def read_picture(path: str | Path) -> torch.Tensor:
    """The picture of a file as (3, H, W) in [0, 1], float32; see `from_pillow`, also for what it raises."""
    with open_picture(path) as picture:
        return from_pillow(picture, str(path))


def to_pillow(picture: torch.Tensor) -> Image.Image:
    """A picture (3, H, W) as Pillow's, what is outside of [0, 1] clamped."""
    return Image.fromarray((picture.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())


def read_mask(path: str | Path) -> torch.Tensor:
    """The mask of a file as (1, H, W) in [0, 1], float32: 1 is painted anew; transparent is kept."""
    with open_picture(path) as picture:
        return _grey(from_pillow(picture, str(path), KEPT))


def as_picture(image: Any) -> torch.Tensor:
    """A picture (3, H, W) in [0, 1], float32, of a Pillow image or of such a tensor of any floats.

    Raises SigmaError for a tensor of another layout, type or range, with what to do; nothing is guessed.
    """
    if isinstance(image, Image.Image):
        return from_pillow(image, "image")
    _check_tensor("image", image)
    shape = tuple(image.shape)
    wanted = f"image is {shape}; a picture is (3, height, width)"
    if image.ndim == 4:
        raise SigmaError(f"{wanted}, one and not a batch: give image[0].")
    if image.ndim == 3 and shape[0] not in (1, 3, 4) and shape[2] in (1, 3, 4):
        raise SigmaError(f"{wanted}, colours first: give image.permute(2, 0, 1).")
    if image.ndim == 3 and shape[0] == 4:
        raise SigmaError(f"{wanted}, without transparency: give image[:3].")
    if image.ndim == 3 and shape[0] == 1 or image.ndim == 2:
        raise SigmaError(f"{wanted}, in colours: give image.expand(3, -1, -1).")
    if image.ndim != 3 or shape[0] != 3:
        raise SigmaError(f"{wanted}.")
    return _check_range("image", image)


def as_mask(mask: Any, image: torch.Tensor) -> torch.Tensor:
    """A mask (1, H, W) in [0, 1], float32, of the picture (3, H, W): 1 is painted anew, 0 is kept.

    mask: a Pillow image, or a tensor (1, H, W) or (H, W) of floats in [0, 1] or of booleans.
    Raises SigmaError for another tensor, for a mask of another shape than the picture's, which may be larger
    or smaller, and for one that keeps everything.
    """
    if isinstance(mask, Image.Image):
        made = _grey(from_pillow(mask, "mask", KEPT))
    else:
        _check_tensor("mask", mask)
        if mask.dtype == torch.bool:
            mask = mask.float()
        if mask.ndim not in (2, 3) or mask.ndim == 3 and len(mask) != 1:
            raise SigmaError(f"mask is {tuple(mask.shape)}; a mask is (1, height, width) or (height, width).")
        made = _check_range("mask", mask.reshape(1, *mask.shape[-2:]))
    (height, width), (image_height, image_width) = made.shape[-2:], image.shape[-2:]
    if abs(width * image_height - height * image_width) > SAME_SHAPE * height * image_width:
        raise SigmaError(
            f"The mask is {width}x{height} and the picture {image_width}x{image_height}; give a mask of the "
            "picture's size, or of the same shape."
        )
    if not (made >= 0.5).any():
        raise SigmaError(
            "The mask is black everywhere, which keeps the whole picture; paint white what is to be painted "
            "anew."
        )
    return made


def latent_mask(mask: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The mask (1, 1, height // 8, width // 8) of latents, 0 or 1, for a picture of this size.

    The mask (1, H, W) is scaled and cropped as the picture is, and parted at 0.5. Each latent stands for 8x8
    pixels, and is painted anew where any of them is. On masks that keep to this grid that is what diffusers'
    inpainting does.
    """
    scaled = crop_back(mask[None], width, height)
    return F.max_pool2d((scaled >= 0.5).float(), 8)


def from_pillow(picture: Image.Image, name: str, background: str = PAPER) -> torch.Tensor:
    """A picture as (3, H, W) in [0, 1], float32, upright as its camera says; the first frame of several.

    Palettes and CMYK are taken as Pillow shows them; where a picture is transparent it shows `background`.
    Grey of 16 bits is divided by 65535, grey in floats is taken in [0, 1].
    Raises SigmaError that names the picture where it is damaged, empty, or in numbers of unknown range.
    """
    with named_if_damaged(name):
        if getattr(picture, "is_animated", False):
            picture.seek(0)
        picture.load()
        upright = ImageOps.exif_transpose(picture)
    if 0 in upright.size:
        raise SigmaError(f"{name} has no pixels ({upright.width}x{upright.height}).")
    if upright.mode.startswith("I") or upright.mode == "F":
        pixels = numpy.repeat(_scaled_grey(upright, picture.format, name)[..., None], 3, axis=2)
    else:
        pixels = _flat(upright, background)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _flat(picture: Image.Image, background: str) -> numpy.ndarray:
    """(H, W, 3) in [0, 1] of a picture of 8 bits, on a background where it is transparent."""
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        if picture.mode == "La":
            picture = picture.convert("LA")
        paper = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(paper, picture.convert("RGBA"))
    return numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255


def _scaled_grey(picture: Image.Image, made_by: str | None, name: str) -> numpy.ndarray:
    """(H, W) in [0, 1] of grey in more than 8 bits, where it is certain which number is white."""
    grey = numpy.asarray(picture)
    if not numpy.isfinite(grey).all():
        raise SigmaError(f"{name} holds NaN or infinity.")
    least, most = grey.min(), grey.max()
    seen = f"{name} holds grey from {least:g} to {most:g}"
    if picture.mode == "F":
        if least < 0 or most > 1:
            raise SigmaError(f"{seen} in floats, where black is 0 and white is 1; scale it first.")
        return grey.astype(numpy.float32)
    if picture.mode == "I":
        # 32 bits. In a PNG or PGM they hold the file's 16, in other files nobody says what is white.
        unknown = 0 < most <= 255 and made_by not in ("PNG", "PPM")
        if least < 0 or most > 65535 or unknown:
            raise SigmaError(f"{seen} in whole numbers of 32 bits; save it with 8 or 16 bits first.")
    return grey.astype(numpy.float32) / 65535


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean(0, keepdim=True)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise SigmaError(
            f"{name} is a {type(value).__name__}; give a Pillow image, such as PIL.Image.open(file), or a "
            "tensor."
        )
    if not value.numel():
        raise SigmaError(f"{name} is empty: {tuple(value.shape)}.")


def _check_range(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, if it holds numbers from 0 to 1."""
    if not tensor.is_floating_point():
        raise SigmaError(
            f"{name} holds {str(tensor.dtype).removeprefix('torch.')}; give floats from 0 to 1, for whole "
            f"numbers from 0 to 255 {name}.float() / 255."
        )
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise SigmaError(f"{name} holds NaN or infinity.")
    least, most = float(tensor.min()), float(tensor.max())
    if least >= 0 and most <= 1:
        return tensor
    advice = f"{name}.clamp(0, 1)"
    if least >= 0 and most > 2:
        advice = f"{name} / 255"
    elif least < -0.5 and most <= 1:
        advice = f"{name} / 2 + 0.5"
    raise SigmaError(f"{name} is from {least:g} to {most:g}; black is 0 and white is 1: give {advice}.")
