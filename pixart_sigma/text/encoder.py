"""The T5 text encoder in every precision: a prompt in, embeddings of its real tokens out."""

import itertools
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SigmaError
from .cleaning import prepare_prompt
from .model import (
    PLAIN,
    PRECISIONS,
    QUANTIZED,
    build_model,
    check_packages,
    compute_dtype,
    quiet_int8_casts,
)
from .streaming import StreamedT5
from .tokenizer import find_tokenizer, load_tokenizer
from .weights import WatchedWeight, expected_nbytes, read_t5

MAX_TOKENS = 300  # the length PixArt-Sigma was trained with, end token included


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
    quiet_int8_casts()
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
