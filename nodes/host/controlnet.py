"""The engine's ControlNet as the host's CONTROL_NET."""

from pathlib import Path

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management
import comfy.ops
import torch

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.transformer.controlnet import Control, ControlNet, check_fits
from ...pixart_sigma.transformer.controlnet_file import build_controlnet, read_controlnet
from .hooks import attention

# In the host's `control`: what acts inside our network. The host's own keys hold tensors to be added.
CONTROLS = "pixart_sigma"
HOSTS = ("input", "middle", "output")


class ControlledPicture(torch.nn.Module):
    """What the host calls, and moves to the device: the ControlNet, which works inside the transformer and
    so gives the picture's latents back."""

    dtype = torch.float32  # in which the host gives the latents

    def __init__(self, controlnet: ControlNet):
        super().__init__()
        self.controlnet = controlnet

    def forward(self, x, hint, **_):
        return hint


class SigmaControlNet(comfy.controlnet.ControlNet):
    """The host encodes the picture with the VAE, scales and repeats it as it does for its own."""

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        config = getattr(model.diffusion_model, "sigma_config", None)
        if config is None:
            raise SigmaError(
                "This ControlNet of PixArt-Sigma acts on a MODEL from Load Σ Transformer alone, and the "
                f"sampler has a {type(model).__name__} from another loader. Load the transformer with Load Σ "
                "Transformer."
            )
        check_fits(self.control_model.controlnet.sigma_config, config)

    def control_merge(self, control, control_prev, output_dtype):
        """control: the latents (1 or B, 4, h, w) of the picture."""
        before = control_prev or {}
        own = Control(self.control_model.controlnet, control, self.strength)
        return before | {CONTROLS: (*before.get(CONTROLS, ()), own)}

    def copy(self):
        twin = SigmaControlNet(load_device=self.load_device, manual_cast_dtype=self.manual_cast_dtype)
        twin.control_model, twin.control_model_wrapped = self.control_model, self.control_model_wrapped
        self.copy_to(twin)
        return twin


def load_control_net(path: Path) -> SigmaControlNet:
    """The host's CONTROL_NET from a file or folder; CheckpointError for anything but one of PixArt."""
    config, state_dict = read_controlnet(path)
    device = comfy.model_management.get_torch_device()
    stored = max((weight.dtype for weight in state_dict.values()), key=lambda dtype: dtype.itemsize)
    dtype = comfy.model_management.unet_dtype(
        model_params=sum(weight.numel() for weight in state_dict.values()), weight_dtype=stored
    )
    # Its weights are cast to what the MODEL computes in, whatever that is.
    controlnet = build_controlnet(config, comfy.ops.manual_cast, attention)
    for name in state_dict:
        state_dict[name] = state_dict[name].to(dtype)
    controlnet.load_state_dict(state_dict, assign=True)
    controlnet.eval().requires_grad_(False)
    return SigmaControlNet(
        ControlledPicture(controlnet),
        compression_ratio=1,  # of the VAE alone
        latent_format=comfy.latent_formats.SDXL(),
        load_device=device,
    )


def controls_of(control: dict | None) -> tuple[Control, ...]:
    """What acts inside our network of all that the host says controls it.

    Raises SigmaError for a ControlNet of another model, which would have no effect.
    """
    control = control or {}
    if any(tensor is not None for key in HOSTS for tensor in control.get(key) or ()):
        raise SigmaError(
            "A ControlNet for another kind of model is applied to this prompt, and has no effect on "
            "PixArt-Sigma. Load one of PixArt with Load Σ ControlNet, or take Apply ControlNet out of the "
            "graph."
        )
    return control.get(CONTROLS, ())
