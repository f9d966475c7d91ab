"""The T5 of a CLIP that the host loaded together with other text encoders, as for SD3."""

import copy

import comfy.text_encoders.pixart_t5
import folder_paths
import torch

from ...pixart_sigma.errors import SigmaError
from .tokenizer import SECTION


def t5_alone(clip, padding: int):
    """A CLIP that encodes with the T5-XXL of `clip` alone, and shares its weights.

    padding: a prompt has at least so many tokens. Raises SigmaError for a CLIP without T5-XXL.
    """
    t5 = getattr(getattr(clip, "cond_stage_model", None), SECTION, None)
    if t5 is None:
        raise SigmaError(
            "There is no T5-XXL in this CLIP. Load it with one, as by TripleCLIPLoader, or use Load Σ Text "
            "Encoder (T5)."
        )
    alone = clip.clone()
    alone.cond_stage_model = _T5Alone(t5)
    alone.tokenizer = comfy.text_encoders.pixart_t5.PixArtTokenizer(
        embedding_directory=folder_paths.get_folder_paths("embeddings")
    )
    alone.set_tokenizer_option(f"{SECTION}_min_length", padding)
    return alone


class _T5Alone(torch.nn.Module):
    """Answers as the host's text models do, by the name that T5 has in the CLIP it is of: its patches fit."""

    def __init__(self, t5):
        super().__init__()
        # A shallow copy: the options of a run are its own, the weights are shared.
        self.t5xxl = copy.copy(t5)
        # A weight moves a word away from padding alone, as in the host's own CLIP for PixArt.
        self.t5xxl.special_tokens = {key: token for key, token in t5.special_tokens.items() if key != "end"}

    def set_clip_options(self, options: dict):
        self.t5xxl.set_clip_options(options)

    def reset_clip_options(self):
        self.t5xxl.reset_clip_options()

    def encode_token_weights(self, tokens: dict):
        return self.t5xxl.encode_token_weights(tokens[SECTION])[:2]

    def load_sd(self, sd):
        return self.t5xxl.load_sd(sd)
