"""A second transformer that does the last steps of a run, as two-stage finetunes of PixArt-Sigma have it:
with the same prompts and guidance, on the latents as the first one leaves them. No noise is added."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import BUILT_IN
from .errors import SettingError, SigmaError
from .files.fingerprint import fingerprint
from .files.weight_files import read_state_dict
from .memory.stages import Stages
from .sampling.denoise import Step, Unfinished
from .settings import Settings, Ways
from .transformer.checkpoint import Checkpoint, inspect
from .transformer.stage import TransformerStage

# (what to begin with, the callback, whose steps they are, the ways) -> latents, and the ways as it ran.
Part = Callable[
    [torch.Tensor | Unfinished, Callable[[Step], bool | None] | None, TransformerStage, Ways],
    tuple[torch.Tensor, Ways],
]
# Of a config: what the two transformers of a run have in common.
SHARED = ("in_channels", "caption_channels", "sample_size")


@dataclass(frozen=True)
class Refiner:
    """The second transformer of a run: its stage, which is loaded when the first one's is over."""

    stage: TransformerStage

    @classmethod
    def find(cls, path: str | Path, first: TransformerStage) -> "Refiner":
        """The transformer of a file or folder, or one of BUILT_IN, to run after `first` in the same place;
        without the adapters of that, which were trained for another one.

        Raises CheckpointError where it is no transformer, and SigmaError where it is none for the same
        latents, prompts and noise.
        """
        checkpoint = inspect(BUILT_IN.get(str(path), path), variant=first.checkpoint.variant)
        if not checkpoint.noise_schedule.source:  # as a transformer by itself takes its pipeline's
            checkpoint = replace(checkpoint, noise_schedule=first.checkpoint.noise_schedule)
        _check_alike(checkpoint, first.checkpoint)
        return cls(replace(first, checkpoint=checkpoint, name="refiner", adapters=(), _held_place=""))

    def fingerprints(self) -> dict[str, str]:
        """What its weights are known by, as of the other models of a pipeline."""
        file = self.stage.checkpoint.components["transformer"]
        return {"refiner": fingerprint(read_state_dict(file, part="transformer"))}

    def names(self) -> dict[str, str]:
        """What people call its file."""
        return {"refiner": self.stage.checkpoint.path.name}

    def run_after(
        self,
        first: TransformerStage,
        part: Part,
        noise: torch.Tensor,
        switch: int,
        ways: Ways,
        callback: Callable[[Step], bool | None] | None,
    ) -> tuple[torch.Tensor, Ways]:
        """The latents of a run of which `first` does `switch` steps, and the ways as it ran. Each transformer
        is released after its steps. A callback that ends the run during the first's ends all of it."""
        stopped = False

        def until_switch(step: Step) -> bool:
            nonlocal stopped
            stopped = callback is not None and callback(step) is False
            return not stopped and step.index + 1 < switch

        latents, ways = part(noise.float(), until_switch, first, ways)
        if stopped:
            return latents.to(noise.dtype), ways
        return part(Unfinished(latents, noise, switch), callback, self.stage, ways)

    def within(self, stages: Stages) -> "Refiner":
        """The same one among other stages."""
        return Refiner(replace(self.stage, stages=stages, _held_place=""))


def check_refiner(refiner: Refiner | None, settings: Settings, ways: Ways, first: TransformerStage) -> None:
    """Raises SigmaError where one of a second transformer and `refiner_start` is without the other, and where
    a way of the run is planned by the first one alone."""
    if refiner is None:
        if settings.refiner_start is not None:
            advice = "there is no second transformer to take over; give it, or leave this out"
            raise SettingError("refiner_start", settings.refiner_start, advice)
        return
    if settings.refiner_start is None:
        raise SigmaError("There is a second transformer, and refiner_start does not say when it takes over.")
    if settings.refiner_step <= settings.skipped_steps:
        advice = f"with strength {settings.strength:g} all steps would be the refiner's; raise one of the two"
        raise SettingError("refiner_start", settings.refiner_start, advice)
    own, other = first.checkpoint.config.num_layers, refiner.stage.checkpoint.config.num_layers
    if ways.budget is not None and other > own:
        advice = (
            f"it is planned for {own} layers, and the refiner has {other}; give --transformer-device stream"
        )
        raise SettingError("budget", ways.budget, advice)


def _check_alike(checkpoint: Checkpoint, first: Checkpoint) -> None:
    for name in SHARED:
        found, own = getattr(checkpoint.config, name), getattr(first.config, name)
        if found != own:
            raise SigmaError(
                f"The refiner {checkpoint.path} has {name} {found}, and the transformer {first.path} has "
                f"{own}; give two that were made for each other."
            )
    if checkpoint.noise_schedule.as_config() != first.noise_schedule.as_config():
        raise SigmaError(
            f"The refiner {checkpoint.path} has the noise schedule {checkpoint.noise_schedule.describe()}, "
            f"and the transformer {first.path} {first.noise_schedule.describe()}; give two of one."
        )
