"""`pixart-sigma generate`: pictures from a prompt, from encoded prompts, or like a picture that was made
before."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..files.metadata import KEY, Metadata
from ..files.writing import say, write_beside
from ..settings import Settings, Ways
from .checks import (
    check_prompt,
    check_writable,
    read_picture,
    read_settings,
    read_ways,
    tell,
    tell_guess,
    with_aspect,
)
from .like import check_given, check_models, own_transformer, tell_differences, variant_of

IMAGE_STRENGTH = 0.6  # of --image where --strength is not given


def generate(arguments) -> int:
    out = Path(arguments.out)
    report = arguments.memory_report
    check_writable(out)
    if report not in (None, "-"):
        check_writable(Path(report))
    check_prompt(arguments)
    like = Metadata.read(arguments.like) if arguments.like else None
    settings, ways = read_run(arguments, like)

    from ..text.embeddings import PromptEmbeddings

    embeddings = PromptEmbeddings.load(arguments.embeddings) if arguments.embeddings else None
    image = read_picture(arguments.image) if arguments.image else None
    pipeline = _open(arguments, like, ways, image)
    tell_guess(pipeline.checkpoint)
    settings = with_aspect(settings, arguments.aspect, pipeline.base_size)
    plan = pipeline.plan(settings) if ways.budget else None
    if plan:
        tell(plan.why)
    with progress() as (on_step, on_stage):
        result = pipeline.generate(
            settings,
            plan.ways if plan else None,
            embeddings=embeddings,
            image=image,
            embedding_cache=embedding_cache(arguments),
            callback=on_step,
            on_stage=on_stage,
        )
    tell_truncated(result.truncated)
    _save(result, out)
    if report:
        _report(pipeline, plan, report)
    return 0


def read_run(arguments, like: Metadata | None) -> tuple[Settings, Ways]:
    """What the options ask for, beside a picture that it shall be like."""
    settings, ways = Settings(), Ways()
    if like:
        check_given(arguments, like)
        # How long models are kept, and what is measured, is not the picture's.
        settings, ways = like.settings, replace(like.ways, release=Ways.release)
    if arguments.embeddings:
        settings = replace(settings, prompt="", negative="", clean_caption=False)
    if arguments.image and arguments.strength is None and not (like and like.image_sha256):
        settings = replace(settings, strength=IMAGE_STRENGTH)
    ways = replace(ways, measure=arguments.memory_report is not None)
    return read_settings(arguments, settings), read_ways(arguments, ways)


def model_arguments(arguments) -> dict:
    """Which models the options name, for SigmaPipeline.from_path."""
    return {
        "path": "demo" if arguments.model is None else arguments.model,
        "transformer": getattr(arguments, "transformer", None),
        "text_encoder": arguments.text_encoder,
        "vae": getattr(arguments, "vae", None),
        "variant": getattr(arguments, "variant", None),
    }


def _open(arguments, like: Metadata | None, ways: Ways, image):
    """The pipeline that the options name; beside `like`, of the same models or of those that were asked
    for."""
    from ..pipeline import SigmaPipeline, digest

    named = model_arguments(arguments) | {"ways": ways, "needs_text_encoder": arguments.embeddings is None}
    if like is None:
        return SigmaPipeline.from_path(**named)
    named["transformer"] = named["transformer"] or own_transformer(arguments, like)
    pipeline = SigmaPipeline.from_path(**named)
    fingerprints = pipeline.fingerprints()
    check_models(arguments, like, fingerprints)
    tell_differences(arguments, like, "" if image is None else digest(image))
    variant = variant_of(arguments, like, fingerprints)
    return SigmaPipeline.from_path(**named | {"variant": variant}) if variant else pipeline


@contextmanager
def progress():
    """Within this block, (callback for each step, callback for each stage) that draw a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(total=None, leave=False, disable=None) as bar:

        def on_step(step):
            bar.reset(total=step.count)
            bar.update(step.index + 1)

        yield on_step, bar.set_description


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
        tell(f"The prompt is longer than 300 tokens; this was cut: {words}")


def _save(result, out: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    metadata.add_text(KEY, result.metadata.as_json())
    numbers = range(1, len(result.images) + 1)
    paths = [out] if len(numbers) == 1 else [out.with_name(f"{out.stem}_{n}{out.suffix}") for n in numbers]
    for path, picture in zip(paths, result.images, strict=True):
        write_beside(path, lambda file, picture=picture: picture.save(file, format="PNG", pnginfo=metadata))
        say(path)


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
