"""The VAE's stage of a run: latents in, pictures out, in a smaller way where it must; and the ways it has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL

from ..choices import DECODES
from ..errors import SettingError, SigmaError
from ..memory.measure import free_bytes
from ..memory.stages import Stages
from ..memory.ways import Needs, Way, first_that_fits
from ..setting_checks import is_finite
from ..settings import Ways
from . import coding
from .layers import Decoder, read_decoder
from .loading import load_vae
from .memory import decode_memory, least_budget, whole_decode_bytes
from .strips import decode_in_strips

Progress = Callable[[int, int], None]


def list_ways(
    decoder: Decoder,
    shape: tuple[int, int, int],
    room: float,
    weights: int = 0,
    in_ram: bool = False,
) -> Iterator[Way]:
    """The ways to decode latents of a shape (height, width, bytes per number) in `room` bytes beside the
    VAE's weights, which are `weights` bytes: whole, then in strips that are smaller and smaller.

    in_ram: the device is the CPU, where what waits counts too.
    """
    whole = Needs(weights + whole_decode_bytes(decoder, *shape), weights)
    yield Way("whole", {"decode": "whole", "decode_budget": None}, lambda: whole)
    least = least_budget(decoder, *shape)
    for budget in dict.fromkeys(max(int(room) // share, least) for share in (1, 2, 4, 8)):
        needs = partial(_strips_need, decoder, shape, budget, weights, in_ram)
        yield Way("in strips", {"decode": "strips", "decode_budget": budget}, needs)


def _strips_need(
    decoder: Decoder, shape: tuple[int, int, int], budget: int, weights: int, in_ram: bool
) -> Needs:
    needed = decode_memory(decoder, *shape, budget, in_ram)
    return Needs(weights + needed.device, weights, needed.ram)


def ways_within(
    decoder: Decoder, shape: tuple[int, int, int], budget: float, decode: str = "auto"
) -> list[Way]:
    """Of `list_ways` those with which a decode keeps a budget in bytes, the VAE's weights apart.

    Raises SigmaError where not even a row at work fits in it.
    """
    whole, *strips = list_ways(decoder, shape, budget)
    if decode == "whole":
        return [whole]
    if decode == "auto" and whole.needs.peak <= budget:
        return [whole, *strips]
    decode_memory(decoder, *shape, budget)  # which says what is too little
    return strips


def decode_picture(
    decoder: Decoder,
    latent: torch.Tensor,
    ways: list[Way],
    decode_whole: Callable[[torch.Tensor], torch.Tensor],
    on_progress: Progress = lambda done, total: None,
) -> tuple[torch.Tensor, Way]:
    """The picture of a latent as `decode_in_strips` takes and makes it, and the first of the ways that did
    not run out of memory.

    Raises SigmaError that says what would fit: in too little memory on the device, and where the maps that
    wait need more RAM than is free.
    """
    shape = (latent.shape[2], latent.shape[3], latent.dtype.itemsize)

    def decode_in(way: Way) -> torch.Tensor:
        if way.chosen["decode"] == "whole":
            return decode_whole(latent)
        budget = way.chosen["decode_budget"]
        needed, free = decode_memory(decoder, *shape, budget).ram, psutil.virtual_memory().available
        if latent.device.type != "cpu" and needed > free:
            raise SigmaError(
                f"The decode keeps {needed / 1e9:.1f} GB in RAM, and {free / 1e9:.1f} GB is free. Close "
                "other programs, give the decode a larger budget, or decode in tiles."
            )
        return decode_in_strips(decoder, latent, budget, on_progress)

    advice = (
        f"It needs at least {least_budget(decoder, *shape) / 1e6:.0f} MB beside the VAE's weights: close "
        "other programs, make a smaller picture, or decode in tiles."
    )
    return first_that_fits("VAE decode", ways, decode_in, advice)


@torch.no_grad()
def decode(
    vae: AutoencoderKL,
    latents: torch.Tensor,
    how: str = "auto",
    budget: float | None = None,
    on_progress: Progress = lambda done, total: None,
) -> torch.Tensor:
    """Pictures (B, 3, 8h, 8w), float32, in RAM, from sampled latents (B, 4, h, w).

    Black is 0 and white is 1; values a little outside are left for the caller to clamp, after resizing.
    One picture at a time, so that a batch costs no more memory than one.
    how: "whole"; "strips", which is equal to it in less memory, see `strips`; "tiles", diffusers'
    overlapping ones, which differ in tone; "auto", whole where that fits, else in strips.
    budget: bytes on the device for the decode, the weights apart; by default what is free.
    on_progress(done, total) is called between strips; what it raises stops the decode.
    Raises SigmaError for latents of another shape, for a budget that is too small, and when the result is not
    finite.
    """
    return decode_and_tell(vae, latents, how, budget, on_progress)[0]


def decode_and_tell(
    vae: AutoencoderKL,
    latents: torch.Tensor,
    how: str = "auto",
    budget: float | None = None,
    on_progress: Progress = lambda done, total: None,
) -> tuple[torch.Tensor, dict]:
    """The pictures as `decode` makes them, and how they were made in the end, as fields of `Ways`."""
    if how not in DECODES:
        raise SettingError("decode", repr(how), f"choose one of {', '.join(DECODES)}")
    if budget is not None and not (is_finite(budget) and budget > 0):
        raise SettingError("budget", repr(budget), "give more than 0 bytes, such as 2 GB (2e9)")
    coding.check_latents(vae, latents)
    dtype = vae.dtype
    with torch.no_grad(), coding.ready_to_decode(vae, how == "tiles"):
        decoder = None if how == "tiles" else read_decoder(vae)
        if how == "strips" and decoder is None:
            raise SigmaError(
                "This VAE is not built like the SDXL VAE and cannot be decoded in strips. Choose auto."
            )

        def decode_whole(latent: torch.Tensor) -> torch.Tensor:
            return vae.decode(latent).sample.float().cpu()

        ways: list[Way] | None = None
        decoded, chosen = [], {"decode": how, "decode_budget": None}
        for number, latent in enumerate(latents):
            scaled = latent[None].to(vae.device, vae.dtype) / vae.config.scaling_factor
            if decoder is None:
                decoded.append(decode_whole(scaled))
                continue
            if ways is None:
                shape = (scaled.shape[2], scaled.shape[3], scaled.dtype.itemsize)
                room = budget or max(free_bytes(vae.device), least_budget(decoder, *shape))
                ways = ways_within(decoder, shape, room, how)

            def on_strip(done, total, number=number):
                on_progress(number * total + done, len(latents) * total)

            picture, way = decode_picture(decoder, scaled, ways, decode_whole, on_strip)
            decoded.append(picture)
            ways, chosen = ways[ways.index(way) :], way.chosen  # what did not fit once is not tried again
    return coding.scale_pictures(torch.cat(decoded), dtype), chosen


@dataclass
class VAEStage:
    """The VAE by its file, where and in what it computes, and the run's stages."""

    path: Path
    device: torch.device
    dtype: torch.dtype
    stages: Stages = field(repr=False)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, 4, H/8, W/8) of pictures (B, 3, H, W) in [0, 1], as the transformer expects them."""
        return self.stages.run("VAE encode", self.load, lambda vae: coding.encode(vae, pictures))

    def decode(
        self, latents: torch.Tensor, ways: Ways, on_progress: Progress = lambda done, total: None
    ) -> tuple[torch.Tensor, Ways]:
        """The pictures of sampled latents, see `decode`, and the ways with what the decode came to."""
        pictures, chosen = self.stages.run(
            "VAE decode",
            self.load,
            lambda vae: decode_and_tell(vae, latents, ways.decode, ways.decode_budget, on_progress),
        )
        return pictures, replace(ways, budget=None, **chosen)

    def load(self) -> AutoencoderKL:
        """Load the VAE where it computes."""
        return load_vae(self.path, dtype=self.dtype, device=self.device)
