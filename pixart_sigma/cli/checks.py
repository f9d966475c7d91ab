"""What the terminal's commands check and read before torch is imported. Each raises SigmaError."""

import math
import os
import re
import secrets
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..aspect_ratio import by_ratio, parse_size
from ..choices import T5_PRECISIONS
from ..errors import SettingError, SigmaError, tidy
from ..files.writing import is_special
from ..schedule_part import SchedulePart
from ..setting_checks import check_timesteps
from ..settings import Settings, Ways

# What of a picture that another one shall be like a recipe takes the place of.
RECIPE_DECIDES = (
    "steps",
    "timesteps",
    "sigmas",
    "spacing",
    "scheduler",
    "eta",
    "guidance_scale",
    "speed",
)
# Where two-stage finetunes of PixArt-Sigma were trained to hand over.
REFINER_START = 0.8
MUCH_LARGER = 2  # times the pixels
MOST_TEXT = 2**20  # bytes of a file of prompts


def read_settings(arguments, base: Settings | None = None) -> Settings:
    """The picture that the options describe, the rest as in `base`. A prompt is taken from them where it is
    one text; --aspect is for `with_aspect`, once the checkpoint's base is known."""
    given = _given(Settings, arguments)
    if given.get("seed") == "random":
        given["seed"] = secrets.randbelow(2**32)  # no longer than somebody may want to type again
        tell(f"The seed is {given['seed']}.")
    size, aspect = getattr(arguments, "size", None), getattr(arguments, "aspect", None)
    if size and aspect:
        raise SigmaError("--size and --aspect both choose the size; give one of them.")
    if size:
        given["width"], given["height"] = parse_size(size)
    if aspect:
        by_ratio(aspect, 1024)  # a wrong one is known at once
    stepped = given.keys() & {"steps", "timesteps", "spacing", "scheduler"}
    if "recipe" in given:
        if stepped:
            advice = f"it decides the steps, so leave --{min(stepped)} out"
            raise SettingError("recipe", given["recipe"], advice)
        given = {name: getattr(Settings, name) for name in RECIPE_DECIDES} | given
    elif stepped:
        given = {"recipe": None} | given
    if given.keys() & {"steps", "timesteps"}:
        given = {"timesteps": None, "sigmas": None} | given  # of `base`, which they replace
    if (given.get("guidance_scale") or 0) > 1:
        given = {"nag_scale": None} | given  # which guidance replaces
    if isinstance(given.get("timesteps"), str):
        given["timesteps"] = parse_timesteps(given["timesteps"])
    return replace(base or Settings(), **given)


def with_aspect(settings: Settings, aspect: str | None, base_size: int) -> Settings:
    """The settings with the trained size of an aspect ratio, if there is one."""
    if not aspect:
        return settings
    bucket = by_ratio(aspect, base_size)
    return replace(settings, width=bucket.width, height=bucket.height)


def read_ways(arguments, base: Ways | None = None) -> Ways:
    """How the options want it to run, the rest as in `base`. What they say of the decode, or a budget for the
    whole run, takes the place of all that `base` says of the decode."""
    given = _given(Ways, arguments)
    base = base or Ways()
    if given.keys() & {"decode", "decode_budget", "budget"}:
        base = replace(base, decode="auto", decode_budget=None, budget=None)
    return replace(base, **given)


def _given(cls: type, arguments) -> dict[str, Any]:
    """The fields that an option sets."""
    values = {field.name: getattr(arguments, field.name, None) for field in fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


def check_prompt(arguments) -> None:
    """One of PROMPT, --embeddings and --like, and with the second nothing that it already decides."""
    if arguments.embeddings is None:
        if arguments.prompt is None and arguments.like is None:
            raise SigmaError(
                "There is nothing to draw; give a PROMPT or --prompt-file, or --embeddings and a file of "
                "encode, or --like and a picture of generate."
            )
        return
    decided = {
        "--prompt-file" if arguments.prompt_file else "PROMPT": arguments.prompt is not None,
        "--negative": arguments.negative,
        "--clean-caption": arguments.clean_caption,
        "--max-sequence-length": arguments.max_sequence_length,
        "--text-encoder": arguments.text_encoder,
        "--tokenizer": arguments.tokenizer,
        "--t5-precision": arguments.t5_precision,
    }
    given = [name for name, value in decided.items() if value]
    if given:
        raise SigmaError(f"--embeddings brings encoded prompts; leave {' and '.join(given)} out.")


def parse_control_image(text: str) -> tuple[str, float, SchedulePart]:
    """The file, the strength and the part of the run of FILE[:STRENGTH[:PART]]."""
    match = re.fullmatch(r"(.+?)(?::(\d+(?:\.\d+)?))?(?::([\d.]+-[\d.]+%))?", text, re.DOTALL)
    file, strength, part = match.groups() if match else (text, None, None)
    return file, float(strength or 1), SchedulePart.parse(part) if part else SchedulePart()


def parse_share(text: str) -> float:
    """0.05 from "5%" or "0.05"."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise SigmaError(f"--budget is {text!r}; give a share such as 5% or 0.05.")
    return share


def parse_batch_size(text: str) -> int:
    """8 from "8"."""
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise SigmaError(f"--batch-size is {text!r}; give a whole number from 1 to 9999, or auto.")
    return int(text)


def parse_precisions(text: str) -> tuple[str, str]:
    """("bf16", "int8") from "bf16,int8"."""
    names = tuple(part.strip() for part in text.split(","))
    if len(names) != 2 or names[0] == names[1] or not set(names) <= set(T5_PRECISIONS):
        raise SigmaError(
            f"--precisions is {text!r}; give two different ones of {', '.join(T5_PRECISIONS)}, such as "
            "bf16,int8."
        )
    return names[0], names[1]


def parse_timesteps(text: str) -> tuple[int, ...]:
    """(999, 749) from "999,749"."""
    try:
        return check_timesteps([int(part) for part in text.split(",")])
    except ValueError as error:
        if isinstance(error, SigmaError):
            raise
        raise SigmaError(f"--timesteps is {text!r}; give whole numbers such as 999,749,499,249.") from None


def read_text(path: str) -> str:
    """The text of a file in UTF-8, or of standard input where `path` is "-". Raises SigmaError that names
    it."""
    name = "standard input" if path == "-" else path
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise SigmaError(f"{name} is longer than {MOST_TEXT // 2**20} MB; give a text file.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SigmaError(f"{name} is not text in UTF-8 (byte {error.start}); save it as UTF-8.") from None


def take_prompt(arguments) -> None:
    """The prompt of --prompt-file, without the line's end, in the place of PROMPT."""
    if arguments.prompt_file is None:
        return
    if arguments.prompt is not None:
        raise SigmaError("PROMPT and --prompt-file both say what to draw; give one of them.")
    arguments.prompt = read_text(arguments.prompt_file).rstrip("\r\n")
    if not arguments.prompt.strip():
        raise SigmaError(f"--prompt-file {arguments.prompt_file} holds no prompt; write one in it.")


def take_refiner(arguments, like) -> None:
    """FILE and START of --refiner; START is else that of the picture that it shall be `like`, or 0.8."""
    arguments.refiner_start = None
    if arguments.refiner is None:
        return
    file, colon, start = arguments.refiner.rpartition(":")
    try:
        arguments.refiner_start = float(start)
    except ValueError:
        file, colon = arguments.refiner, ""
    arguments.refiner = file if colon else arguments.refiner
    if not colon:
        arguments.refiner_start = (like and like.settings.refiner_start) or REFINER_START


def read_prompts(path: str) -> tuple[str, ...]:
    """The prompts of a text file, one in each line; of standard input where `path` is "-"."""
    prompts = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not prompts:
        raise SigmaError(f"{path} holds no prompt; write one in each line.")
    return prompts


def tell(words: str) -> None:
    """A line for people, beside the results."""
    print(tidy(words), file=sys.stderr)


def tell_guess(checkpoint) -> None:
    """That the transformer's variant is a guess, if it is one, and how to choose."""
    if checkpoint.variant_notice:
        tell(f"{checkpoint.variant_notice} If it was trained for another, say so with --variant.")


def tell_adapters(components, encodes: bool = True) -> None:
    """What of the adapters' files is not used. encodes: whether T5 is to encode prompts."""
    for adapter, strength in components.adapters:
        for notice in adapter.notices:
            tell(notice)
        if adapter.text and strength and not encodes:
            tell(adapter.text.left_out)
    for notice in components.text_notices if encodes else ():
        tell(notice)


def tell_recipe(checkpoint, settings: Settings) -> None:
    """That the transformer is called as known few-step weights are, where nothing says how to run such."""
    from ..inspection import find_recipe

    recipe = find_recipe(checkpoint.path)
    if recipe and settings.recipe is None and settings.scheduler not in ("lcm", "one_step"):
        tell(f"{checkpoint.path.name} seems to be made for few steps: --recipe {recipe} runs it so.")


def tell_size(settings: Settings, base_size: int) -> None:
    """That a picture is made at a size that was trained for, and is then enlarged, where that shows."""
    asked, made = settings.asked_size(base_size), settings.made_size(base_size)
    if math.prod(asked) > MUCH_LARGER * math.prod(made):
        tell(
            "A picture of {}x{} is made at {}x{}, a size this transformer was trained for, and enlarged; "
            "--no-binning makes it at its own size, which looks worse.".format(*asked, *made)
        )


def check_apart(**named: str | None) -> None:
    """That no two options, by their names, write to one file."""
    used: dict[str, str] = {}
    for name, place in named.items():
        if place in (None, "-") or Path(str(place)).is_dir():
            continue
        other = used.setdefault(os.path.realpath(str(place)), name)
        if other != name:
            raise SigmaError(
                f"--{other} and --{name.replace('_', '-')} would both write {place}; name two files."
            )


def check_writable(path: Path) -> None:
    """That a file of this name can be written."""
    if path.is_dir():
        raise SigmaError(f"{path} is a folder; give a file name to write to.")
    if not is_special(path):
        check_folder(Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent)
    elif not os.access(path, os.W_OK):
        raise SigmaError(f"{path} cannot be written to; choose another place with --out.")


def check_new(path: Path, ending: str, content: str) -> None:
    """That a file of this name can be written, ends as `content` has it, and is not there yet."""
    check_writable(path)
    if path.suffix != ending:
        raise SigmaError(f"{path} is to hold {content}; give a name that ends in {ending}.")
    if path.exists():
        raise SigmaError(f"{path} already exists. Choose another name or remove it.")


def check_folder(folder: Path) -> None:
    """That files can be written into this folder."""
    if not folder.is_dir():
        raise SigmaError(f"{folder} is not a folder; make it first, or write elsewhere.")
    if not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise SigmaError(f"{folder} cannot be written to; choose another place with --out.")
