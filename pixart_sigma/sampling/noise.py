"""The noise that a picture starts from."""

import torch

from ..devices import pick_device
from ..errors import SettingError, SigmaError
from ..setting_checks import check_count, check_seed, check_whole


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
    multiples of 16 that is what diffusers' `randn_tensor` draws from one CPU generator. A generator of the
    CPU may be given in place of a seed and is then advanced. Raises SigmaError for a count, a seed, a size
    or a dtype that cannot be.
    """
    check_count(count)
    place = pick_device(device)
    for name, side in (("height", height), ("width", width)):
        check_whole(name, side, 8, None, "give a whole number of pixels, 8 or more")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingError("dtype", repr(dtype), "give a dtype of floats, such as torch.float32")
    if isinstance(seed, torch.Generator):
        if seed.device.type != "cpu":
            raise SigmaError(
                f"The generator is on {seed.device}; noise is drawn on the CPU, so give a torch.Generator()."
            )
        generator = seed
    else:
        generator = torch.Generator().manual_seed(check_seed(seed))
    shape = (channels, height // 8, width // 8)
    pictures = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]
    return torch.stack(pictures).to(place)
