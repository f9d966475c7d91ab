"""`pixart-sigma convert`: a transformer in another precision, and what that costs."""

import json
from dataclasses import replace
from pathlib import Path

from .. import BUILT_IN, DEMO
from ..choices import TRANSFORMER_FORMS
from ..errors import SigmaError
from ..files.writing import say
from ..settings import Settings
from .checks import check_new, read_settings, read_ways, tell, tell_guess
from .progress import progress

STEPS, PIXELS = 8, 512  # of the run that measures, which has to be quick on a CPU too


def convert(arguments) -> int:
    out = Path(arguments.out)
    check_new(out, TRANSFORMER_FORMS[arguments.to], arguments.to)
    _check_run(arguments)
    settings, ways = read_settings(arguments, Settings(steps=STEPS, binning=False)), read_ways(arguments)

    from ..devices import pick_device, pick_dtype
    from ..memory.stages import Stages
    from ..studies.conversion import convert_and_measure
    from ..transformer.checkpoint import inspect
    from ..transformer.config import is_published_shape
    from ..transformer.stage import TransformerStage

    source = arguments.transformer or arguments.model or "demo"
    checkpoint = inspect(BUILT_IN.get(source, source), arguments.variant)
    tell_guess(checkpoint)
    if checkpoint.quantised:
        tell(
            f"{checkpoint.path.name} is quantised ({checkpoint.storage}): it is dequantised first, and "
            "errors are counted from that."
        )
    if TRANSFORMER_FORMS[arguments.to] == ".safetensors" and not is_published_shape(checkpoint.config):
        tell(
            "ComfyUI's own loader knows the published widths alone, without KV compression and qk-norm; this "
            "file is for Load Σ Transformer."
        )
    device = pick_device(ways.device)
    stage = TransformerStage(checkpoint, device, pick_dtype(device), Stages(device))
    there: list[Path] = []
    with progress() as bar:
        trial = None if arguments.no_run else _make_trial(arguments, settings, ways, stage, bar)
        try:
            made = convert_and_measure(
                stage,
                arguments.to,
                out,
                trial,
                ways,
                on_stage=bar.stage,
                on_progress=bar.count,
                on_step=bar.step,
                on_written=lambda: there.append(out),
            )
        except KeyboardInterrupt:
            if not there:
                raise
            tell(f"\nInterrupted; {out} is written, and what a run loses by it was not measured.")
            return 130
    say(json.dumps(made.as_dict(), indent=2) if arguments.json else made.table())
    if not arguments.json:
        say(out)
    return 0


def _check_run(arguments) -> None:
    """That what is said of the run goes together."""
    if arguments.no_run and arguments.embeddings:
        raise SigmaError("--embeddings is for the run, which --no-run leaves out; give one of them.")
    if arguments.embeddings and arguments.prompt is not None:
        raise SigmaError("--embeddings brings encoded prompts; leave --prompt out.")


def _make_trial(arguments, settings: Settings, ways, stage, bar):
    """The run that measures; None, which is said, where there is nothing that encodes its prompt."""
    from ..studies.calibration import DEMO_PROMPTS, PROMPTS
    from ..studies.conversion import encode_trial, trial_of
    from ..text.embeddings import PromptEmbeddings
    from ..text.stage import TextStage

    side = min(PIXELS, stage.checkpoint.config.sample_size * 8)
    settings = replace(settings, width=settings.width or side, height=settings.height or side)
    if arguments.embeddings:
        return trial_of(settings, PromptEmbeddings.load(arguments.embeddings), stage)
    encoder, tokenizer, is_demo = _find_text_encoder(arguments)
    if encoder is None:
        tell(
            "There is no text encoder for a run, so only the weights are compared. Name one with "
            "--text-encoder, or give a file of encode with --embeddings."
        )
        return None
    if arguments.prompt is None:
        settings = replace(settings, prompt=(DEMO_PROMPTS if is_demo else PROMPTS)[0])
    bar.stage("text encoder")
    return encode_trial(settings, TextStage(encoder, tokenizer, stage.device, stage.stages), ways, stage)


def _find_text_encoder(arguments) -> tuple[Path | None, Path | None, bool]:
    """T5 and its tokenizer, as they are named or in the pipeline folder; and whether it is the demo's."""
    from ..files.locating import resolve
    from ..transformer.checkpoint import find_components

    tokenizer = Path(arguments.tokenizer) if arguments.tokenizer else None
    if arguments.text_encoder:
        return resolve(arguments.text_encoder), tokenizer, False
    demo = arguments.model == "demo" or (
        arguments.model is None and arguments.transformer in (None, *BUILT_IN)
    )
    folder = DEMO if demo else arguments.model
    found = find_components(folder) if folder else {}
    return found.get("text_encoder"), tokenizer or found.get("tokenizer"), demo
