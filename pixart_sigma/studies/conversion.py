"""What a converted transformer costs: its layers' errors, and that of a whole run from the same noise."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..prompt_embeds import Prompts
from ..run_inputs import check_embeddings
from ..sampling.denoise import Step, denoise
from ..sampling.guidance import guide
from ..sampling.noise import get_noise
from ..settings import Settings, Ways
from ..table import align
from ..text.embeddings import PromptEmbeddings
from ..text.stage import TextStage
from ..transformer.checkpoint import inspect, load_transformer_state_dict
from ..transformer.converting import LayerError, convert
from ..transformer.keys import to_original_keys
from ..transformer.network import SigmaTransformer
from ..transformer.stage import Pass, TransformerStage

ROWS = 8  # of a layer's input that are kept of each step
SHOWN = 12  # layers of a table

OnStep = Callable[[Step], bool | None]


@dataclass(frozen=True, eq=False)
class Trial:
    """A run that is made twice: its settings, with a size, and its prompts, on the device and in the dtype
    of the run."""

    settings: Settings
    prompts: Prompts

    def run(
        self,
        stage: TransformerStage,
        ways: Ways,
        callback: OnStep | None = None,
        watched: Iterable[str] = (),
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The latents (1, 4, h, w) that the run ends with, and of the layers with the `watched` weights, by
        diffusers' names, some rows (n, in) of what went into them at each step."""
        settings, checkpoint = self.settings, stage.checkpoint
        width, height = settings.made_size(checkpoint.config.sample_size * 8)
        channels = checkpoint.config.in_channels
        noise = get_noise(1, height, width, settings.seed, stage.dtype, stage.device, channels)
        inputs = _Inputs(watched)

        def use(transformer: SigmaTransformer, in_turn: bool) -> torch.Tensor:
            inputs.watch(transformer)
            predict = guide(transformer, self.prompts, settings, in_turn, checkpoint.noise_schedule)
            return denoise(
                predict, noise, settings, noise_schedule=checkpoint.noise_schedule, callback=callback
            )

        latents = stage.run(use, Pass(height, width, guided=settings.guided), ways)[0]
        return latents.float().cpu(), inputs.found()


def encode_trial(settings: Settings, text: TextStage, ways: Ways, stage: TransformerStage) -> Trial:
    """A run with the settings' prompts, encoded for the stage's transformer. Raises SigmaError as
    `trial_of`."""
    (positive, negative), encoder, _ = text.encode((settings.prompt, settings.negative), settings, ways)
    made = PromptEmbeddings.made(settings, positive, negative, encoder.precision)
    return trial_of(settings, made, stage)


def trial_of(settings: Settings, embeddings: PromptEmbeddings, stage: TransformerStage) -> Trial:
    """A run with encoded prompts. Raises SigmaError where they are not of the width that is read."""
    check_embeddings(embeddings, settings.without_prompts(), stage.checkpoint)
    settings = replace(settings, prompt=embeddings.positive_text, negative=embeddings.negative_text)
    prompts = embeddings.prompts(stage.device, stage.dtype)
    if not settings.guided:
        prompts = Prompts(prompts.prompt_embeds)
    return Trial(settings, prompts)


@dataclass
class _Inputs:
    """Rows of what goes into layers, evenly over all tokens."""

    watched: Iterable[str]
    rows: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def watch(self, transformer: SigmaTransformer) -> None:
        self.rows = {}  # of a run that went on in another way
        for name in self.watched:
            layer = transformer.get_submodule(name.removesuffix(".weight"))
            layer.register_forward_pre_hook(lambda _, given, name=name: self._keep(name, given[0]))

    def _keep(self, name: str, given: torch.Tensor) -> None:
        tokens = given.detach().flatten(0, -2)
        chosen = torch.linspace(0, len(tokens) - 1, min(ROWS, len(tokens))).long()
        self.rows.setdefault(name, []).append(tokens[chosen.to(tokens.device)].cpu())

    def found(self) -> dict[str, torch.Tensor]:
        return {name: torch.cat(rows) for name, rows in self.rows.items()}


@dataclass(frozen=True)
class Conversion:
    """What became of a transformer. bytes_before: of its weights as they were stored, bytes_after: of the
    file. run_error: relative L2 of the latents that the run of `settings` ends with, None where there was
    none."""

    to: str
    out: Path
    layers: list[LayerError]
    bytes_before: int
    bytes_after: int
    settings: Settings | None = None
    run_error: float | None = None

    def table(self) -> str:
        """The layers that lost most, and the whole."""
        worst = sorted(
            self.layers,
            key=lambda layer: layer.weight if layer.output is None else layer.output,
            reverse=True,
        )
        measured = any(layer.output is not None for layer in worst)
        rows = [["layer", "form", "weight", "output"]]
        rows += [
            [layer.name.removesuffix(".weight"), layer.form, _share(layer.weight), _share(layer.output)]
            for layer in worst
        ]
        if len(worst) > SHOWN:
            middle = [_share(median(layer.weight for layer in worst))]
            outputs = [layer.output for layer in worst if layer.output is not None]
            middle.append(_share(median(outputs) if outputs else None))
            rows[SHOWN + 1 :] = [[f"median of all {len(worst)}", "", *middle]]
        text = align([row if measured else row[:3] for row in rows], left=(0, 1))
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        text += f"\n\n{self.to}: {before:,.1f} MB -> {after:,.1f} MB ({after / before:.0%})"
        if self.settings is not None and self.run_error is not None:
            text += (
                f"\na run of {self.settings.steps} steps at {self.settings.width}x{self.settings.height} "
                f"from seed {self.settings.seed}: latents {_share(self.run_error)} off"
            )
        return text

    def as_dict(self) -> dict[str, Any]:
        run = None
        if self.settings is not None:
            chosen = ("steps", "width", "height", "seed", "guidance_scale", "prompt", "negative")
            run = {name: getattr(self.settings, name) for name in chosen} | {"error": self.run_error}
        return {
            "to": self.to,
            "out": str(self.out),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "run": run,
            "layers": [asdict(layer) for layer in self.layers],
        }


def convert_and_measure(
    stage: TransformerStage,
    to: str,
    out: Path,
    trial: Trial | None = None,
    ways: Ways | None = None,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: OnStep | None = None,
    on_written: Callable[[], None] = lambda: None,
) -> Conversion:
    """Write the stage's transformer to `out`, one of TRANSFORMER_FORMS, and measure it; see `convert`.

    With a trial it is run before and afterwards, one transformer in memory at a time. on_written() is called
    when the file is there. The stage's adapters have no part in it.
    """
    ways, checkpoint = ways or Ways(), stage.checkpoint
    weights = load_transformer_state_dict(checkpoint)
    bytes_before = sum(weight.nbytes for weight in weights.values())
    first = (parts[0] for parts in to_original_keys(weights).values())
    layers = [name for name in first if weights[name].ndim == 2 and name.endswith(".weight")]
    latents: torch.Tensor | None = None
    inputs: dict[str, torch.Tensor] = {}
    if trial is not None:
        on_stage("the original's run")
        latents, inputs = trial.run(stage, ways, on_step, layers)
    on_stage(f"writing {to}")
    errors = convert(checkpoint, to, out, inputs, on_progress)
    on_written()
    made = Conversion(to, out, errors, bytes_before, out.stat().st_size)
    if trial is None or latents is None:
        return made
    on_stage("the converted one's run")
    written = replace(inspect(out, checkpoint.variant), noise_schedule=checkpoint.noise_schedule)
    again = trial.run(replace(stage, checkpoint=written, _held_place=""), ways, on_step)[0]
    error = float((again - latents).norm() / latents.norm())
    return replace(made, settings=trial.settings, run_error=error)


def _share(error: float | None) -> str:
    return "-" if error is None else f"{error:.2%}"
