"""T5 in two precisions, in the host: one encoder loaded at a time, then its pictures by our sampler."""

from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import torch
from PIL import Image

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.prompt_embeds import Encoded
from ...pixart_sigma.settings import Settings
from . import embeddings
from .base_size import base_size
from .kv_compression import is_ours
from .memory import record
from .release import release
from .sampling import SamplerSettings, sample
from .text_encoder import load_clip
from .tokenizer import SECTION
from .vae import decode


@dataclass(frozen=True)
class Drawing:
    """What pictures are drawn with: all three or none; a latent of the pictures' size, or None for the
    MODEL's base size."""

    model: object = None
    vae: object = None
    latent: dict | None = None

    def __post_init__(self):
        if (self.model is None) != (self.vae is None):
            missing, given = ("MODEL", "VAE") if self.model is None else ("VAE", "MODEL")
            raise SigmaError(
                f"There is a {given} but no {missing}. Connect both to see pictures, or neither to compare "
                "what T5 makes of the prompts."
            )
        if self.model is not None and self.latent is None and base_size(self.model) is None:
            raise SigmaError(
                "The size of the pictures is not known: connect latent_image from Σ Aspect-Ratio Bucket."
            )

    @property
    def caption_channels(self) -> int | None:
        """What the transformer reads, if it is known."""
        ours = self.model is not None and is_ours(self.model)
        return self.model.model.diffusion_model.sigma_config.caption_channels if ours else None

    def single(self) -> dict:
        """The latent that each picture starts from."""
        if self.latent is not None:
            return self.latent | {"samples": self.latent["samples"][:1]}
        side = base_size(self.model) // 8
        return {"samples": torch.zeros(1, 4, side, side)}


def compare(
    path: Path, precisions: tuple[str, str], device: str, prompts: tuple[str, ...], drawing: Drawing, settings
):
    """The `PrecisionComparison` of a T5 at `path`. device: as for `load_clip`.

    Raises SigmaError, before anything is loaded, for what can not be compared or drawn.
    """
    from ...pixart_sigma.studies.precision import check_comparison
    from ...pixart_sigma.studies.precision import compare as drive

    clips = {precision: load_clip(path, precision, device) for precision in precisions}
    _, nbytes = check_comparison(
        prompts,
        precisions,
        path,
        tokenizer=clips[precisions[0]].cond_stage_model.tokenizer(),
        device=clips[precisions[0]].patcher.load_device,
        stream=device == "stream",
        caption_channels=drawing.caption_channels,
    )
    return drive(HostSubject(clips, prompts, drawing, settings), prompts, precisions, nbytes)


@dataclass
class HostSubject:
    """Our CLIP in each precision and our sampler, as `pixart_sigma.studies.precision` asks for them."""

    clips: dict
    prompts: tuple[str, ...]
    drawing: Drawing
    chosen: Settings
    conditionings: list = field(default_factory=list)

    @property
    def settings(self) -> dict:
        """What the pictures are made with; empty without pictures."""
        if self.drawing.model is None:
            return {}
        height, width = (8 * side for side in self.drawing.single()["samples"].shape[-2:])
        chosen = self.chosen
        return {
            "width": width,
            "height": height,
            "steps": chosen.steps,
            "guidance_scale": chosen.guidance,
            "seed": chosen.seed,
        }

    def encode(self, precision: str, texts: tuple[str, ...]) -> list[Encoded]:
        """The embeddings of each text; nothing of the encoder is left, also after an interrupt."""
        clip = self.clips[precision]
        with record(f"T5 in {precision}"):
            try:
                made = []
                for text in texts:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    made.append(embeddings.encode(clip, text, False))
            finally:
                release(clip, "free")
        self.conditionings.append(made)
        return [Encoded(conditioning[0][0]) for conditioning in made]

    def tokens(self, prompt: str, count: int) -> list[str]:
        """The pieces that T5 reads of a prompt, in either precision."""
        tokenizer = next(iter(self.clips.values())).tokenizer
        read = tokenizer.untokenize(tokenizer.tokenize_with_weights(prompt)[SECTION][0])
        return [piece for _, piece in read]

    def draw(self) -> list[tuple[Image.Image, Image.Image]]:
        """Both pictures of each prompt; all are sampled first, and the VAE loads once."""
        drawing = self.drawing
        if drawing.model is None:
            return []
        single = drawing.single()
        chosen = SamplerSettings(seed=self.chosen.seed, steps=self.chosen.steps, cfg=self.chosen.guidance)
        with record("Sample"):
            latents = [
                sample(drawing.model, positive, negative, single, chosen)["samples"]
                for (*positives, negative) in self.conditionings
                for positive in positives
            ]
        with record("Decode"):
            pictures = [_to_image(decode(drawing.vae, latent, "auto")) for latent in latents]
        half = len(pictures) // 2
        return list(zip(pictures[:half], pictures[half:], strict=True))


def _to_image(pictures: torch.Tensor) -> Image.Image:
    return Image.fromarray((pictures[0].clamp(0, 1) * 255).round().byte().cpu().numpy())
