"""Pictures that ControlNets follow in one run: which, how strongly, in which part of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import SettingError, SigmaError
from ..files.fingerprint import digest, fingerprint
from ..files.metadata import ControlModel
from ..files.pictures import as_picture
from ..schedule_part import SchedulePart
from ..setting_checks import is_finite
from .config import TransformerConfig
from .controlnet import Control, ControlHooks, check_fits
from .controlnet_file import inspect_controlnet, load_controlnet, read_controlnet
from .hooks import NO_HOOKS
from .network import SigmaTransformer


@dataclass(frozen=True, eq=False)
class ControlPicture:
    """A picture for a ControlNet.

    controlnet: its file or folder. image: of Pillow or (3, H, W) in [0, 1]; it is scaled and cropped to the
    size of what is made. strength: what the ControlNet adds is multiplied by this, from 0. part: of the noise
    schedule, in which it acts.
    Raises SigmaError for what is none of these.
    """

    controlnet: str | Path
    image: Any
    strength: float = 1.0
    part: SchedulePart = SchedulePart()

    def __post_init__(self):
        object.__setattr__(self, "image", as_picture(self.image))
        if not is_finite(self.strength) or self.strength < 0:
            advice = "give a finite number from 0, such as 1"
            raise SettingError("control_strength", self.strength, advice)

    def describe(self) -> ControlModel:
        """What a picture that was made with it says of it."""
        weights = read_controlnet(self.controlnet)[1]
        return ControlModel(
            Path(self.controlnet).name,
            fingerprint(weights),
            digest(self.image),
            float(self.strength),
            str(self.part),
        )


def check_controls(controls: Any, configs: Iterable[TransformerConfig]) -> tuple[ControlPicture, ...]:
    """The control pictures, once it is known from their files' headers that each fits transformers of these
    configs. Raises SigmaError for anything else."""
    controls = tuple(controls)
    for control in controls:
        if not isinstance(control, ControlPicture):
            raise SigmaError(
                f"controls has a {type(control).__name__}; give ControlPictures, such as "
                "ControlPicture('edges.safetensors', picture)."
            )
        for config in configs:
            check_fits(inspect_controlnet(control.controlnet), config)
    return controls


class ControlledTransformer:
    """A transformer for one run, with ControlNets that act in their parts of it."""

    def __init__(
        self,
        transformer: SigmaTransformer,
        controls: Iterable[tuple[ControlPicture, torch.Tensor]],
        dtype: torch.dtype,
    ):
        """controls: each with the latents of its picture, as in `Control`. Loads the ControlNets."""
        self.transformer, self.project_prompt = transformer, transformer.project_prompt
        self.controls = []
        for control, latents in controls:
            controlnet = load_controlnet(control.controlnet, dtype, transformer.device)
            self.controls.append((control.part, Control(controlnet, latents, control.strength)))

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, *prompt, **settings) -> torch.Tensor:
        # Reading the timestep waits for the device.
        now = 0.0 if all(part.whole for part, _ in self.controls) else float(timestep)
        acting = tuple(control for part, control in self.controls if part.holds(now))
        hooks = ControlHooks(acting) if acting else NO_HOOKS
        return self.transformer(latents, timestep, *prompt, hooks=hooks, **settings)
