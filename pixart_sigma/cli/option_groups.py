"""Options that several commands share, by what they are about."""

import argparse
import re

from ..adapter_files import parse_adapter
from ..choices import DECODES, SCHEDULERS, T5_DEVICES, T5_PRECISIONS, TRANSFORMER_DEVICES, VARIANTS
from ..noise_schedule import SPACINGS
from ..recipes import RECIPES

RANDOM = "random"


def add_prompt_file(command: argparse.ArgumentParser):
    command.add_argument(
        "--prompt-file", metavar="FILE", help="read the prompt from a text file; - is standard input"
    )


def add_size(command: argparse.ArgumentParser, most: str = ""):
    usual = "the checkpoint's base" + (f", {most}" if most else "")
    command.add_argument("--size", metavar="WIDTHxHEIGHT", help=f"default: {usual}")


def add_aspect(command: argparse.ArgumentParser):
    command.add_argument("--aspect", metavar="W:H", help="16:9 is landscape; at the checkpoint's base")


def add_binning(command: argparse.ArgumentParser):
    command.add_argument(
        "--no-binning",
        dest="binning",
        action="store_const",
        const=False,
        help="make exactly --size, not the nearest trained size",
    )


def add_sampling(command: argparse.ArgumentParser, of_seed: str = "the noise to start from", steps: int = 20):
    """How many steps, how much guidance, from which noise."""
    command.add_argument("--steps", type=int, help=f"default: {steps}")
    command.add_argument(
        "--guidance",
        type=float,
        dest="guidance_scale",
        help="default 4.5; 1 or less: no guidance, half the work",
    )
    command.add_argument(
        "--seed", type=seed, metavar="N|random", help=f"{of_seed}; random draws one (default: 0)"
    )


def add_attention_guidance(command: argparse.ArgumentParser):
    command.add_argument(
        "--nag",
        type=float,
        dest="nag_scale",
        metavar="SCALE",
        help="with --guidance 1: let the negative prompt act in the attention, above 1, such as 5 "
        "(normalised attention guidance)",
    )


def add_model(command: argparse.ArgumentParser, t5_precision: bool = True):
    """What says which models run, and where."""
    add_text_encoder(command, t5_precision)
    command.add_argument(
        "--transformer",
        type=path_name,
        help="transformer file or folder, instead of the model's; demo-kv is the demo's with KV compression, "
        "demo-phased the one for --recipe phased-4",
    )
    add_adapters(command)
    command.add_argument("--vae", type=path_name, help="VAE file or folder, instead of the model's")
    command.add_argument(
        "--transformer-device",
        choices=TRANSFORMER_DEVICES,
        help="stream: the transformer stays in RAM and passes through the GPU two blocks at a time, with the "
        "same result",
    )
    add_variant(command)


def add_refiner(command: argparse.ArgumentParser):
    command.add_argument(
        "--refiner",
        type=path_name,
        metavar="FILE[:START]",
        help="a second transformer for the last steps, as two-stage finetunes have it; START is the share of "
        "the steps after which it takes over (default: 0.8)",
    )


def add_adapters(command: argparse.ArgumentParser):
    command.add_argument(
        "--lora",
        action="append",
        dest="adapters",
        type=parse_adapter,
        metavar="FILE[:STRENGTH]",
        help="an adapter of the transformer or T5 (LoRA, LoHa, LoKr, DoRA, OFT), of any trainer, by its "
        "file or folder; may be given several times (default strength: 1)",
    )


def add_variant(command: argparse.ArgumentParser):
    command.add_argument("--variant", choices=tuple(VARIANTS), help="what the transformer was trained for")


def add_text_encoder(command: argparse.ArgumentParser, t5_precision: bool = True):
    command.add_argument("--model", type=path_name, help="demo (default), or a pipeline folder")
    command.add_argument("--text-encoder", type=path_name, help="T5 file or folder, instead of the model's")
    command.add_argument(
        "--tokenizer",
        type=path_name,
        help="T5's tokenizer file or folder; default: the one beside T5, else that of another model here",
    )
    if t5_precision:
        command.add_argument(
            "--t5-precision",
            choices=tuple(T5_PRECISIONS),
            help="what T5 is loaded in; default: as it was saved, else int8, for the demo fp32",
        )
    command.add_argument(
        "--t5-device",
        choices=T5_DEVICES,
        help="stream: T5 stays in RAM and passes through the GPU block by block, in under 1 GB there (not "
        "nf4, fp4); cpu: it takes no graphics memory",
    )
    command.add_argument("--device", help="auto (default), or one of torch's, such as cpu or cuda:1")


def add_encoding(command: argparse.ArgumentParser):
    """How prompts become embeddings."""
    command.add_argument("--negative", help="what the picture should not show")
    command.add_argument(
        "--clean-caption",
        action="store_const",
        const=True,
        help="clean the prompt as the reference does",
    )
    command.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help="how much of a prompt is read; default: the 300 of the training",
    )


def add_embedding_cache(command: argparse.ArgumentParser):
    command.add_argument(
        "--no-embedding-cache",
        action="store_true",
        help="do not keep prompts' embeddings for later runs, nor use those that are kept",
    )


def byte_count(text: str) -> float:
    """2e9 from "2GB", "2000 mb" or "2G"; 2 * 2**30 from "2GiB"."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([KMGT])(I?B)?\s*", text.upper())
    size = 0.0
    if match:
        size = float(match[1]) * (1024 if match[3] == "IB" else 1000) ** (1 + "KMGT".index(match[2]))
    if not size:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: write a number and its unit, for example 2GB, 500MB or 8GiB"
        )
    return size


def path_name(text: str) -> str:
    """A path that says something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a file or folder, or leave the option out")
    return text


def report_file(text: str) -> str:
    """A file of JSON, or "-"; what else follows the option is a PROMPT that it took."""
    if text != "-" and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not end in .json; give such a file, or put PROMPT before the option"
        )
    return text


def seed(text: str) -> int | str:
    """A number, or "random", which `read_settings` draws."""
    if text == RANDOM:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; give one, or random") from None


def add_start(command: argparse.ArgumentParser):
    """What a picture starts from beside noise."""
    command.add_argument("--image", metavar="FILE", help="start from this picture")
    command.add_argument(
        "--mask",
        metavar="FILE",
        help="with --image: paint anew where this picture is white, keep the rest",
    )
    command.add_argument(
        "--strength",
        type=float,
        help="with --image: the nearer to 0 the more of it stays, 1 forgets it (default: 0.6, with --mask 1)",
    )


def add_control(command: argparse.ArgumentParser):
    """ControlNets, each with its picture."""
    command.add_argument(
        "--control",
        action="append",
        metavar="FILE",
        help="a ControlNet of PixArt, for the picture of --control-image; both may be given several times",
    )
    command.add_argument(
        "--control-image",
        action="append",
        metavar="FILE[:STRENGTH[:PART]]",
        help="what the ControlNet follows, such as edges.png:0.8 or edges.png:0.8:0-50%%, where the last "
        "is the part of the run in which it does",
    )


def add_schedule(command: argparse.ArgumentParser):
    """Where the steps lie, and what takes them."""
    command.add_argument("--scheduler", help=f"{', '.join(SCHEDULERS)} (default: dpmpp_2m)")
    command.add_argument("--timesteps", help="comma-separated, instead of --steps")
    command.add_argument(
        "--spacing", choices=SPACINGS, help="where the steps lie; default: as the checkpoint says"
    )
    command.add_argument(
        "--recipe",
        metavar="NAME|UPDATE:TIMESTEPS",
        help="for weights that were distilled to few steps, instead of steps, scheduler and guidance: "
        f"{', '.join(RECIPES)}, lcm-N, tcd-N, or spelled out, such as ddim:999,749,500,250 or x0:400:sigma",
    )


def add_savings(command: argparse.ArgumentParser):
    """What is not computed in full."""
    command.add_argument(
        "--kv-compression",
        metavar="off|auto|OPERATOR:RATIO:LAYERS|FILE",
        help="such as mean:2:14-27, or a file of calibrate; default: as the checkpoint was trained",
    )
    command.add_argument(
        "--speed",
        metavar="off|auto|SAVINGS|FILE",
        help="forecast some steps from those before, such as forecast:1:1:10-95%%; auto is what calibrate "
        "measured (default: off)",
    )


def add_decode(command: argparse.ArgumentParser):
    """How latents become pictures, and in what memory."""
    command.add_argument(
        "--decode",
        choices=DECODES,
        help="auto (default): whole where it fits, else in strips, which give the same picture; tiles "
        "differ in tone",
    )
    command.add_argument(
        "--decode-budget",
        type=byte_count,
        metavar="SIZE",
        help="such as 2GB; default: the memory that is free",
    )
    command.add_argument(
        "--budget",
        type=byte_count,
        metavar="SIZE",
        help="plan all stages for this much memory on the device, such as 2GB; see the command plan",
    )
