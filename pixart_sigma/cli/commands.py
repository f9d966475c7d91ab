"""The terminal: `pixart-sigma generate|encode|plan|calibrate|compare-t5|inspect|quantize-t5|download`.

Exit status 0 when done, 2 for a user's mistake (one line on stderr), 130 when interrupted.
"""

import json
import sys
from pathlib import Path

from ..errors import SigmaError
from ..files.writing import say, write_beside
from .checks import (
    check_count,
    check_guidance,
    check_prompt,
    check_seed,
    check_settings,
    check_steps,
    check_writable,
    parse_precisions,
    parse_share,
    parse_timesteps,
    read_picture,
    read_prompts,
)
from .options import make_parser


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = make_parser().parse_args(argv)
        return COMMANDS[arguments.command](arguments) or 0
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        return 130
    except (SigmaError, OSError) as error:
        print(f"pixart-sigma: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _generate(arguments) -> int:
    out = Path(arguments.out)
    paths = (
        [out]
        if arguments.count == 1
        else [out.with_name(f"{out.stem}_{number}{out.suffix}") for number in range(1, arguments.count + 1)]
    )
    check_settings(arguments)
    check_writable(out)
    if arguments.memory_report not in (None, "-"):
        check_writable(Path(arguments.memory_report))
    check_prompt(arguments)

    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    from ..aspect_ratio import by_ratio, parse_size
    from ..memory.stages import readable
    from ..pipeline import SigmaPipeline
    from ..text.embeddings import PromptEmbeddings

    encoded = arguments.embeddings is not None
    prompt = PromptEmbeddings.load(arguments.embeddings) if encoded else arguments.prompt
    pipeline = SigmaPipeline.from_path(
        arguments.model,
        transformer=arguments.transformer,
        text_encoder=arguments.text_encoder,
        vae=arguments.vae,
        variant=arguments.variant,
        device=arguments.device,
        t5_precision=arguments.t5_precision,
        t5_device=arguments.t5_device,
        transformer_device=arguments.transformer_device,
        release=arguments.release,
        measure=arguments.memory_report is not None,
        needs_text_encoder=not encoded,
    )
    width = height = None
    if arguments.size:
        width, height = parse_size(arguments.size)
    elif arguments.aspect:
        bucket = by_ratio(arguments.aspect, pipeline.base_size)
        width, height = bucket.width, bucket.height
    image = read_picture(arguments.image) if arguments.image else None
    plan = None
    if arguments.budget:
        base = pipeline.base_size
        guidance = 4.5 if arguments.guidance is None else arguments.guidance
        plan = pipeline.plan(arguments.budget, width or base, height or base, arguments.count, guidance)
        print(plan.why, file=sys.stderr)

    with tqdm(total=None, leave=False, disable=None) as bar:

        def on_step(step):
            bar.reset(total=step.count)
            bar.update(step.index + 1)

        result = pipeline.generate(
            prompt,
            arguments.negative,
            width=width,
            height=height,
            steps=arguments.steps,
            guidance_scale=arguments.guidance,
            seed=arguments.seed,
            count=arguments.count,
            scheduler=arguments.scheduler,
            timesteps=parse_timesteps(arguments.timesteps),
            image=image,
            strength=arguments.strength if image is not None else 1.0,
            kv_compression_setting=arguments.kv_compression,
            clean_caption=arguments.clean_caption,
            use_resolution_binning=not arguments.no_binning,
            decode_how=arguments.decode,
            decode_budget=arguments.decode_budget,
            plan=plan,
            embedding_cache=_embedding_cache(arguments),
            callback=on_step,
            on_stage=bar.set_description,
        )
    _tell_truncated(result.truncated)
    metadata = PngInfo()
    metadata.add_text("pixart_sigma", json.dumps(result.settings))
    for path, picture in zip(paths, result.images, strict=True):
        write_beside(path, lambda file, picture=picture: picture.save(file, format="PNG", pnginfo=metadata))
        say(path)
    if arguments.memory_report == "-":
        say(pipeline.stages.table())
        if plan:
            say(f"budget: {readable(plan.budget)}")
    elif arguments.memory_report:
        figures = {
            "device": str(pipeline.device),
            "budget": plan.budget if plan else None,
            "stages": pipeline.stages.as_dict(),
        }
        report = json.dumps(figures, indent=2)
        write_beside(Path(arguments.memory_report), lambda file: file.write(report.encode()))
    return 0


def _encode(arguments) -> int:
    out = Path(arguments.out)
    check_writable(out)

    from ..pipeline import SigmaPipeline

    pipeline = SigmaPipeline.from_path(
        arguments.model,
        text_encoder=arguments.text_encoder,
        device=arguments.device,
        t5_precision=arguments.t5_precision,
        t5_device=arguments.t5_device,
    )
    embeddings = pipeline.encode_prompts(
        arguments.prompt,
        arguments.negative,
        clean_caption=arguments.clean_caption,
        embedding_cache=_embedding_cache(arguments),
    )
    _tell_truncated(embeddings.positive_truncated)
    _tell_truncated(embeddings.negative_truncated)
    embeddings.save(out)
    say(out)
    return 0


def _embedding_cache(arguments):
    from ..text.embeddings import EmbeddingCache, user_cache_folder

    if arguments.no_embedding_cache:
        return None
    try:
        return EmbeddingCache(user_cache_folder())
    except RuntimeError:  # this user has no home directory, as in some containers
        return None


def _tell_truncated(words: str):
    if words:
        print(f"The prompt is longer than 300 tokens; this was cut: {words}", file=sys.stderr)


def _plan(arguments) -> int:
    check_count(arguments.count)
    check_guidance(arguments.guidance)

    from ..aspect_ratio import check_size, parse_size
    from ..planner import plan

    width, height = parse_size(arguments.size)
    check_size(width, height)
    if arguments.model:
        from ..pipeline import SigmaPipeline

        pipeline = SigmaPipeline.from_path(arguments.model, t5_precision=arguments.t5_precision)
        made = pipeline.plan(arguments.budget, width, height, arguments.count, arguments.guidance)
    else:
        made = plan(
            arguments.budget,
            width,
            height,
            arguments.count,
            guided=arguments.guidance > 1,
            precision=arguments.t5_precision,
        )
    say(json.dumps(made.as_dict(), indent=2) if arguments.json else made.table())
    return 0


def _calibrate(arguments) -> int:
    check_guidance(arguments.guidance)
    check_steps(arguments.steps)
    budget = parse_share(arguments.budget)
    for name in (arguments.out, arguments.plot):
        if name:
            check_writable(Path(name))
    prompts = read_prompts(arguments.prompts) if arguments.prompts else None

    from tqdm import tqdm

    from ..aspect_ratio import parse_size
    from ..pipeline import SigmaPipeline
    from ..studies.calibration import DEMO_PROMPTS, PROMPTS
    from ..studies.calibration_picture import draw
    from ..transformer.kv_calibration import calibration_path

    pipeline = SigmaPipeline.from_path(
        arguments.model,
        transformer=arguments.transformer,
        text_encoder=arguments.text_encoder,
        vae=arguments.vae,
        variant=arguments.variant,
        device=arguments.device,
        t5_precision=arguments.t5_precision,
        t5_device=arguments.t5_device,
        transformer_device=arguments.transformer_device,
    )
    out = Path(arguments.out) if arguments.out else calibration_path(pipeline.checkpoint.path)
    check_writable(out)
    width, height = parse_size(arguments.size) if arguments.size else (pipeline.base_size, pipeline.base_size)

    with tqdm(total=None, leave=False, disable=None) as bar:

        def on_progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        calibration = pipeline.calibrate(
            prompts or (DEMO_PROMPTS if _is_demo(arguments) else PROMPTS),
            width=width,
            height=height,
            budget=budget,
            steps=arguments.steps,
            guidance_scale=arguments.guidance,
            seed=arguments.seed,
            on_progress=on_progress,
            on_stage=bar.set_description,
        )
    calibration.save(out)
    if arguments.plot:
        write_beside(Path(arguments.plot), lambda file: draw(calibration).save(file, format="PNG"))
    say(calibration.describe())
    say(out)
    return 0


def _is_demo(arguments) -> bool:
    return arguments.model == "demo" and arguments.text_encoder is None


def _compare(arguments) -> int:
    precisions = parse_precisions(arguments.precisions)
    check_guidance(arguments.guidance)
    check_steps(arguments.steps)
    check_seed(arguments.seed)
    out = Path(arguments.out)
    check_writable(out)

    from tqdm import tqdm

    from ..aspect_ratio import parse_size
    from ..pipeline import SigmaPipeline
    from ..studies.precision import DEMO_PROMPTS, PROMPTS, compare_t5
    from ..studies.precision_picture import draw

    pipeline = SigmaPipeline.from_path(
        arguments.model,
        transformer=arguments.transformer,
        text_encoder=arguments.text_encoder,
        vae=arguments.vae,
        variant=arguments.variant,
        device=arguments.device,
        t5_device=arguments.t5_device,
        transformer_device=arguments.transformer_device,
    )
    width, height = parse_size(arguments.size) if arguments.size else (None, None)

    with tqdm(total=None, leave=False, disable=None) as bar:

        def on_step(step):
            bar.reset(total=step.count)
            bar.update(step.index + 1)

        comparison = compare_t5(
            pipeline,
            tuple(arguments.prompts or (DEMO_PROMPTS if _is_demo(arguments) else PROMPTS)),
            precisions,
            negative=arguments.negative,
            pictures=not arguments.no_pictures,
            width=width,
            height=height,
            steps=arguments.steps,
            guidance_scale=arguments.guidance,
            seed=arguments.seed,
            clean_caption=arguments.clean_caption,
            embedding_cache=_embedding_cache(arguments),
            on_stage=bar.set_description,
            callback=on_step,
        )
    for prompt in comparison.prompts:
        _tell_truncated(prompt.truncated)
    write_beside(out, lambda file: draw(comparison).save(file, format="PNG"))
    say(json.dumps(comparison.as_dict(), indent=2) if arguments.json else comparison.table())
    if not arguments.json:
        say(out)
    return 0


def _inspect(arguments) -> int:
    from ..transformer.checkpoint import inspect

    say(inspect(arguments.path).describe())
    return 0


def _quantize(arguments) -> int:
    from ..text.encoder import quantize_t5

    quantize_t5(arguments.source, arguments.out, arguments.precision, tokenizer=arguments.tokenizer)
    say(arguments.out)
    return 0


def _download(arguments) -> int:
    from ..files.download import download

    download(arguments.variant, arguments.to, ask=not arguments.yes)
    return 0


COMMANDS = {
    "generate": _generate,
    "encode": _encode,
    "plan": _plan,
    "calibrate": _calibrate,
    "compare": _compare,
    "inspect": _inspect,
    "quantize": _quantize,
    "download": _download,
}
