"""`pixart-sigma generate`: pictures from a prompt, from encoded prompts, or like a picture that was made
before."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import SigmaError
from ..files.metadata import KEY, Metadata
from ..files.writing import say, write_beside
from ..settings import Settings, Ways
from .checks import (
    check_prompt,
    check_writable,
    read_picture,
    read_settings,
    read_ways,
    with_aspect,
)

# The options that name a component, by the component.
COMPONENT_OPTIONS = {"transformer": "--transformer", "text_encoder": "--text-encoder", "vae": "--vae"}
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

    from ..pipeline import SigmaPipeline
    from ..text.embeddings import PromptEmbeddings

    embeddings = PromptEmbeddings.load(arguments.embeddings) if arguments.embeddings else None
    pipeline = SigmaPipeline.from_path(
        **model_arguments(arguments, like), ways=ways, needs_text_encoder=embeddings is None
    )
    settings = with_aspect(settings, arguments.aspect, pipeline.base_size)
    image = read_picture(arguments.image) if arguments.image else None
    if like:
        check_like(arguments, like, pipeline.fingerprints(), image)
    plan = pipeline.plan(settings) if ways.budget else None
    if plan:
        print(plan.why, file=sys.stderr)
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
    settings, ways = (like.settings, like.ways) if like else (Settings(), Ways())
    # How long models are kept, and what is measured, is not the picture's.
    ways = replace(ways, release=Ways.release, measure=arguments.memory_report is not None)
    if arguments.embeddings:
        settings = replace(settings, prompt="", negative="", clean_caption=False)
    if arguments.image and arguments.strength is None and not (like and like.image_sha256):
        settings = replace(settings, strength=IMAGE_STRENGTH)
    if like and like.image_sha256 and not arguments.image:
        raise SigmaError(
            f"{arguments.like} was made from a picture, which is not kept in it; give that with --image."
        )
    if like and like.embeddings_sha256 and not (arguments.embeddings or arguments.prompt):
        raise SigmaError(
            f"{arguments.like} was made from encoded prompts, which are not kept in it; give their file with "
            "--embeddings."
        )
    return read_settings(arguments, settings), read_ways(arguments, ways)


def model_arguments(arguments, like: Metadata | None = None) -> dict:
    """Which models the options name, for SigmaPipeline.from_path."""
    from .. import DEMO_KV

    transformer = getattr(arguments, "transformer", None)
    was = like.models.get("transformer") if like else None
    if was and was.name == DEMO_KV.name and transformer is None and arguments.model is None:
        transformer = "demo-kv"
    return {
        "path": "demo" if arguments.model is None else arguments.model,
        "transformer": transformer,
        "text_encoder": arguments.text_encoder,
        "vae": getattr(arguments, "vae", None),
        "variant": getattr(arguments, "variant", None),
    }


def check_like(arguments, like: Metadata, fingerprints: dict[str, str], image) -> None:
    """SigmaError where another model would be used than the picture was made with, and nobody asked for that;
    what makes it another picture all the same is told."""
    for component, option in COMPONENT_OPTIONS.items():
        was, now = like.models.get(component), fingerprints.get(component, "")
        if (
            was is None
            or was.fingerprint in ("", now)
            or arguments.embeddings
            and component == "text_encoder"
        ):
            continue
        given = getattr(arguments, component) is not None or arguments.model is not None
        if not given:
            raise SigmaError(
                f"{arguments.like} was made with another {component.replace('_', ' ')}, {was.name!r}; give "
                f"it with --model or {option}."
            )
        tell(f"The {component.replace('_', ' ')} is another one than {arguments.like} was made with.")
    if image is not None and like.image_sha256:
        from ..pipeline import digest

        if digest(image) != like.image_sha256:
            tell(f"{arguments.image} is another picture than {arguments.like} was made from.")
    from ..files.metadata import current_versions

    versions = current_versions()
    changed = [
        f"{name} {versions.get(name, 'none')}"
        for name, was in like.versions.items()
        if was != versions.get(name)
    ]
    if changed:
        tell(
            f"{arguments.like} was made with other versions than {', '.join(changed)}; it may differ by "
            "rounding."
        )


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


def tell(words: str) -> None:
    """A line for people, beside the results."""
    print(words, file=sys.stderr)


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
