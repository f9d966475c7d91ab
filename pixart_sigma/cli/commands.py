"""The terminal: `pixart-sigma COMMAND`, of COMMANDS.

Exit status 0 when done, 1 where pictures of a batch failed, 2 for a user's mistake (one line on stderr), 130
when interrupted.
"""

import io
import json
import os
import sys
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path

from ..errors import UNUSABLE, SettingError, SigmaError, printable, tidy
from ..files.picture_files import write_picture
from ..files.writing import say
from .batch import batch
from .checks import (
    check_apart,
    check_writable,
    parse_precisions,
    parse_share,
    read_prompts,
    read_settings,
    read_ways,
    take_prompt,
    tell_adapters,
    tell_guess,
    tell_size,
)
from .convert import convert
from .generate import embedding_cache, generate, model_arguments, tell_truncated
from .merge import merge
from .options import OPTIONS, make_parser
from .output import check_picture_file
from .progress import progress


def main(argv: list[str] | None = None) -> int:
    _say_what_cannot_be_encoded()
    try:
        arguments = make_parser().parse_args(argv)
        with _silence() if arguments.quiet else nullcontext():
            return COMMANDS[arguments.command](arguments) or 0
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted; {str(interrupt) or 'nothing was written.'}", file=sys.stderr)
        return 130
    except SettingError as error:
        option = OPTIONS.get(error.name, "--" + error.name.replace("_", "-"))
        return _mistake(error.called(option))
    except UNUSABLE as error:
        return _mistake(str(error))
    except (MemoryError, RuntimeError) as error:
        from ..memory.out_of_memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _mistake("Memory ran out. Close other programs, or make fewer or smaller pictures.")


def _say_what_cannot_be_encoded() -> None:
    """Let characters that a terminal's encoding lacks be spelled out rather than end the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _silence():
    """Drops what is said beside the results, by the libraries too; what is raised is told as always."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def _mistake(words: str) -> int:
    print(f"pixart-sigma: {tidy(' '.join(words.split()))}", file=sys.stderr)
    return 2


def _encode(arguments) -> int:
    out = Path(arguments.out)
    check_writable(out)
    take_prompt(arguments)
    if arguments.prompt is None:
        raise SigmaError("There is nothing to encode; give a PROMPT or --prompt-file.")
    settings, ways = read_settings(arguments), read_ways(arguments)

    from ..pipeline import SigmaPipeline

    pipeline = SigmaPipeline.from_path(**model_arguments(arguments), ways=ways)
    pipeline = pipeline.with_adapters(arguments.adapters or ())
    tell_adapters(pipeline.components)
    with progress() as bar:
        bar.stage("text encoder")
        embeddings = pipeline.encode_prompts(settings, embedding_cache=embedding_cache(arguments))
    tell_truncated(embeddings.positive_truncated)
    tell_truncated(embeddings.negative_truncated)
    embeddings.save(out)
    say(out)
    return 0


def _plan(arguments) -> int:
    settings, ways = read_settings(arguments), read_ways(arguments)
    if arguments.model:
        from ..pipeline import SigmaPipeline

        pipeline = SigmaPipeline.from_path(arguments.model, ways, variant=arguments.variant)
        tell_guess(pipeline.checkpoint)
        tell_size(settings, pipeline.base_size)
        made = pipeline.plan(settings, controlnets=arguments.control or ())
    else:
        from ..planner import Models, plan

        models = Models.published().with_controlnets(arguments.control or ())
        made = plan(
            replace(settings, binning=False), ways, models
        )  # without a checkpoint there is no trained size
    say(json.dumps(made.as_dict(), indent=2) if arguments.json else made.table())
    return 0


def _calibrate(arguments) -> int:
    settings, ways = read_settings(arguments), read_ways(arguments)
    budget = parse_share(arguments.error_budget)
    if arguments.out:
        check_writable(Path(arguments.out))
    elif arguments.adapters:
        raise SigmaError(
            "A calibration with --lora is not the checkpoint's own; name its file with --out, and use it "
            "with --speed FILE and the same --lora."
        )
    if arguments.plot:
        check_picture_file(arguments.plot)
    check_apart(out=arguments.out, plot=arguments.plot)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else None

    from ..pipeline import SigmaPipeline
    from ..studies.calibration import DEMO_PROMPTS, PROMPTS, calibrate_pipeline
    from ..studies.calibration_picture import draw
    from ..transformer.calibration import calibration_path

    pipeline = SigmaPipeline.from_path(**model_arguments(arguments), ways=ways)
    pipeline = pipeline.with_adapters(arguments.adapters or ())
    tell_guess(pipeline.checkpoint)
    tell_adapters(pipeline.components)
    out = Path(arguments.out) if arguments.out else calibration_path(pipeline.checkpoint.path)
    check_writable(out)

    with progress() as bar:
        calibration = calibrate_pipeline(
            pipeline,
            prompts or (DEMO_PROMPTS if _is_demo(arguments) else PROMPTS),
            settings,
            budget,
            reference=arguments.reference,
            cost=arguments.cost,
            on_progress=bar.count,
            on_stage=bar.stage,
        )
    calibration.save(out)
    if arguments.plot:
        write_picture(Path(arguments.plot), draw(calibration))
    say(calibration.describe())
    say(out)
    return 0


def _is_demo(arguments) -> bool:
    return arguments.model in (None, "demo") and arguments.text_encoder is None


def _compare(arguments) -> int:
    precisions = parse_precisions(arguments.precisions)
    settings, ways = read_settings(arguments), read_ways(arguments)
    check_picture_file(arguments.out)
    prompts = arguments.prompts
    if arguments.prompts_file:
        if prompts:
            raise SigmaError("PROMPT and --prompts both say what to compare; give one of them.")
        prompts = read_prompts(arguments.prompts_file)

    from ..pipeline import SigmaPipeline
    from ..studies.precision import DEMO_PROMPTS, PROMPTS, compare_t5
    from ..studies.precision_picture import draw

    pipeline = SigmaPipeline.from_path(**model_arguments(arguments), ways=ways)
    pipeline = pipeline.with_adapters(arguments.adapters or ())
    tell_guess(pipeline.checkpoint)
    tell_adapters(pipeline.components)
    with progress() as bar:
        comparison = compare_t5(
            pipeline,
            tuple(prompts or (DEMO_PROMPTS if _is_demo(arguments) else PROMPTS)),
            precisions,
            settings,
            pictures=not arguments.no_pictures,
            embedding_cache=embedding_cache(arguments),
            on_stage=bar.stage,
            callback=bar.step,
        )
    for prompt in comparison.prompts:
        tell_truncated(prompt.truncated)
    write_picture(Path(arguments.out), draw(comparison))
    say(json.dumps(comparison.as_dict(), indent=2) if arguments.json else comparison.table())
    if not arguments.json:
        say(arguments.out)
    return 0


def _inspect(arguments) -> int:
    from ..inspection import describe

    say(printable(describe(arguments.path, arguments.variant)))
    return 0


def _quantize(arguments) -> int:
    from ..text.quantize import quantize_t5

    with progress() as bar:
        bar.stage(f"T5 in {arguments.precision}")
        quantize_t5(arguments.source, arguments.out, arguments.precision, tokenizer=arguments.tokenizer)
    say(arguments.out)
    return 0


def _download(arguments) -> int:
    from ..files.download import download

    download(arguments.variant, arguments.to, ask=not arguments.yes)
    return 0


COMMANDS = {
    "generate": generate,
    "batch": batch,
    "encode": _encode,
    "plan": _plan,
    "calibrate": _calibrate,
    "compare": _compare,
    "convert": convert,
    "inspect": _inspect,
    "merge": merge,
    "quantize": _quantize,
    "download": _download,
}
