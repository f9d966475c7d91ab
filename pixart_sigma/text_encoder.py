"""The T5 text encoder in every precision: a prompt in, embeddings of its real tokens out."""

import itertools
import logging
import math
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from .caption_cleaning import prepare_prompt
from .errors import CheckpointError, SigmaError
from .t5_weights import WatchedWeight, expected_nbytes, read_t5
from .text_streaming import StreamedT5

PRECISIONS = ("int8", "nf4", "fp4", "bf16", "fp16", "fp32")
QUANTIZED = ("int8", "nf4", "fp4")
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_TOKENS = 300  # the length PixArt-Sigma was trained with, end token included
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class Encoded:
    """A prompt's embeddings and the words that did not fit.

    prompt_embeds: (1, n, C), trimmed to the n real tokens, 1 <= n <= 300. truncated: words beyond, or "".
    """

    prompt_embeds: torch.Tensor
    truncated: str


class TextEncoder:
    """A T5 encoder and its tokenizer. Dropping the object frees every weight.

    A 4-bit encoder that has run on the CPU must be reloaded, not moved to another device or saved:
    bitsandbytes repacks its weights in place at the first CPU call and does not restore them exactly.
    """

    def __init__(self, model, tokenizer, precision: str):
        self.model, self.tokenizer, self.precision = model, tokenizer, precision

    @classmethod
    def load(
        cls,
        path,
        tokenizer=None,
        precision: str | None = None,
        device="cpu",
        progress=None,
        stream: bool = False,
    ) -> "TextEncoder":
        """Load a T5 encoder.

        path: a Hugging Face folder (in shards or not; one that transformers saved in int8, nf4 or fp4 loads
            as it is), a pipeline folder with `text_encoder` in it, or one merged file in fp32, bf16, fp16,
            fp8 or scaled fp8, which is dequantised weight by weight and then quantised as asked.
        tokenizer: spiece.model, tokenizer.json or a folder with either; by default looked for in the
            encoder's folder, in its `tokenizer` folder and in the `tokenizer` folder beside it.
        precision: one of PRECISIONS; None is the saved precision of a quantised folder, else int8. The
            quantised ones compute in bf16 where the device has it, else in fp16. `wo` is never quantised,
            and stays fp32 beside fp16, in which it overflows.
        progress: called as progress(weights read, all weights), perhaps from another thread; what it raises
            stops the loading.
        stream: leave the weights in RAM or in the file and pass two blocks at a time through the device, see
            `text_streaming`. The same output from less memory on the device, not for nf4 and fp4.

        Raises SigmaError for a wrong precision, a missing tokenizer, GGUF, and a precision other than the one
        the folder was quantised in; CheckpointError for files that do not hold exactly one T5 encoder.
        """
        device = check_device(device)
        path, config, weights, precision = read_encoder(path, precision)
        loaded_tokenizer = load_tokenizer(find_tokenizer(path, tokenizer), config.vocab_size)
        if stream:
            model = stream_model(config, weights, precision, device, path).to(device, progress)
            if model.is_quantized_again:
                logging.warning(
                    f"{path} is quantised to int8 again for every prompt. Write it once with "
                    "`pixart-sigma quantize-t5` and stream from that folder to save the time."
                )
            return cls(model, loaded_tokenizer, precision)
        if progress is not None:
            done = itertools.count(1)  # atomic, unlike +=
            total = len(weights)
            weights = {
                key: WatchedWeight(weight, lambda: progress(next(done), total))
                for key, weight in weights.items()
            }
        return cls(build_model(config, weights, precision, device, path), loaded_tokenizer, precision)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def is_streamed(self) -> bool:
        """Whether the weights are outside the device, see `text_streaming`."""
        return isinstance(self.model, StreamedT5)

    @property
    def nbytes(self) -> int:
        """Bytes of weights on the device, quantisation scales included; streamed ones while it encodes."""
        if self.is_streamed:
            return self.model.nbytes
        total = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers()])
        for module in self.model.modules():
            weight = getattr(module, "weight", None)
            scale = getattr(weight, "SCB", None)
            if scale is None:  # bitsandbytes moves it to the layer's state at the first call
                scale = getattr(getattr(module, "state", None), "SCB", None)
            total += scale.nbytes if scale is not None else 0
            quant_state = getattr(weight, "quant_state", None)
            while quant_state is not None:
                total += quant_state.absmax.nbytes + quant_state.code.nbytes
                quant_state = quant_state.state2
        return total

    @torch.no_grad()
    def encode(self, text: str, clean_caption: bool = False) -> Encoded:
        """Encode one prompt, lower-cased and stripped; clean_caption cleans it like the training captions.

        Tokens are not padded: the result equals the first n rows of the reference's 300 padded and masked
        tokens. The empty prompt is one token. Raises SigmaError when text is not a str, when clean_caption
        lacks its libraries, and when the encoder overflows.
        """
        text = prepare_prompt(text, clean_caption)
        tokens = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, truncated = tokens["input_ids"], ""
        if len(ids) > MAX_TOKENS:
            first_cut = tokens["offset_mapping"][MAX_TOKENS - 1][0]
            truncated = text[first_cut:].strip()
            ids = [*ids[: MAX_TOKENS - 1], self.tokenizer.eos_token_id]
        return Encoded(self.encode_ids(ids), truncated)

    @torch.no_grad()
    def encode_ids(self, ids: list[int], layer: int = -1, progress=None) -> torch.Tensor:
        """The embeddings (1, n, C) of n token ids, after the layer that counts from the end.

        progress: called as progress(blocks done, blocks to do) between the blocks of a streamed encoder; what
        it raises stops the encoding, and nothing stays on the device.
        Raises SigmaError when the encoder overflows or has no such layer.
        """
        layers = self.model.config.num_layers
        if not -layers <= layer <= -1:
            raise SigmaError(f"The text encoder has no layer {layer}: use a number from {-layers} to -1.")
        input_ids = torch.tensor([ids], device=self.device)
        if self.is_streamed:
            prompt_embeds = self.model(input_ids, layer, progress)
        elif layer == -1:
            prompt_embeds = self.model(input_ids=input_ids).last_hidden_state
        else:
            hidden = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states[layer]
            prompt_embeds = self.model.encoder.final_layer_norm(hidden)
        if not torch.isfinite(prompt_embeds).all():
            raise SigmaError(
                f"The text encoder produced numbers that are not finite in {self.precision}. "
                "Use bf16 or int8, or check the encoder's file."
            )
        return prompt_embeds


def read_encoder(path, precision: str | None = None):
    """What TextEncoder.load builds from: (path of the encoder, T5Config, weights, precision). Weights are
    memory-mapped. Raises SigmaError and CheckpointError as TextEncoder.load."""
    path = find_encoder(path)
    if precision is not None and precision not in PRECISIONS:
        raise SigmaError(f"Unknown text encoder precision {precision!r}: use one of {', '.join(PRECISIONS)}.")
    config, weights, saved = read_t5(path)
    if saved and precision not in (None, saved):
        raise SigmaError(
            f"{path} was saved in {saved}, so it can not be loaded in {precision}. Choose {saved}, "
            "or load the original encoder: quantising twice would lose quality."
        )
    return path, config, weights, precision or saved or "int8"


def find_encoder(path) -> Path:
    """The encoder's folder in a pipeline folder; any other path as it is."""
    path = Path(path)
    if (path / "text_encoder").is_dir() and not (path / "config.json").exists():
        return path / "text_encoder"
    return path


def stream_model(config, weights: dict, precision: str, device: torch.device, path: Path) -> StreamedT5:
    """A StreamedT5 for this device, still on the CPU. Raises SigmaError and CheckpointError as StreamedT5."""
    check_packages(precision)
    _quiet_int8_casts()
    return StreamedT5(config, weights, precision, PLAIN.get(precision) or compute_dtype(device), path)


def describe_encoder(
    path, tokenizer=None, precision: str | None = None, device="cpu", stream: bool = False
) -> tuple:
    """(tokenizer, bytes on the device) of the encoder that TextEncoder.load would give, whose weights are not
    loaded."""
    device = check_device(device)
    path, config, weights, precision = read_encoder(path, precision)
    loaded_tokenizer = load_tokenizer(find_tokenizer(path, tokenizer), config.vocab_size)
    if stream:
        model = stream_model(config, weights, precision, device, path)
        return loaded_tokenizer, model.window_nbytes(device)
    dtype = PLAIN.get(precision) or compute_dtype(device)
    return loaded_tokenizer, expected_nbytes(weights, precision, dtype)


def pad_embeds(embeds: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Batch embeddings (1, n, C) of different lengths into (prompt_embeds, prompt_mask).

    prompt_embeds is (B, L, C), padded with zeros. prompt_mask is (B, L) bool, True at real tokens, or None
    when all lengths are equal. Raises SigmaError for an empty list or for embeddings of different widths.
    """
    if not embeds:
        raise SigmaError("There are no prompt embeddings to batch. Pass at least one.")
    for embed in embeds:
        if embed.ndim != 3 or embed.shape[0] != 1 or embed.shape[2] != embeds[0].shape[-1]:
            raise SigmaError(
                f"Prompt embeddings must all be (1, tokens, {embeds[0].shape[-1]}); one is "
                f"{tuple(embed.shape)}. Encode all prompts with the same text encoder."
            )
    lengths = torch.tensor([embed.shape[1] for embed in embeds])
    longest = int(lengths.max())
    padded = torch.cat(
        [torch.nn.functional.pad(embed, (0, 0, 0, longest - embed.shape[1])) for embed in embeds]
    )
    if bool((lengths == longest).all()):
        return padded, None
    mask = torch.arange(longest)[None] < lengths[:, None]
    return padded, mask.to(padded.device)


def quantize_t5(source, out, precision: str = "int8", tokenizer=None) -> None:
    """Quantise a T5 encoder once and write it as a folder that TextEncoder.load(out) reads as it is.

    out holds config.json and model*.safetensors, out/tokenizer the tokenizer. It is written beside and then
    renamed; 4-bit weights are saved before they ever run, because a CPU call repacks them. Raises SigmaError
    when out exists and is not an empty folder, when the precision is not int8, nf4 or fp4, or when source is
    already quantised in another one.
    """
    out = Path(out)
    if precision not in QUANTIZED:
        raise SigmaError(f"Can not quantise to {precision!r}: use one of {', '.join(QUANTIZED)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SigmaError(
            f"{out} already exists and is not an empty folder. Choose another name or remove it."
        )

    encoder = TextEncoder.load(source, tokenizer, precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        encoder.model.save_pretrained(beside)
        encoder.tokenizer.save_pretrained(beside / "tokenizer")
        beside.chmod(0o755)
        if out.exists():
            out.rmdir()  # empty; Windows does not rename onto a folder
        beside.replace(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on the CPU and on GPUs that compute in it, fp16 on the others."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.float16 if device.type == "mps" else torch.bfloat16


def check_device(device) -> torch.device:
    """Return torch.device(device). Raises SigmaError for a name torch does not know or a CUDA device it can
    not see."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SigmaError(f"{device!r} is not a torch device. Use for example 'cpu' or 'cuda'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SigmaError("CUDA is not available here. Use device 'cpu', or install torch with CUDA.")
    return device


def build_model(config, weights: dict, precision: str, device: torch.device, path: Path):
    """Build transformers' T5EncoderModel from weights that were checked, quantising layer by layer."""
    from transformers import T5EncoderModel

    dtype = PLAIN.get(precision) or compute_dtype(device)
    quantization = None
    if precision in QUANTIZED:
        check_packages(precision)
        quantization = quantization_config(config, precision, dtype)
        if precision != "int8":
            check_4bit_widths(config, precision)
        _quiet_int8_casts()
    try:
        model, info = T5EncoderModel.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(
            f"{path} could not be loaded as a T5 encoder in {precision}: {error}"
        ) from error
    # transformers fills what it misses with random numbers
    absent = sorted(info["missing_keys"])
    if absent:
        raise CheckpointError(f"{path}: the weight {absent[0]} was not loaded. The file is incomplete.")
    return model.eval().requires_grad_(False)


def check_packages(precision: str) -> None:
    """Raise SigmaError for a quantised precision without its libraries."""
    for package in ("bitsandbytes", "accelerate") if precision in QUANTIZED else ():
        if find_spec(package) is None:
            raise SigmaError(f"Precision {precision} needs {package}: pip install {package}, or choose bf16.")


def quantization_config(config, precision: str, dtype: torch.dtype):
    """BitsAndBytesConfig of a precision; None for a folder that carries its own, which then computes in
    dtype."""
    from transformers import BitsAndBytesConfig

    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        saved["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        return None
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=precision, bnb_4bit_compute_dtype=dtype)


def check_4bit_widths(config, precision: str) -> None:
    """Raise SigmaError for widths that bitsandbytes' 4-bit kernels do not take (in % 64, out % 32)."""
    inner = config.num_heads * config.d_kv
    for name, width in (("d_model", config.d_model), ("d_ff", config.d_ff), ("heads x d_kv", inner)):
        if math.gcd(width, 64) != 64:
            raise SigmaError(
                f"Precision {precision} needs widths that are multiples of 64, and this encoder has "
                f"{name} = {width}. Use int8 or bf16."
            )


def find_tokenizer(path: Path, tokenizer=None) -> Path:
    """Return the tokenizer file to use for the encoder at `path`. Raises SigmaError saying what to pass."""
    if tokenizer is not None:
        tokenizer = Path(tokenizer)
        if tokenizer.is_file():
            return tokenizer
        if not tokenizer.exists():
            raise SigmaError(f"The tokenizer {tokenizer} does not exist.")
        folders = [tokenizer, tokenizer / "tokenizer"]
    else:
        folder = path if path.is_dir() else path.parent
        folders = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    for folder in folders:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    raise SigmaError(
        f"No tokenizer in {', '.join(map(str, folders))}. Pass `tokenizer`: a spiece.model or "
        "tokenizer.json, or the `tokenizer` folder of PixArt-Sigma-XL-2-1024-MS."
    )


def load_tokenizer(file: Path, vocab_size: int):
    """Load a T5 tokenizer from tokenizer.json, as it was saved, or from a SentencePiece model.

    Sentinel tokens (`extra_ids`) are the saved ones; a SentencePiece model without tokenizer_config.json gets
    the 100 of T5 where the encoder's vocabulary has room for them. Raises SigmaError when it is no T5
    tokenizer, or has more tokens than the encoder.
    """
    from transformers import PreTrainedTokenizerFast, T5Tokenizer

    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    try:
        if file.suffix == ".json":
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        else:
            with tempfile.TemporaryDirectory() as folder:  # the name and nothing else decides how it is read
                shutil.copyfile(file, Path(folder) / "spiece.model")
                settings = file.parent / "tokenizer_config.json"
                if settings.is_file():
                    shutil.copyfile(settings, Path(folder) / settings.name)
                tokenizer = T5Tokenizer.from_pretrained(folder)
                if not settings.is_file() and len(tokenizer) > vocab_size:
                    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
        empty = tokenizer("")["input_ids"]
    except Exception as error:  # the parsers raise bare Exception for a broken file
        raise SigmaError(f"{file} can not be read as a tokenizer: {error}. Download it again.") from error
    if empty != [tokenizer.eos_token_id]:
        raise SigmaError(
            f"{file} is not a T5 tokenizer: it encodes an empty prompt as {empty}, not as one end token."
        )
    if len(tokenizer) > vocab_size:
        raise SigmaError(
            f"The tokenizer {file} has {len(tokenizer)} tokens, but the encoder knows {vocab_size}. "
            "Pass the tokenizer that belongs to the encoder."
        )
    return tokenizer


def _without_int8_casts(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.getMessage()


def _quiet_int8_casts() -> None:
    """bitsandbytes logs the intended cast to fp16 at every layer of every call."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_without_int8_casts)
