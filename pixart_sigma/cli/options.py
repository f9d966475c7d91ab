"""What the terminal's commands can be told. What is not given is None: the defaults are those of Settings and
Ways."""

import argparse

from .. import __version__
from ..choices import CALIBRATION_COSTS as COSTS
from ..choices import CALIBRATION_REFERENCES as REFERENCES
from ..choices import (
    DEFAULT_T5_PRECISION,
    DTYPES,
    QUANTIZED,
    RELEASES,
    T5_PRECISIONS,
    TRANSFORMER_FORMS,
    VARIANTS,
)
from ..errors import SigmaError
from ..files.writing import say
from .option_groups import (
    add_adapters,
    add_aspect,
    add_attention_guidance,
    add_binning,
    add_control,
    add_decode,
    add_embedding_cache,
    add_encoding,
    add_model,
    add_prompt_file,
    add_refiner,
    add_sampling,
    add_savings,
    add_schedule,
    add_size,
    add_start,
    add_text_encoder,
    add_variant,
    byte_count,
    report_file,
)

# Fields of Settings and Ways that an option sets under another name.
OPTIONS = {
    "guidance_scale": "--guidance",
    "nag_scale": "--nag",
    "refiner_start": "--refiner",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SigmaError(f"{message} (see {self.prog} --help)")

    def print_help(self, file=None):
        say(self.format_help().rstrip())


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` of what it parses is the command's name."""
    parser = Parser(prog="pixart-sigma", description="PixArt-Sigma pictures from the terminal.")
    parser.add_argument("--version", action="version", version=f"pixart-sigma {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_generate,
        _add_batch,
        _add_encode,
        _add_plan,
        _add_calibrate,
        _add_compare,
        _add_convert,
        _add_inspect,
        _add_merge,
        _add_quantize,
        _add_download,
    ):
        add(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--quiet", action="store_true", help="no progress and no notes; errors, and what was asked for"
        )
    return parser


def _add_generate(commands):
    generate = commands.add_parser("generate", help="make a picture from a prompt")
    generate.set_defaults(command="generate")
    # Not nargs="?", which takes nothing as soon as an option comes before it.
    generate.add_argument(
        "prompt", metavar="PROMPT", help="left out with --prompt-file, --embeddings and --like"
    ).required = False
    add_prompt_file(generate)
    generate.add_argument("--embeddings", metavar="FILE", help="a file of encode, in place of the prompts")
    generate.add_argument(
        "--like",
        metavar="PICTURE",
        help="make a picture of generate again, bit for bit on the same machine; each option beside it "
        "changes that one thing",
    )
    add_model(generate)
    add_refiner(generate)
    add_encoding(generate)
    add_embedding_cache(generate)
    add_size(generate)
    add_aspect(generate)
    add_binning(generate)
    add_sampling(generate)
    add_attention_guidance(generate)
    generate.add_argument("--count", type=int, help="pictures (default: 1)")
    add_schedule(generate)
    add_start(generate)
    add_control(generate)
    add_savings(generate)
    add_decode(generate)
    generate.add_argument("--release", choices=RELEASES, help="each model after its stage (default: free)")
    generate.add_argument(
        "--memory-report",
        nargs="?",
        const="-",
        type=report_file,
        metavar="FILE.json",
        help="print a table of the stages' memory; with a file name, write JSON",
    )
    generate.add_argument(
        "--out",
        metavar="FILE|FOLDER/",
        help=".png, .jpg or .webp; in a folder, a new file named after the prompt; - is standard output, as "
        "PNG (default: picture.png, or picture_2.png and so on where there is one)",
    )


def _add_batch(commands):
    batch = commands.add_parser(
        "batch",
        help="make a picture for each row of a file, every model loaded once",
        description="Make a picture for each row of a file. Stopped at any time, the same command goes on.",
    )
    batch.set_defaults(command="batch")
    batch.add_argument(
        "rows",
        metavar="PROMPTS",
        help="a text file with a prompt in each line, or .csv, .jsonl or .parquet, whose columns are prompt, "
        "negative, size, seed and so on; - is standard input",
    )
    batch.add_argument("--out", required=True, metavar="FOLDER", help="for pictures and manifest.jsonl")
    batch.add_argument("--seeds", metavar="0-9", help="each row with each of these seeds")
    batch.add_argument(
        "--count", type=int, help="pictures of each row, with seeds from its own on (default: 1)"
    )
    batch.add_argument(
        "--name",
        metavar="PATTERN",
        help="of the files, such as {row:05}_{prompt}_{seed}; {file} is what the column of that name says",
    )
    batch.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="default: png")
    batch.add_argument("--contact-sheet", action="store_true", help="all pictures, small, on one more")
    batch.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be drawn")
    batch.add_argument(
        "--batch-size",
        metavar="N|auto",
        help="pictures that go through the transformer at once; auto is what --budget holds. More than 1 "
        "changes pictures by rounding (default: 1)",
    )
    batch.add_argument(
        "--disk",
        type=byte_count,
        metavar="SIZE",
        help="for embeddings and latents between two stages; a longer batch is done in parts (default: 10GB)",
    )
    _add_ray(batch)
    add_model(batch)
    add_refiner(batch)
    add_encoding(batch)
    add_size(batch)
    add_aspect(batch)
    add_binning(batch)
    add_sampling(batch)
    add_attention_guidance(batch)
    add_schedule(batch)
    add_savings(batch)
    add_decode(batch)


def _add_ray(batch):
    group = batch.add_argument_group("many machines (pip install 'pixart-sigma[ray]')")
    group.add_argument(
        "--ray", metavar="local|ADDRESS", help="draw on this Ray cluster; local is this machine alone"
    )
    group.add_argument(
        "--workers",
        metavar="t5=1,transformer=4,vae=1",
        help="processes for each stage, or from so many to so many as in transformer=1-8 (default: 1)",
    )
    group.add_argument(
        "--gpus",
        metavar="t5=1,transformer=1,vae=0.25",
        help="GPUs of each worker; several may share one (default: 1 where there are any)",
    )


def _add_encode(commands):
    encode = commands.add_parser(
        "encode", help="write the embeddings of a prompt, for generate --embeddings without T5"
    )
    encode.set_defaults(command="encode")
    encode.add_argument("prompt", metavar="PROMPT", help="left out with --prompt-file").required = False
    add_prompt_file(encode)
    add_text_encoder(encode)
    add_adapters(encode)
    add_encoding(encode)
    add_embedding_cache(encode)
    encode.add_argument(
        "--out", default="prompt.safetensors", metavar="FILE", help="default: prompt.safetensors"
    )


def _add_plan(commands):
    plan = commands.add_parser(
        "plan", help="say what each stage needs in memory, and with which settings a budget holds"
    )
    plan.set_defaults(command="plan")
    plan.add_argument(
        "--budget", type=byte_count, required=True, metavar="SIZE", help="such as 2GB or 1600MB"
    )
    plan.add_argument("--size", metavar="WIDTHxHEIGHT", default="1024x1024", help="default: 1024x1024")
    add_binning(plan)
    plan.add_argument("--count", type=int, help="pictures (default: 1)")
    plan.add_argument("--guidance", type=float, dest="guidance_scale", help="1 or less: none, half the work")
    plan.add_argument("--model", help="demo, or a pipeline folder; default: the published shapes, no files")
    add_variant(plan)
    plan.add_argument("--t5-precision", choices=tuple(T5_PRECISIONS), help="what T5 is loaded in")
    plan.add_argument(
        "--control",
        action="append",
        metavar="FILE",
        help="a ControlNet that the run has; may be given several times",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_calibrate(commands):
    calibrate = commands.add_parser(
        "calibrate",
        help="measure what a checkpoint bears to be saved, for --speed auto and --kv-compression auto",
    )
    calibrate.set_defaults(command="calibrate")
    add_model(calibrate)
    add_size(calibrate)
    calibrate.add_argument(
        "--budget", dest="error_budget", default="5%", help="the error that is allowed (default: 5%%)"
    )
    calibrate.add_argument(
        "--reference",
        choices=REFERENCES,
        default=REFERENCES[0],
        help="where the error is counted from: own (default), the same run without savings, or converged, a "
        "run of 80 steps",
    )
    calibrate.add_argument(
        "--cost",
        choices=COSTS,
        default=COSTS[0],
        help="what is to be saved: multiply_adds (default), or seconds as they are measured on this device",
    )
    calibrate.add_argument(
        "--prompts", metavar="FILE", help="a text file, one prompt in a line; default: four of our own"
    )
    add_sampling(calibrate, of_seed="of the first prompt; the next has the next")
    calibrate.add_argument("--out", help="default: with the transformer, where auto finds it")
    calibrate.add_argument("--plot", metavar="FILE.png", help="also draw the errors and what was chosen")


def _add_compare(commands):
    compare = commands.add_parser(
        "compare-t5", help="show what 8 or 4 bit cost: prompts and pictures in two precisions of T5"
    )
    compare.set_defaults(command="compare")
    # "+" and not required, because "*" takes nothing as soon as an option comes before it.
    compare.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="default: three of our own"
    ).required = False
    compare.add_argument(
        "--prompts", dest="prompts_file", metavar="FILE", help="a text file, one prompt in a line"
    )
    compare.add_argument(
        "--precisions",
        default="bf16,int8",
        metavar="REFERENCE,OTHER",
        help=f"two of {', '.join(T5_PRECISIONS)} (default: bf16,int8)",
    )
    add_model(compare, t5_precision=False)
    add_encoding(compare)
    add_embedding_cache(compare)
    add_size(compare)
    add_sampling(compare, of_seed="of every picture")
    compare.add_argument(
        "--no-pictures", action="store_true", help="compare the embeddings alone: only T5 runs"
    )
    compare.add_argument("--json", action="store_true", help="print JSON, with every token, not a table")
    compare.add_argument("--out", default="comparison.png", metavar="FILE", help="default: comparison.png")


def _add_convert(commands):
    convert = commands.add_parser(
        "convert",
        help="write a transformer in int8, fp8 or bf16, which ComfyUI's own loader takes, or as GGUF; and "
        "say what that costs",
    )
    convert.set_defaults(command="convert")
    convert.add_argument(
        "--to",
        choices=tuple(TRANSFORMER_FORMS),
        required=True,
        help="int8: a scale for each row, rotated; fp8: float8 with scales; q8_0, q5_0, q4_0: GGUF",
    )
    convert.add_argument("--out", metavar="FILE", required=True, help="a new .safetensors or .gguf file")
    convert.add_argument("--transformer", help="transformer file or folder, instead of the model's")
    add_variant(convert)
    add_text_encoder(convert)
    convert.add_argument("--prompt", help="of the run that measures the error (default: one of our own)")
    convert.add_argument("--embeddings", metavar="FILE", help="a file of encode, in place of the prompt")
    add_size(convert, "at most 512x512")
    add_sampling(convert, steps=8)
    convert.add_argument("--no-run", action="store_true", help="compare the weights alone: no run, no T5")
    convert.add_argument("--json", action="store_true", help="print JSON, with every layer, not a table")


def _add_inspect(commands):
    inspect = commands.add_parser("inspect", help="say what a model file or folder is, and what uses it")
    inspect.set_defaults(command="inspect")
    inspect.add_argument("path", metavar="PATH", help="a file or folder")
    add_variant(inspect)


def _add_merge(commands):
    merge = commands.add_parser(
        "merge", help="write a transformer with adapters, or another transformer, merged into it"
    )
    merge.set_defaults(command="merge")
    merge.add_argument("--transformer", required=True, help="file or folder; demo, demo-kv, demo-phased")
    add_adapters(merge)
    merge.add_argument(
        "--with",
        dest="other",
        metavar="FILE:SHARE",
        help="another transformer, such as other.safetensors:0.3 for 0.3 of it and 0.7 of the first; "
        "adapters come after it",
    )
    add_variant(merge)
    merge.add_argument(
        "--keys", choices=("diffusers", "original"), default="diffusers", help="whose names the weights get"
    )
    merge.add_argument(
        "--dtype", choices=tuple(DTYPES), default="auto", help="default: the transformer's; else bf16"
    )
    merge.add_argument("--out", metavar="FILE", required=True, help="a new .safetensors file")


def _add_quantize(commands):
    quantize = commands.add_parser("quantize-t5", help="write T5 once in 8 or 4 bit")
    quantize.set_defaults(command="quantize")
    quantize.add_argument("source", help="T5 folder or file")
    quantize.add_argument("out", help="folder to write")
    quantize.add_argument(
        "--precision",
        choices=QUANTIZED,
        default=DEFAULT_T5_PRECISION,
        help=f"default: {DEFAULT_T5_PRECISION}",
    )
    quantize.add_argument("--tokenizer", help="tokenizer file or folder, if not beside the source")


def _add_download(commands):
    download = commands.add_parser("download", help="get the official files into ComfyUI's folders")
    download.set_defaults(command="download")
    download.add_argument("variant", choices=tuple(VARIANTS), help="what the transformer was trained for")
    download.add_argument(
        "--to", help="ComfyUI's models folder (default: $COMFYUI_PATH/models, else ./models)"
    )
    download.add_argument("--yes", action="store_true", help="do not ask")
