"""The terminal: `pixart-sigma generate|encode|plan|calibrate|inspect|quantize-t5|download`.

Exit status 0 when done, 2 for a user's mistake (one line on stderr), 130 when interrupted.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from .errors import SigmaError
from .files import say, write_beside

T5_PRECISIONS = ("int8", "nf4", "fp4", "bf16", "fp16", "fp32")


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments) or 0
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        return 130
    except (SigmaError, OSError) as error:
        print(f"pixart-sigma: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SigmaError(f"{message} (see {self.prog} --help)")

    def print_help(self, file=None):
        say(self.format_help().rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pixart-sigma", description="PixArt-Sigma pictures from the terminal.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make a picture from a prompt")
    generate.set_defaults(command=_generate)
    # Not nargs="?", which takes nothing as soon as an option comes before it.
    generate.add_argument("prompt", help="left out with --embeddings").required = False
    generate.add_argument("--embeddings", metavar="FILE", help="a file of encode, in place of the prompts")
    _add_model(generate)
    _add_encoding(generate)
    generate.add_argument("--size", metavar="WIDTHxHEIGHT", help="default: the checkpoint's base")
    generate.add_argument("--aspect", metavar="W:H", help="16:9 is landscape; at the checkpoint's base")
    generate.add_argument(
        "--no-binning", action="store_true", help="make exactly --size, not the nearest trained size"
    )
    generate.add_argument("--steps", type=int, default=20)
    generate.add_argument("--guidance", type=float, help="default 4.5; 1 or less: no guidance, half the work")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--count", type=int, default=1)
    generate.add_argument("--scheduler", default="dpmpp_2m")
    generate.add_argument("--timesteps", help="comma-separated, instead of --steps")
    generate.add_argument("--image", help="start from this picture")
    generate.add_argument(
        "--strength", type=float, default=0.6, help="with --image: 0 keeps it, 1 forgets it"
    )
    generate.add_argument(
        "--kv-compression",
        metavar="off|auto|OPERATOR:RATIO:LAYERS|FILE",
        help="such as mean:2:14-27, or a file of calibrate; default: as the checkpoint was trained",
    )
    generate.add_argument(
        "--decode",
        choices=("auto", "whole", "strips", "tiles"),
        default="auto",
        help="auto: whole where it fits, else in strips, which give the same picture; tiles differ in tone",
    )
    generate.add_argument(
        "--decode-budget", type=_bytes, metavar="SIZE", help="such as 2GB; default: the memory that is free"
    )
    generate.add_argument(
        "--budget",
        type=_bytes,
        metavar="SIZE",
        help="plan all stages for this much memory on the device, such as 2GB; see the command plan",
    )
    generate.add_argument("--release", choices=("keep", "offload", "free"), default="free")
    generate.add_argument(
        "--memory-report",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print a table; with a file name, write JSON",
    )
    generate.add_argument("--out", default="picture.png")

    encode = commands.add_parser(
        "encode", help="write the embeddings of a prompt, for generate --embeddings without T5"
    )
    encode.set_defaults(command=_encode)
    encode.add_argument("prompt")
    _add_text_encoder(encode)
    _add_encoding(encode)
    encode.add_argument("--out", default="prompt.safetensors")

    plan = commands.add_parser(
        "plan", help="say what each stage needs in memory, and with which settings a budget holds"
    )
    plan.set_defaults(command=_plan)
    plan.add_argument("--budget", type=_bytes, required=True, metavar="SIZE", help="such as 2GB or 1600MB")
    plan.add_argument("--size", metavar="WIDTHxHEIGHT", default="1024x1024")
    plan.add_argument("--count", type=int, default=1)
    plan.add_argument("--guidance", type=float, default=4.5)
    plan.add_argument("--model", help="demo, or a pipeline folder; default: the published shapes, no files")
    plan.add_argument("--t5-precision", choices=T5_PRECISIONS)
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")

    calibrate = commands.add_parser(
        "calibrate", help="measure how much KV compression a checkpoint bears, for --kv-compression auto"
    )
    calibrate.set_defaults(command=_calibrate)
    _add_model(calibrate)
    calibrate.add_argument("--size", metavar="WIDTHxHEIGHT", help="default: the checkpoint's base")
    calibrate.add_argument("--budget", default="5%", help="the error that is allowed (default: 5%%)")
    calibrate.add_argument("--prompts", help="a text file, one prompt in a line; default: four of our own")
    calibrate.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next")
    calibrate.add_argument("--steps", type=int, default=20)
    calibrate.add_argument("--guidance", type=float, default=4.5)
    calibrate.add_argument("--out", help="default: with the transformer, where auto finds it")
    calibrate.add_argument("--plot", metavar="FILE.png", help="also draw the errors and what was chosen")

    inspect = commands.add_parser("inspect", help="say what a checkpoint is")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("path")

    quantize = commands.add_parser("quantize-t5", help="write T5 once in 8 or 4 bit")
    quantize.set_defaults(command=_quantize)
    quantize.add_argument("source", help="T5 folder or file")
    quantize.add_argument("out", help="folder to write")
    quantize.add_argument("--precision", choices=("int8", "nf4", "fp4"), default="int8")
    quantize.add_argument("--tokenizer", help="tokenizer file or folder, if not beside the source")

    download = commands.add_parser("download", help="get the official files into ComfyUI's folders")
    download.set_defaults(command=_download)
    download.add_argument("variant", choices=("256", "512", "1024", "2K"))
    download.add_argument(
        "--to", help="ComfyUI's models folder (default: $COMFYUI_PATH/models, else ./models)"
    )
    download.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _add_model(command: argparse.ArgumentParser):
    """What says which models run, and where."""
    _add_text_encoder(command)
    command.add_argument("--transformer", help="transformer file or folder, instead of the model's")
    command.add_argument("--vae", help="VAE file or folder, instead of the model's")
    command.add_argument(
        "--variant", choices=("256", "512", "1024", "2K"), help="what the transformer was trained for"
    )


def _add_text_encoder(command: argparse.ArgumentParser):
    command.add_argument("--model", default="demo", help="demo (default), or a pipeline folder")
    command.add_argument("--text-encoder", help="T5 file or folder, instead of the model's")
    command.add_argument("--t5-precision", choices=T5_PRECISIONS)
    command.add_argument(
        "--t5-device",
        choices=("auto", "cpu", "stream"),
        default="auto",
        help="stream: T5 stays in RAM and passes through the GPU block by block, in under 1 GB there (not "
        "nf4, fp4); cpu: it takes no graphics memory",
    )
    command.add_argument("--device", default="auto")


def _add_encoding(command: argparse.ArgumentParser):
    """How prompts become embeddings."""
    command.add_argument("--negative", default="", help="what the picture should not show")
    command.add_argument(
        "--clean-caption", action="store_true", help="clean the prompt as the reference does"
    )
    command.add_argument(
        "--no-embedding-cache",
        action="store_true",
        help="do not keep prompts' embeddings for later runs, nor use those that are kept",
    )


def _generate(arguments) -> int:
    out = Path(arguments.out)
    paths = (
        [out]
        if arguments.count == 1
        else [out.with_name(f"{out.stem}_{number}{out.suffix}") for number in range(1, arguments.count + 1)]
    )
    _check_settings(arguments)
    _check_writable(out)
    if arguments.memory_report not in (None, "-"):
        _check_writable(Path(arguments.memory_report))
    _check_prompt(arguments)

    import torch
    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    from .aspect_ratio import by_ratio, parse_size
    from .embeddings import PromptEmbeddings
    from .pipeline import SigmaPipeline

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
    image = _read_picture(arguments.image) if arguments.image else None
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
            timesteps=_timesteps(arguments.timesteps),
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
    elif arguments.memory_report:
        report = json.dumps(
            {"stages": pipeline.stages.as_dict(), "device": str(torch.device(pipeline.device))}, indent=2
        )
        write_beside(Path(arguments.memory_report), lambda file: file.write(report.encode()))
    return 0


def _encode(arguments) -> int:
    out = Path(arguments.out)
    _check_writable(out)

    from .pipeline import SigmaPipeline

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
    from .embeddings import EmbeddingCache, user_cache_folder

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
    _check_count(arguments.count)
    _check_guidance(arguments.guidance)

    from .aspect_ratio import check_size, parse_size
    from .planner import plan

    width, height = parse_size(arguments.size)
    check_size(width, height)
    if arguments.model:
        from .pipeline import SigmaPipeline

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
    _check_guidance(arguments.guidance)
    _check_steps(arguments.steps)
    budget = _share(arguments.budget)
    for name in (arguments.out, arguments.plot):
        if name:
            _check_writable(Path(name))
    prompts = _read_prompts(arguments.prompts) if arguments.prompts else None

    from tqdm import tqdm

    from .aspect_ratio import parse_size
    from .calibration import PROMPTS, calibration_path
    from .calibration_picture import draw
    from .pipeline import SigmaPipeline

    pipeline = SigmaPipeline.from_path(
        arguments.model,
        transformer=arguments.transformer,
        text_encoder=arguments.text_encoder,
        vae=arguments.vae,
        variant=arguments.variant,
        device=arguments.device,
        t5_precision=arguments.t5_precision,
        t5_device=arguments.t5_device,
    )
    out = Path(arguments.out) if arguments.out else calibration_path(pipeline.checkpoint.path)
    _check_writable(out)
    width, height = parse_size(arguments.size) if arguments.size else (pipeline.base_size, pipeline.base_size)

    with tqdm(total=None, leave=False, disable=None) as bar:

        def on_progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        calibration = pipeline.calibrate(
            prompts or PROMPTS,
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


def _inspect(arguments) -> int:
    from .checkpoint import inspect

    say(inspect(arguments.path).describe())
    return 0


def _quantize(arguments) -> int:
    from .text_encoder import quantize_t5

    quantize_t5(arguments.source, arguments.out, arguments.precision, tokenizer=arguments.tokenizer)
    say(arguments.out)
    return 0


def _download(arguments) -> int:
    from .download import download

    download(arguments.variant, arguments.to, ask=not arguments.yes)
    return 0


def _check_settings(arguments):
    """What can be known to be wrong before torch is imported."""
    _check_count(arguments.count)
    if arguments.budget and (arguments.decode != "auto" or arguments.decode_budget):
        raise SigmaError("--budget plans the decode too; give it, or --decode and --decode-budget.")
    _check_steps(arguments.steps)
    _check_guidance(arguments.guidance)
    if arguments.size and arguments.aspect:
        raise SigmaError("--size and --aspect both choose the size; give one of them.")
    if not 0 <= arguments.seed < 2**64:
        raise SigmaError(f"--seed is {arguments.seed}; give a whole number from 0 to 2^64 - 1.")


def _check_count(count: int):
    if count < 1:
        raise SigmaError(f"--count is {count}; give 1 or more.")


def _check_prompt(arguments):
    """One of PROMPT and --embeddings, and with the latter nothing that it already decides."""
    if arguments.embeddings is None:
        if arguments.prompt is None:
            raise SigmaError("There is nothing to draw; give a PROMPT, or --embeddings and a file of encode.")
        return
    decided = {
        "PROMPT": arguments.prompt is not None,
        "--negative": arguments.negative,
        "--clean-caption": arguments.clean_caption,
        "--text-encoder": arguments.text_encoder,
        "--t5-precision": arguments.t5_precision,
    }
    given = [name for name, value in decided.items() if value]
    if given:
        raise SigmaError(f"--embeddings brings encoded prompts; leave {' and '.join(given)} out.")


def _check_steps(steps: int):
    if steps < 1:
        raise SigmaError(f"--steps is {steps}; give 1 or more.")


def _check_guidance(guidance: float | None):
    if guidance is not None and not math.isfinite(guidance):
        raise SigmaError(f"--guidance is {guidance}; give a number such as 4.5.")


def _share(text: str) -> float:
    """0.05 from "5%" or "0.05"."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise SigmaError(f"--budget is {text!r}; give a share such as 5% or 0.05.")
    return share


def _bytes(text: str) -> float:
    """2e9 from "2GB", "2000MB" or "2e9"."""
    units = {"GB": 1e9, "MB": 1e6, "": 1}
    number = text.upper().rstrip("GMB")
    try:
        size = float(number) * units[text.upper()[len(number) :].strip()]
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for example 2GB or 500MB")
    return size


def _read_prompts(path: str) -> tuple[str, ...]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SigmaError(f"{path} holds no prompt; write one in each line.")
    return prompts


def _check_writable(path: Path):
    if path.is_dir():
        raise SigmaError(f"{path} is a folder; give a file name to write to.")
    if not path.parent.is_dir():
        raise SigmaError(f"{path.parent} is not a folder; make it first, or write elsewhere.")
    if not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise SigmaError(f"{path.parent} cannot be written to; choose another place with --out.")


def _timesteps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SigmaError(f"--timesteps is {text!r}; give whole numbers such as 999,749,499,249.") from None


def _read_picture(path: str):
    """The picture as (3, H, W) in [0, 1], float32."""
    import numpy
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255
    except UnidentifiedImageError:
        raise SigmaError(
            f"{path} is not a picture that can be read; give a PNG, JPEG or WebP file."
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
