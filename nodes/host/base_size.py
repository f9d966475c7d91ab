"""Which size of picture a MODEL was trained for."""

from .kv_compression import can_compress, is_ours


def base_size(model) -> int | None:
    """The side in pixels of the square that a PixArt-Sigma was trained for; None where nothing says it.

    The host's own loader knows it only of files that hold the positions' table.
    """
    if is_ours(model):
        return model.model.diffusion_model.sigma_config.sample_size * 8
    side = model.model.model_config.unet_config.get("input_size") if can_compress(model) else None
    return side and side * 8
