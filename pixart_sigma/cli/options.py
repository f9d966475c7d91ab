"""What the terminal's commands can be told."""

import argparse
import math

from ..errors import SigmaError
from ..files.writing import say

T5_PRECISIONS = ("int8", "nf4", "fp4", "bf16", "fp16", "fp32")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SigmaError(f"{message} (see {self.prog} --help)")

    def print_help(self, file=None):
        say(self.format_help().rstrip())


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` of what it parses is the command's name."""
    parser = Parser(prog="pixart-sigma", description="PixArt-Sigma pictures from the terminal.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make a picture from a prompt")
    generate.set_defaults(command="generate")
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
    encode.set_defaults(command="encode")
    encode.add_argument("prompt")
    _add_text_encoder(encode)
    _add_encoding(encode)
    encode.add_argument("--out", default="prompt.safetensors")

    plan = commands.add_parser(
        "plan", help="say what each stage needs in memory, and with which settings a budget holds"
    )
    plan.set_defaults(command="plan")
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
    calibrate.set_defaults(command="calibrate")
    _add_model(calibrate)
    calibrate.add_argument("--size", metavar="WIDTHxHEIGHT", help="default: the checkpoint's base")
    calibrate.add_argument("--budget", default="5%", help="the error that is allowed (default: 5%%)")
    calibrate.add_argument("--prompts", help="a text file, one prompt in a line; default: four of our own")
    calibrate.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next")
    calibrate.add_argument("--steps", type=int, default=20)
    calibrate.add_argument("--guidance", type=float, default=4.5)
    calibrate.add_argument("--out", help="default: with the transformer, where auto finds it")
    calibrate.add_argument("--plot", metavar="FILE.png", help="also draw the errors and what was chosen")

    compare = commands.add_parser(
        "compare-t5", help="show what 8 or 4 bit cost: prompts and pictures in two precisions of T5"
    )
    compare.set_defaults(command="compare")
    # "+" and not required, because "*" takes nothing as soon as an option comes before it.
    compare.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="default: three of our own"
    ).required = False
    compare.add_argument(
        "--precisions",
        default="bf16,int8",
        metavar="REFERENCE,OTHER",
        help=f"two of {', '.join(T5_PRECISIONS)} (default: bf16,int8)",
    )
    _add_model(compare, t5_precision=False)
    _add_encoding(compare)
    compare.add_argument("--size", metavar="WIDTHxHEIGHT", help="default: the checkpoint's base")
    compare.add_argument("--steps", type=int, default=20)
    compare.add_argument("--guidance", type=float, default=4.5)
    compare.add_argument("--seed", type=int, default=0, help="of every picture")
    compare.add_argument(
        "--no-pictures", action="store_true", help="compare the embeddings alone: only T5 runs"
    )
    compare.add_argument("--json", action="store_true", help="print JSON, with every token, not a table")
    compare.add_argument("--out", default="comparison.png")

    inspect = commands.add_parser("inspect", help="say what a checkpoint is")
    inspect.set_defaults(command="inspect")
    inspect.add_argument("path")

    quantize = commands.add_parser("quantize-t5", help="write T5 once in 8 or 4 bit")
    quantize.set_defaults(command="quantize")
    quantize.add_argument("source", help="T5 folder or file")
    quantize.add_argument("out", help="folder to write")
    quantize.add_argument("--precision", choices=("int8", "nf4", "fp4"), default="int8")
    quantize.add_argument("--tokenizer", help="tokenizer file or folder, if not beside the source")

    download = commands.add_parser("download", help="get the official files into ComfyUI's folders")
    download.set_defaults(command="download")
    download.add_argument("variant", choices=("256", "512", "1024", "2K"))
    download.add_argument(
        "--to", help="ComfyUI's models folder (default: $COMFYUI_PATH/models, else ./models)"
    )
    download.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _add_model(command: argparse.ArgumentParser, t5_precision: bool = True):
    """What says which models run, and where."""
    _add_text_encoder(command, t5_precision)
    command.add_argument(
        "--transformer",
        help="transformer file or folder, instead of the model's; demo-kv is the demo's with KV compression",
    )
    command.add_argument("--vae", help="VAE file or folder, instead of the model's")
    command.add_argument(
        "--transformer-device",
        choices=("auto", "stream"),
        default="auto",
        help="stream: the transformer stays in RAM and passes through the GPU two blocks at a time, with the "
        "same result",
    )
    command.add_argument(
        "--variant", choices=("256", "512", "1024", "2K"), help="what the transformer was trained for"
    )


def _add_text_encoder(command: argparse.ArgumentParser, t5_precision: bool = True):
    command.add_argument("--model", default="demo", help="demo (default), or a pipeline folder")
    command.add_argument("--text-encoder", help="T5 file or folder, instead of the model's")
    if t5_precision:
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
