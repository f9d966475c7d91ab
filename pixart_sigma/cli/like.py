"""`generate --like picture.png`: what a picture says of itself, beside what the options say."""

from typing import Any

from ..errors import SigmaError
from ..files.metadata import Metadata, UsedAdapter, current_versions
from ..noise_schedule import NoiseSchedule
from .checks import tell

# The options that name a component, by the component.
OPTIONS = {
    "transformer": "--transformer",
    "text_encoder": "--text-encoder",
    "vae": "--vae",
    "refiner": "--refiner",
}


def check_given(arguments, like: Metadata) -> None:
    """SigmaError where the picture was made from something that is not kept in it, and that is not given."""
    if like.image_sha256 and not arguments.image:
        raise SigmaError(
            f"{arguments.like} was made from a picture, which is not kept in it; give that with --image."
        )
    if like.mask_sha256 and not arguments.mask:
        raise SigmaError(
            f"{arguments.like} was made with a mask, which is not kept in it; give that with --mask."
        )
    if like.controls and not arguments.control:
        names = " and ".join(control.name for control in like.controls)
        settings = " and ".join(f":{control.strength:g}:{control.part}" for control in like.controls)
        raise SigmaError(
            f"{arguments.like} was made with ControlNet, {names}, whose pictures are not kept in it; give "
            f"--control and --control-image, with {settings} behind the picture's name."
        )
    if like.embeddings_sha256 and not (arguments.embeddings or arguments.prompt):
        raise SigmaError(
            f"{arguments.like} was made from encoded prompts, which are not kept in it; give their file with "
            "--embeddings."
        )


def own_transformer(arguments, like: Metadata) -> str | None:
    """The transformer to use where the options name no model: one of the demo's others, if it was that."""
    from .. import BUILT_IN

    was = like.models.get("transformer")
    if was is None or arguments.model is not None:
        return None
    return next((name for name, path in BUILT_IN.items() if was.name == path.name and name != "demo"), None)


def check_models(arguments, like: Metadata, fingerprints: dict[str, str]) -> None:
    """SigmaError where a model would be another one than the picture's, and nobody asked for it; where
    somebody did, it is told."""
    for component, option in OPTIONS.items():
        was = like.models.get(component)
        if was is None or not was.fingerprint or was.fingerprint == fingerprints.get(component):
            continue
        if component == "text_encoder" and arguments.embeddings:
            continue
        name = component.replace("_", " ")
        with_, and_ = "", ""
        if component == "text_encoder" and "tokenizer" in like.models:
            with_, and_ = f" with the tokenizer {like.models['tokenizer'].name!r}", " and --tokenizer"
        if getattr(arguments, component) is None and arguments.model is None:
            raise SigmaError(
                f"{arguments.like} was made with another {name}, {was.name!r}{with_}; give it with --model "
                f"or {option}{and_}."
            )
        tell(f"The {name} is another one than {arguments.like} was made with.")


def check_adapters(arguments, like: Metadata, used: tuple[UsedAdapter, ...]) -> None:
    """SigmaError where the picture was made with adapters and none are given; others than those are told."""
    if not arguments.adapters and like.adapters:
        options = " ".join(f"--lora {adapter.name}:{adapter.strength:g}" for adapter in like.adapters)
        raise SigmaError(
            f"{arguments.like} was made with adapters, which are not kept in it; give them with {options}, "
            "or others."
        )
    was, now = (
        [(adapter.fingerprint, adapter.strength) for adapter in adapters]
        for adapters in (like.adapters, used)
    )
    if was != now:
        tell(f"The adapters (--lora) are not those that {arguments.like} was made with.")


def taken_as(arguments, like: Metadata, fingerprints: dict[str, str], found: NoiseSchedule) -> dict:
    """What the same transformer was taken to be trained for, for SigmaPipeline.from_path: its variant, where
    no option says otherwise, and its noise schedule, where it is not the one that is `found` now."""
    was = like.models.get("transformer")
    if was is None or was.fingerprint != fingerprints["transformer"]:
        return {}
    taken: dict[str, Any] = {}
    if arguments.variant is None and like.variant:
        taken["variant"] = like.variant
    if like.noise_schedule != found:
        tell(f"The checkpoint's noise schedule is {found.describe()}.")
        tell(f"{arguments.like} was made with {like.noise_schedule.describe()}, and so is this.")
        taken["noise_schedule"] = like.noise_schedule
    return taken


def tell_differences(arguments, like: Metadata, start) -> None:
    """What else makes it another picture than that one; start: what it begins from."""
    if like.image_sha256 and start.image_sha256 != like.image_sha256:
        tell(f"{arguments.image} is another picture than {arguments.like} was made from.")
    if like.mask_sha256 and start.mask_sha256 != like.mask_sha256:
        tell(f"{arguments.mask} is another mask than {arguments.like} was made with.")
    now = current_versions()
    changed = [
        f"{name} {now.get(name, 'none')}" for name, was in like.versions.items() if was != now.get(name)
    ]
    if changed:
        tell(f"{arguments.like} was not made with {', '.join(changed)}; it may differ by rounding.")


def tell_other_controls(arguments, like: Metadata, made: Metadata) -> None:
    """Where ControlNets, their pictures or strengths are others than that picture's."""
    if like.controls != made.controls:
        tell(f"The ControlNets or their pictures are others than {arguments.like} was made with.")
