"""The noise that a picture starts from."""

import torch

from ..errors import SigmaError


def get_noise(
    count: int,
    height: int,
    width: int,
    seed: int | torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    channels: int = 4,
) -> torch.Tensor:
    """Unit noise (count, channels, height // 8, width // 8) for pictures of height x width pixels.

    Drawn on the CPU, picture by picture, so that it depends on neither device nor count. For sizes in
    multiples of 16 that is what diffusers' `randn_tensor` draws from one CPU generator. A generator may
    be given in place of a seed and is then advanced. Raises SigmaError for a count or a size that leaves
    nothing, or an impossible seed.
    """
    if count < 1 or height < 8 or width < 8:
        raise SigmaError(
            f"Noise for {count} pictures of {width}x{height} is empty; at least 1 of 8x8 is needed."
        )
    if isinstance(seed, torch.Generator):
        generator = seed
    else:
        try:
            generator = torch.Generator("cpu").manual_seed(seed)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise SigmaError(f"Seed {seed!r} is not a whole number from -2**63 to 2**64 - 1.") from error
    shape = (channels, height // 8, width // 8)
    pictures = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]
    return torch.stack(pictures).to(device)
