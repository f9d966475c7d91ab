"""The words of every option, once, and what they stand for. Without torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class T5Precision:
    """A precision of T5: torch's name of the dtype of all weights, or how bitsandbytes quantises linear
    layers.

    bits: of a linear layer's weight. bitsandbytes: arguments of transformers' BitsAndBytesConfig. streams:
    whether its blocks can pass through a device one by one.
    """

    bits: int
    dtype: str | None = None
    bitsandbytes: dict[str, Any] | None = None
    streams: bool = True


@dataclass(frozen=True)
class Scheduler:
    """What a scheduler takes beside a number of steps, and the guidance scale of a run that gives none."""

    timesteps: bool = False
    sigmas: bool = False
    eta: bool = False
    guidance_scale: float = 4.5


T5_PRECISIONS = {
    "int8": T5Precision(8, bitsandbytes={"load_in_8bit": True}),
    # bitsandbytes repacks 4-bit weights where they run, so they cannot be streamed.
    "nf4": T5Precision(4, bitsandbytes={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, streams=False),
    "fp4": T5Precision(4, bitsandbytes={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, streams=False),
    "bf16": T5Precision(16, dtype="bfloat16"),
    "fp16": T5Precision(16, dtype="float16"),
    "fp32": T5Precision(32, dtype="float32"),
}
DEFAULT_T5_PRECISION = "int8"
QUANTIZED = tuple(name for name, precision in T5_PRECISIONS.items() if precision.bitsandbytes)
# Of the transformer and the VAE, with torch's names; auto is what the device computes best in.
DTYPES = {"auto": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What a transformer can be converted to, and how its file ends: float8 with scales and int8 as ComfyUI stores
# them, and three types of GGUF.
TRANSFORMER_FORMS = {
    "int8": ".safetensors",
    "fp8": ".safetensors",
    "bf16": ".safetensors",
    "q8_0": ".gguf",
    "q5_0": ".gguf",
    "q4_0": ".gguf",
}
# Where a model's weights are. auto: on the device; stream: in RAM, two blocks at a time on the device.
T5_DEVICES: tuple[str, ...] = ("auto", "cpu", "stream")
TRANSFORMER_DEVICES: tuple[str, ...] = ("auto", "stream")
# auto: whole where it fits, else in strips, which give the same picture; tiles differ in tone.
DECODES = ("auto", "whole", "strips", "tiles")
# What happens to a model after its stage.
RELEASES = ("keep", "offload", "free")
# The sizes that checkpoints were trained for: the latent's side (pixels / 8) and the scale of the positions,
# which span 0 to 32 for each of them.
VARIANTS = {"256": (32, 0.5), "512": (64, 1.0), "1024": (128, 2.0), "2K": (256, 4.0)}
# one_step and lcm are for checkpoints that were distilled for them; one_step without guidance.
SCHEDULERS = {
    "dpmpp_2m": Scheduler(timesteps=True),
    "sa_solver": Scheduler(),
    "euler": Scheduler(timesteps=True, sigmas=True),
    "euler_ancestral": Scheduler(),
    "ddim": Scheduler(eta=True),
    "unipc": Scheduler(),
    "lcm": Scheduler(timesteps=True),
    "one_step": Scheduler(timesteps=True, guidance_scale=1.0),
}
# Where calibration counts errors from, the user's own run without savings or one of many steps; and by what
# it takes the cheapest choice.
CALIBRATION_REFERENCES = ("own", "converged")
CALIBRATION_COSTS = ("multiply_adds", "seconds")
MAX_STEPS = 999
MAX_SEQUENCE_LENGTH = 300  # tokens that PixArt-Sigma was trained with, end token included
