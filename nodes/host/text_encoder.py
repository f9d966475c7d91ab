"""The engine's T5 text encoder, answering as the host's CLIP."""

import copy
import gc
import logging
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from ...pixart_sigma.errors import UNUSABLE, CheckpointError, SigmaError
from .tokenizer import PAD, T5_TOKENIZER, SigmaTokenizer, sections_of


def load_clip(path: Path, precision: str | None, device: str) -> "SigmaClip":
    """A CLIP around the T5 encoder at `path`; its weights are read at the first encode.

    precision: see TextEncoder.load. device: "cpu", "auto" for where the host puts text encoders, or "stream"
    to keep the weights out of the GPU and pass them through it, for which the host makes little room.
    """
    stream = device == "stream"
    if device == "cpu":
        load_device = offload_device = torch.device("cpu")
    elif stream:
        load_device, offload_device = comfy.model_management.get_torch_device(), torch.device("cpu")
    else:
        load_device = comfy.model_management.text_encoder_device()
        offload_device = comfy.model_management.text_encoder_offload_device()
    return SigmaClip(TextEncoderPatcher(SigmaTextModel(path, precision, stream), load_device, offload_device))


class SigmaClip(comfy.sd.CLIP):
    """What the nodes pass around as CLIP. Clones share their weights."""

    def __init__(self, patcher: "TextEncoderPatcher"):
        super().__init__(no_init=True)
        self.patcher = patcher
        self.patcher.is_clip = True
        self.cond_stage_model = patcher.model
        self.tokenizer = SigmaTokenizer(patcher)
        self.tokenizer_options = {}
        self.layer_idx = None
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None

    def clone(self, disable_dynamic=False) -> "SigmaClip":
        twin = copy.copy(self)
        twin.patcher = self.patcher.clone()
        twin.tokenizer_options = self.tokenizer_options.copy()
        return twin

    def with_adapter(self, adapter, strength: float) -> tuple["SigmaClip", tuple[str, ...]]:
        """(a clone whose T5 is changed when it is read, what of that is not done, for people). It has weights
        of its own. Raises CheckpointError for an adapter of another encoder."""
        from ...pixart_sigma.text_adapters import text_changes

        model = self.patcher.model
        adapters = (*model.adapters, (adapter, strength))
        changes, notices = text_changes(adapters, model.path)
        if changes is None:
            return self, notices
        twin = self.clone()
        twin.cond_stage_model = SigmaTextModel(model.path, model.precision, model.stream, adapters, changes)
        twin.patcher.model = twin.cond_stage_model
        twin.tokenizer = SigmaTokenizer(twin.patcher)
        return twin, notices

    def get_sd(self):
        raise SigmaError(
            "This text encoder can not be saved from a workflow. Quantise and save it in a terminal with "
            "`python -m pixart_sigma quantize-t5`."
        )

    state_dict_for_saving = get_sd

    def load_sd(self, sd, full_model=False):
        raise SigmaError(
            "This T5 reads its own file. Load another one with Load Σ Text Encoder (T5) or Load CLIP."
        )

    def generate(self, tokens, *args, **kwargs):
        raise SigmaError(
            "PixArt-Sigma's T5 reads prompts and writes no text. Connect a language model to this node."
        )


class SigmaTextModel(torch.nn.Module):
    """The weights that all clones of a CLIP share: in a file, or loaded.

    It has no parameters of its own, so the host finds nothing here to move, cast or patch.
    """

    def __init__(self, path: Path, precision: str | None, stream: bool = False, adapters=(), changes=None):
        """adapters, each with its strength: make `changes` of the weights when they are read."""
        super().__init__()
        self.adapters, self.changes = adapters, changes
        self.path, self.precision, self.stream = path, precision, stream
        self.encoder = None
        self.identity = None  # of the encoder that is loaded
        self.description = None
        self.layer = None
        self.told_about_patches = False
        self.ahead: dict[tuple, torch.Tensor] = {}  # embeddings (1, n, C) in RAM, by layer and token ids

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.encoder is None else self.encoder.device

    def load(self, device: torch.device):
        """Bring the weights to the device, from where they are or from the file."""
        from ...pixart_sigma.text.encoder import TextEncoder

        if self.encoder is not None and self.encoder.device != device:
            self.move(device)
        if self.encoder is None:
            self.identity = self.identify()
            with _normal_tensors():
                self.encoder = TextEncoder.load(
                    self.path,
                    self.tokenizer(),
                    precision=self.precision,
                    device=device,
                    progress=_progress(),
                    stream=self.stream,
                    changes=self.changes,
                )

    def identify(self):
        """The `EncoderIdentity` of the weights that encode next: the loaded ones, whatever their files are by
        now. None where the files are unusable, which loading them says better."""
        from ...pixart_sigma.text.identity import identify

        if self.encoder is not None:
            return self.identity
        try:
            return identify(self.path, self.tokenizer(), self.precision, self.changes, _progress())
        except UNUSABLE:
            return None

    def tokenizer(self) -> Path:
        """The file of the encoder's own tokenizer, or of the host's. Raises SigmaError where neither fits."""
        from ...pixart_sigma.text.loading import find_encoder
        from ...pixart_sigma.text.tokenizer import find_tokenizer

        return find_tokenizer(find_encoder(self.path), others=[T5_TOKENIZER])

    def move(self, device: torch.device):
        """Move the weights; those that can not be moved are dropped, to be read again. Streamed ones stay."""
        if self.encoder is None or self.encoder.device == device:
            return
        if not self.encoder.is_movable:
            self.drop()
            return
        try:
            with _normal_tensors():
                self.encoder.model.to(device)
        except (RuntimeError, MemoryError) as error:  # part of it may have been moved: it is of no use
            logging.getLogger(__name__).warning(
                f"The text encoder can not be moved to {device} and is read again: {error}"
            )
            self.drop()

    def drop(self):
        if self.encoder is not None:
            self.encoder = None
            gc.collect()  # its modules refer to each other

    def encode_token_weights(self, tokens: dict) -> tuple[torch.Tensor, None]:
        """Embeddings (1, n, C) in fp32 of the host's weighted tokens, and no pooled output.

        A token of weight w is moved w times as far from what the encoder makes of padding alone.
        """
        embeds = []
        for section in sections_of(tokens):
            ids = [token[0] for token in section]
            weights = torch.tensor([float(token[1]) for token in section], device=self.device)
            embed = self._encode(ids)
            weighted = weights != 1
            if weighted.any():
                empty = self._encode([PAD] * len(ids))
                moved = (embed - empty) * weights[:, None] + empty
                embed = torch.where(weighted[:, None], moved, embed)
            embeds.append(embed)
        return torch.cat(embeds, dim=1).to(comfy.model_management.intermediate_device()), None

    @contextmanager
    def encoded_ahead(self, prompts: list[dict], layer: int):
        """Within this block `encode_token_weights` has what the streamed encoder, once loaded, makes of all
        these tokens, with its blocks read once for them. What else it is given it encodes as ever."""
        wanted = {}
        for section in (section for tokens in prompts for section in sections_of(tokens)):
            ids = tuple(token[0] for token in section)
            if any(isinstance(token, torch.Tensor) for token in ids):
                continue  # an embedding has no number to know it by
            wanted[layer, ids] = None
            if any(token[1] != 1 for token in section):
                wanted[layer, (PAD,) * len(ids)] = None
        asked = list(wanted)
        try:
            with self._streaming():
                encoded = self.encoder.encode_each([list(ids) for _, ids in asked], layer, _progress())
                for index, embeds in encoded:
                    self.ahead[asked[index]] = embeds.cpu()
            yield
        finally:
            self.ahead.clear()

    def _encode(self, ids: list) -> torch.Tensor:
        layer = self.layer or -1
        known = self.ahead.get((layer, tuple(ids))) if self.ahead else None
        if known is not None:
            return known.to(self.device).float()
        with self._streaming():
            return self.encoder.encode_ids(ids, layer, _progress() if self.stream else None).float()

    @contextmanager
    def _streaming(self):
        try:
            yield
        except CheckpointError:  # the file it streams from was changed
            self.drop()
            raise

    def set_clip_options(self, options: dict):
        self.layer = options.get("layer", self.layer)

    def reset_clip_options(self):
        self.layer = None


class TextEncoderPatcher(comfy.model_patcher.ModelPatcher):
    """Loads and unloads the encoder as a whole: bitsandbytes weights can not be moved one by one.

    load_device and offload_device are the host's; 8-bit and 4-bit weights are never offloaded but dropped. Of
    streamed weights only the window on the device counts: that is what the host makes room for.
    """

    def tokenizer(self):
        return self._description().tokenizer

    def width(self) -> int:
        """Of the embeddings, and of the rows of T5's table."""
        return self._description().width

    def model_size(self) -> int:
        encoder = self.model.encoder
        return self._description().nbytes if encoder is None else encoder.nbytes

    def loaded_size(self) -> int:
        encoder = self.model.encoder
        return encoder.nbytes if encoder is not None and encoder.device == self.load_device else 0

    def current_loaded_device(self) -> torch.device:
        return self.offload_device if self.model.encoder is None else self.model.device

    def load(
        self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kwargs
    ):
        self.model.load(device_to or self.load_device)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        before = self.loaded_size()
        self.load(device_to)
        return self.loaded_size() - before

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        return 0  # too little for the host, which then calls detach

    def patch_model(
        self, device_to=None, lowvram_model_memory=0, load_weights=True, force_patch_weights=False
    ):
        if load_weights:
            self.load(device_to)
        return self.model

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.model.move(device_to or self.offload_device)

    def detach(self, unpatch_all=True):
        if unpatch_all:
            self.model.move(self.offload_device)
        for callback in self.get_all_callbacks(CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model

    def drop(self):
        """Forget the weights, in RAM too."""
        self.model.drop()

    def get_key_patches(self, filter_prefix=None):
        """What the host's nodes for merging ask for."""
        raise SigmaError(
            "The T5 of Load Σ Text Encoder (T5) can not be merged: its weights may be quantised. Load both "
            "encoders with CLIPLoader (type pixart)."
        )

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0) -> list:
        if any(isinstance(patch, list) for patch in patches.values()):
            self.get_key_patches()
        if patches and strength_patch and not self.model.told_about_patches:
            self.model.told_about_patches = True
            logging.getLogger(__name__).warning(
                "LoRA: nothing is applied to the T5 text encoder of PixArt-Sigma, whose weights can not be "
                "patched; the transformer's part is applied as usual. Load Σ LoRA changes T5 too."
            )
        return []

    def _description(self):
        """The encoder's `Description`; read from the file once, kept after the weights are dropped."""
        from ...pixart_sigma.text.loading import describe_encoder

        if self.model.description is None:
            self.model.description = describe_encoder(
                self.model.path,
                self.model.tokenizer(),
                precision=self.model.precision,
                device=self.load_device,
                stream=self.model.stream,
            )
        return self.model.description


@contextmanager
def _normal_tensors():
    """A node runs in inference mode, and what is made there could not be moved outside of a run."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _progress():
    bar = None

    def progress(done: int, total: int):
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done)

    return progress
