"""From prompts to latents: a run, or several that go through the transformer together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .errors import SettingError, SigmaError
from .files.pictures import latent_mask
from .prompt_embeds import Prompts, pad_embeds
from .refiner import Refiner
from .run_inputs import GivenPictures, Prompted
from .sampling.denoise import Step, Unfinished, denoise
from .sampling.guidance import guide
from .sampling.noise import get_noise
from .settings import Settings, Ways
from .transformer.control_pictures import ControlledTransformer
from .transformer.stage import Pass, TransformerStage


@dataclass(frozen=True)
class Run:
    """Settings with nothing left open, and their prompts."""

    settings: Settings
    prompted: Prompted


@dataclass(frozen=True)
class RunInputs:
    """What runs that go through the transformer together begin with."""

    runs: Sequence[Run]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "RunInputs":
        """Raises SigmaError for several runs that differ in more than their prompts and seeds, or of more
        than a picture each, whose noise nobody could tell apart."""
        if len({run.settings.alike for run in runs}) != 1:
            raise SigmaError("Runs that go through the transformer together differ in prompt and seed alone.")
        if len(runs) > 1 and runs[0].settings.count != 1:
            raise SettingError("count", runs[0].settings.count, "several runs at once make a picture each")
        return cls(runs)

    def noise(
        self, height: int, width: int, dtype: torch.dtype, device: torch.device, channels: int
    ) -> tuple[torch.Tensor, list[torch.Generator]]:
        """Unit noise (B, channels, height // 8, width // 8), of each run as if it were alone, and for each
        picture the generator that it goes on with, where it would be if there were no more pictures."""
        drawn, generators = [], []
        for run in self.runs:
            generator = torch.Generator().manual_seed(run.settings.seed)
            for _ in range(run.settings.count):
                drawn.append(get_noise(1, height, width, generator, dtype, device, channels))
                generators.append(torch.Generator())
                generators[-1].set_state(generator.get_state())
        return torch.cat(drawn), generators

    def prompts(self, device: torch.device, dtype: torch.dtype) -> Prompts:
        """Of one run a row for all its pictures, of several a row for each."""
        positive, mask = pad_embeds(
            [run.prompted.positive.prompt_embeds.to(device, dtype) for run in self.runs]
        )
        unwanted = [run.prompted.negative for run in self.runs]
        negative = [one.prompt_embeds.to(device, dtype) for one in unwanted if one is not None]
        if not negative:
            return Prompts(positive, mask)
        asked = {
            (run.settings.negative, run.settings.clean_caption, run.settings.max_sequence_length)
            for run in self.runs
        }
        if len(asked) == 1:
            return Prompts(positive, mask, negative[0])
        return Prompts(positive, mask, *pad_embeds(negative))


def _rewound(
    generators: list[torch.Generator], states: list[torch.Tensor]
) -> torch.Generator | list[torch.Generator]:
    """The generators, where they were, as `denoise` takes them."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return generators if len(generators) > 1 else generators[0]


def denoise_runs(
    runs: Sequence[Run],
    ways: Ways,
    given: GivenPictures,
    transformer: TransformerStage,
    refiner: Refiner | None = None,
    callback: Callable[[Step], bool | None] | None = None,
) -> tuple[torch.Tensor, Ways]:
    """The latents (B, 4, h, w) of runs, one after the other, and the ways as the transformer ran; see
    `SigmaPipeline.denoise`."""
    settings, inputs = runs[0].settings, RunInputs.of(runs)
    config, noise_schedule = transformer.checkpoint.config, transformer.checkpoint.noise_schedule
    device, dtype = transformer.device, transformer.dtype
    width, height = settings.made_size(config.sample_size * 8)
    painted = None if given.mask is None else latent_mask(given.mask, width, height)
    noise, generators = inputs.noise(height, width, dtype, device, config.in_channels)
    prompts = inputs.prompts(device, dtype)
    work = Pass(height, width, len(noise), settings.guided)

    def part(begun: torch.Tensor | Unfinished, on_step, stage: TransformerStage, ways: Ways):
        states = [one.get_state() for one in generators]  # for a smaller way, where memory runs out

        def use(network, in_turn: bool) -> torch.Tensor:
            if given.controls:
                network = ControlledTransformer(network, given.controls, dtype)
            return denoise(
                guide(network, prompts, settings, in_turn, noise_schedule),
                begun,
                settings,
                noise_schedule=noise_schedule,
                image_latents=given.image_latents,
                mask=painted,
                generator=_rewound(generators, states),
                callback=on_step,
            )

        return stage.run(use, work, ways)

    if refiner is None:
        return part(noise, callback, transformer, ways)
    switch = settings.refiner_step - settings.skipped_steps
    return refiner.run_after(transformer, part, noise, switch, ways, callback)
