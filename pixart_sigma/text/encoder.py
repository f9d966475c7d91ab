"""The T5 text encoder in every precision: a prompt in, embeddings of its real tokens out."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from ..choices import MAX_SEQUENCE_LENGTH, QUANTIZED
from ..devices import pick_device
from ..errors import SigmaError
from ..files.mapping import Whole
from ..files.weight_files import find_tensors
from ..prompt_embeds import Encoded
from .changes import WeightChanges
from .cleaning import prepare_prompt, refuse_embeddings
from .loading import read_encoder, stream_model
from .model import build_model
from .streaming import StreamedT5
from .tokenizer import find_tokenizer, load_tokenizer, tokenize
from .weights import WatchedWeight

PAD = 0  # T5's token that fills up


class TextEncoder:
    """A T5 encoder and its tokenizer. Dropping the object frees every weight.

    A 4-bit encoder that has run on the CPU must be reloaded, not moved to another device or saved:
    bitsandbytes repacks its weights in place at the first CPU call and does not restore them exactly.
    """

    def __init__(self, model, tokenizer, precision: str, files: Whole | None = None):
        """files: those that weights of the model may be mapped to."""
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        self._files = files

    @classmethod
    def load(
        cls,
        path,
        tokenizer=None,
        precision: str | None = None,
        device="cpu",
        progress=None,
        stream: bool = False,
        changes: WeightChanges | None = None,
    ) -> "TextEncoder":
        """Load a T5 encoder.

        path: a Hugging Face folder (in shards or not; one that transformers saved in int8, nf4 or fp4 loads
            as it is), a pipeline folder with `text_encoder` in it, or one file in fp32, bf16, fp16, fp8,
            GGUF or ComfyUI's scaled fp8, int8, mxfp8 or nvfp4, which are dequantised weight by weight and
            then quantised as asked. Of a whole T5, and
            of a file of several models, it is the encoder.
        tokenizer: spiece.model, tokenizer.json or a folder with either; by default looked for in the
            encoder's folder, in its `tokenizer` folder and in the `tokenizer` folder beside it, then
            with other models on this machine, see `tokenizer_places`.
        precision: one of T5_PRECISIONS; None is the saved precision of a quantised folder, else int8. The
            quantised ones compute in bf16 where the device has it, else in fp16. `wo` is never quantised,
            and stays fp32 beside fp16, in which it overflows.
        progress: called as progress(weights read, all weights), perhaps from another thread; what it raises
            stops the loading.
        stream: leave the weights in RAM or in the file and pass two blocks at a time through the device, see
            `text_streaming`. The same output from less memory on the device, not for nf4 and fp4.
        changes: made of the weights when they are read, before they are rounded or quantised; where they
            are read again for every prompt, they are changed again.

        Raises SigmaError for a wrong precision, a missing tokenizer, and a precision other than the one
        the folder was quantised in; CheckpointError for files that do not hold exactly one T5 encoder.
        """
        device = pick_device(device)
        path, config, weights, precision = read_encoder(path, precision, changes)
        loaded_tokenizer = load_tokenizer(find_tokenizer(path, tokenizer), config.vocab_size)
        if stream:
            model = stream_model(config, weights, precision, device, path).to(device, progress)
            if model.is_quantized_again:
                logging.getLogger(__name__).warning(
                    f"{path} is quantised to int8 again for every prompt. Write it once with "
                    "`pixart-sigma quantize-t5` and stream from that folder to save the time."
                )
            return cls(model, loaded_tokenizer, precision)
        done, total, files = itertools.count(1), len(weights), Whole(path)

        def before_each() -> None:
            files.check()
            if progress is not None:
                progress(next(done), total)  # next is atomic, unlike +=

        places = find_tensors(path, "text_encoder")
        weights = {
            key: WatchedWeight(weight, before_each, places.get(key)) for key, weight in weights.items()
        }
        model = build_model(config, weights, precision, device, path)
        return cls(model, loaded_tokenizer, precision, files)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def is_streamed(self) -> bool:
        """Whether the weights are outside the device, see `text_streaming`."""
        return isinstance(self.model, StreamedT5)

    @property
    def is_movable(self) -> bool:
        """Whether `model.to` moves all weights. An int8 layer of bitsandbytes that has run keeps its weight
        beside its parameters, where `to` does not reach; 4-bit ones are repacked where they run."""
        return self.is_streamed or self.precision not in QUANTIZED

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
    def encode(
        self, text: str, clean_caption: bool = False, max_sequence_length: int = MAX_SEQUENCE_LENGTH
    ) -> Encoded:
        """Encode one prompt, lower-cased and stripped; clean_caption cleans it like the training captions.

        Of more than max_sequence_length tokens the last ones are cut. None are padded: the result equals the
        first n rows of what the reference pads to that length and masks. The empty prompt is one token.
        Raises SigmaError when text is not a str, when it names an embedding, which only ComfyUI reads, when
        clean_caption lacks its libraries, and when the encoder overflows.
        """
        ids, truncated = self._tokens(text, clean_caption, max_sequence_length)
        return Encoded(self.encode_ids(ids), truncated)

    def encode_all(
        self,
        texts: Sequence[str],
        clean_caption: bool = False,
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Encoded]:
        """Each prompt as `encode` makes it, bit for bit, in RAM; `encode_each` says how, and of `progress`.
        Raises SigmaError as `encode`, for a wrong text before any is encoded."""
        asked = [self._tokens(text, clean_caption, max_sequence_length) for text in texts]
        found: dict[int, Encoded] = {}
        for index, prompt_embeds in self.encode_each([ids for ids, _ in asked], progress=progress):
            found[index] = Encoded(prompt_embeds.cpu(), asked[index][1])
        return [found[index] for index in range(len(texts))]

    def _tokens(self, text: str, clean_caption: bool, max_sequence_length: int) -> tuple[list[int], str]:
        """A prompt's tokens, and the words that are cut off."""
        refuse_embeddings(text)
        text = prepare_prompt(text, clean_caption)
        tokens = tokenize(self.tokenizer, text, return_offsets_mapping=True)
        ids, truncated = tokens["input_ids"], ""
        if len(ids) > max_sequence_length:
            first_cut = tokens["offset_mapping"][max_sequence_length - 1][0]
            truncated = text[first_cut:].strip()
            ids = [*ids[: max_sequence_length - 1], self.tokenizer.eos_token_id]
        return ids, truncated

    def encode_ids(self, ids: list, layer: int = -1, progress=None) -> torch.Tensor:
        """The embeddings (1, n, C) of n tokens, after the layer that counts from the end.

        ids: numbers of the encoder's vocabulary; a tensor (C) takes the place of a token's row in its table,
            as textual inversion has it (Gal et al., 2022).

        progress: called as progress(blocks done, blocks to do) between the blocks of a streamed encoder; what
        it raises stops the encoding, and nothing stays on the device.
        Raises SigmaError when the encoder overflows or has no such layer.
        """
        ((_, prompt_embeds),) = self.encode_each([ids], layer, progress)
        return prompt_embeds

    @torch.no_grad()
    def encode_each(
        self, prompts: Sequence[list], layer: int = -1, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(index, what `encode_ids` makes of it) of each prompt by its ids, in the order they are done in.

        A streamed encoder reads its blocks once for as many prompts as wait on the device in MOST_WAITING
        bytes, from the shortest to the longest. progress counts the blocks of all these passes.
        """
        layers = self.model.config.num_layers
        if not -layers <= layer <= -1:
            raise SigmaError(f"The text encoder has no layer {layer}: use a number from {-layers} to -1.")
        if not self.is_streamed:
            for index, ids in enumerate(prompts):
                yield index, self._finite(self._encode_resident(*_split(ids), layer))
            return
        groups = self._groups([len(ids) for ids in prompts])
        for number, group in enumerate(groups):
            split = [_split(prompts[index]) for index in group]
            encoded = self.model.together(split, layer, _part(progress, number, len(groups)))
            for index in group:
                yield index, self._finite(encoded.pop(0))

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which prompts, by their lengths in tokens, share a pass through the streamed blocks."""
        left, groups = sorted(range(len(lengths)), key=lengths.__getitem__), []
        while left:
            count = self.model.most_together([lengths[index] for index in left])
            groups.append(left[:count])
            left = left[count:]
        return groups

    def _encode_resident(self, input_ids: torch.Tensor, rows: dict, layer: int) -> torch.Tensor:
        if self._files is not None and self.device.type == "cpu":
            self._files.check()
        inputs_embeds = self.model.shared(input_ids.to(self.device))
        for index, row in rows.items():
            inputs_embeds[0, index] = row.to(inputs_embeds)
        found = self.model(inputs_embeds=inputs_embeds, output_hidden_states=layer != -1)
        if layer == -1:
            return found.last_hidden_state
        return self.model.encoder.final_layer_norm(found.hidden_states[layer])

    def _finite(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(prompt_embeds).all():
            raise SigmaError(
                f"The text encoder produced numbers that are not finite in {self.precision}. "
                "Use bf16 or int8, or check the encoder's file."
            )
        return prompt_embeds


def _split(ids: list) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Token ids (1, n), and by their index the rows that take the place of some."""
    rows = {index: row for index, row in enumerate(ids) if isinstance(row, torch.Tensor)}
    return torch.tensor([[PAD if index in rows else token for index, token in enumerate(ids)]]), rows


def _part(
    progress: Callable[[int, int], None] | None, number: int, parts: int
) -> Callable[[int, int], None] | None:
    """What tells `progress` of one of several passes of as many blocks."""
    if progress is None:
        return None
    return lambda done, count: progress(number * count + done, parts * count)


load_text_encoder = TextEncoder.load
