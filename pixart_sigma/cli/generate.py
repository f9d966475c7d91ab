"""`pixart-sigma generate`: pictures from a prompt, from encoded prompts, or like a picture that was made
before."""

import json
from dataclasses import replace
from pathlib import Path

from ..errors import SigmaError
from ..files.metadata import Metadata
from ..files.writing import say, write_beside
from ..settings import Settings, Ways
from .checks import (
    check_apart,
    check_prompt,
    check_writable,
    parse_control_image,
    read_settings,
    read_ways,
    take_prompt,
    take_refiner,
    tell,
    tell_adapters,
    tell_guess,
    tell_recipe,
    tell_size,
    with_aspect,
)
from .like import (
    check_adapters,
    check_given,
    check_models,
    own_transformer,
    taken_as,
    tell_differences,
    tell_other_controls,
)
from .output import STANDARD_OUTPUT, check_out, write_pictures
from .progress import progress

# Where --strength is not given: of --image, and with --mask, whose white is meant to become another picture.
IMAGE_STRENGTH, MASK_STRENGTH = 0.6, 1.0


def generate(arguments) -> int:
    report = arguments.memory_report
    check_out(arguments.out or "./")
    check_apart(out=arguments.out, memory_report=report)
    if report not in (None, "-"):
        check_writable(Path(report))
    take_prompt(arguments)
    check_prompt(arguments)
    like = Metadata.read(arguments.like) if arguments.like else None
    if like and like.index and arguments.count is None:
        tell(f"{arguments.like} is picture {like.index} of {like.settings.count}, which are all made again.")
    take_refiner(arguments, like)
    settings, ways = read_run(arguments, like)
    if arguments.out == STANDARD_OUTPUT and (settings.count > 1 or report == "-"):
        raise SigmaError("--out - is for one picture, and nothing beside it; name files.")
    if arguments.negative and not settings.uses_negative:
        tell("Without guidance the negative prompt is not used; --nag 5 lets it act there.")

    from ..text.embeddings import PromptEmbeddings

    embeddings = PromptEmbeddings.load(arguments.embeddings) if arguments.embeddings else None
    start, controls = _read_start(arguments), _read_controls(arguments)
    pipeline = _open(arguments, like, ways, start)
    tell_guess(pipeline.checkpoint)
    tell_adapters(pipeline.components, encodes=embeddings is None)
    tell_recipe(pipeline.checkpoint, settings)
    settings = with_aspect(settings, arguments.aspect, pipeline.base_size)
    tell_size(settings, pipeline.base_size)
    plan = _plan(arguments, pipeline, settings) if ways.budget else None
    if plan:
        tell(plan.why)
    with progress() as bar:
        result = pipeline.generate(
            settings,
            plan.ways if plan else None,
            embeddings=embeddings,
            image=start.image,
            mask=start.mask,
            controls=controls,
            embedding_cache=embedding_cache(arguments),
            callback=bar.step,
            on_stage=bar.stage,
            on_decode=bar.count,
        )
    tell_truncated(result.truncated)
    if like:
        tell_other_controls(arguments, like, result.metadata)
    write_pictures(result, arguments.out)
    if report:
        _report(pipeline, plan, report)
    return 0


def _plan(arguments, pipeline, settings: Settings):
    return pipeline.plan(
        settings, controlnets=arguments.control or (), from_picture=arguments.image is not None
    )


def read_run(arguments, like: Metadata | None) -> tuple[Settings, Ways]:
    """What the options ask for, beside a picture that it shall be like."""
    settings, ways = Settings(), Ways()
    if arguments.strength is not None and not arguments.image and not like:
        raise SigmaError("--strength says how much of a picture stays; give that picture with --image.")
    if arguments.mask and not arguments.image:
        raise SigmaError("--mask says where a picture is painted anew; give that picture with --image.")
    if like:
        check_given(arguments, like)
        # How long models are kept, and what is measured, is not the picture's.
        settings, ways = like.settings, replace(like.ways, release=Ways.release)
    if arguments.embeddings:
        settings = settings.without_prompts()
    if arguments.image and arguments.strength is None and not (like and like.image_sha256):
        settings = replace(settings, strength=MASK_STRENGTH if arguments.mask else IMAGE_STRENGTH)
    ways = replace(ways, measure=arguments.memory_report is not None)
    return read_settings(arguments, settings), read_ways(arguments, ways)


def model_arguments(arguments) -> dict:
    """Which models the options name, for SigmaPipeline.from_path."""
    return {
        "path": "demo" if arguments.model is None else arguments.model,
        "transformer": getattr(arguments, "transformer", None),
        "text_encoder": arguments.text_encoder,
        "tokenizer": arguments.tokenizer,
        "vae": getattr(arguments, "vae", None),
        "variant": getattr(arguments, "variant", None),
    }


def _read_start(arguments):
    """The picture and the mask that the options name."""
    from ..files.pictures import Start, read_mask, read_picture

    return Start.of(
        read_picture(arguments.image) if arguments.image else None,
        read_mask(arguments.mask) if arguments.mask else None,
    )


def _read_controls(arguments) -> list:
    """The pictures for ControlNets that the options name."""
    files, pictures = arguments.control or [], arguments.control_image or []
    if len(files) != len(pictures):
        raise SigmaError(
            f"There are {len(files)} --control and {len(pictures)} --control-image; give a picture for each "
            "ControlNet."
        )
    if not files:
        return []

    from ..files.pictures import read_picture
    from ..transformer.control_pictures import ControlPicture

    asked = [(file, *parse_control_image(picture)) for file, picture in zip(files, pictures, strict=True)]
    return [
        ControlPicture(file, read_picture(picture), strength, part) for file, picture, strength, part in asked
    ]


def _open(arguments, like: Metadata | None, ways: Ways, start):
    """The pipeline that the options name; beside `like`, of the same models or of those that were asked
    for."""
    from ..pipeline import SigmaPipeline

    def find(**named) -> SigmaPipeline:
        found = SigmaPipeline.from_path(**named).with_adapters(arguments.adapters or ())
        return found.with_refiner(arguments.refiner) if arguments.refiner else found

    named = model_arguments(arguments) | {"ways": ways, "needs_text_encoder": arguments.embeddings is None}
    if like is None:
        return find(**named)
    named["transformer"] = named["transformer"] or own_transformer(arguments, like)
    pipeline = find(**named)
    fingerprints = pipeline.fingerprints()
    check_adapters(arguments, like, pipeline.components.used_adapters)
    check_models(arguments, like, fingerprints)
    tell_differences(arguments, like, start)
    taken = taken_as(arguments, like, fingerprints, pipeline.checkpoint.noise_schedule)
    return find(**named | taken) if taken else pipeline


def embedding_cache(arguments):
    """The user's cache of embeddings; None where it is not wanted, or where there is no place for it."""
    from ..text.cache import EmbeddingCache, user_cache_folder

    if arguments.no_embedding_cache:
        return None
    try:
        return EmbeddingCache(user_cache_folder())
    except RuntimeError:  # this user has no home directory, as in some containers
        return None


def tell_truncated(words: str) -> None:
    """Which words of a prompt were cut, if any."""
    if words:
        tell(f"The prompt is longer than the tokens that are read; this was cut: {words}")


def _report(pipeline, plan, report: str) -> None:
    from ..memory.measure import readable

    if report == "-":
        say(pipeline.stages.table())
        if plan:
            say(f"budget: {readable(plan.budget)}")
        return
    figures = {
        "device": str(pipeline.device),
        "budget": plan.budget if plan else None,
        "stages": pipeline.stages.as_dict(),
    }
    content = json.dumps(figures, indent=2).encode()
    write_beside(Path(report), lambda file: file.write(content))
