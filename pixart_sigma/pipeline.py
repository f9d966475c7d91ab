"""The stages in a row: a prompt, its embeddings, latents, pictures. One model in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from . import DEMO
from .aspect_ratio import BINNING, check_size, crop_back, nearest
from .components import T5_PLACES, TRANSFORMER_PLACES, Components, check_place, pick_device, pick_dtype
from .errors import SigmaError
from .memory.stages import Stages
from .planner import Plan, read_models
from .planner import plan as make_plan
from .sampling.denoise import Step, check_settings, get_noise
from .sampling.schedulers import default_guidance
from .text.embeddings import EmbeddingCache, PromptEmbeddings
from .text.encoder import Encoded
from .text.stage import TextStage
from .transformer.checkpoint import Checkpoint
from .transformer.kv_calibration import Calibration
from .transformer.stage import TransformerStage
from .vae.coding import decode, encode, load_vae


@dataclass(frozen=True)
class Result:
    """Pictures with the latents they came from (B, 4, h, w), and the settings that make them again."""

    images: list[Image.Image]
    latents: torch.Tensor
    settings: dict
    truncated: str = ""


@dataclass
class SigmaPipeline:
    """PixArt-Sigma from files on disk. `from_path` finds the components; `generate` runs the stages."""

    components: Components
    device: torch.device
    dtype: torch.dtype
    text: TextStage
    transformer: TransformerStage
    stages: Stages = field(repr=False)

    @classmethod
    def from_path(
        cls,
        path: str | Path = "demo",
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        variant: str | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        t5_precision: str | None = None,
        t5_device: str = "auto",
        transformer_device: str = "auto",
        release: str = "free",
        measure: bool = False,
        needs_text_encoder: bool = True,
    ) -> "SigmaPipeline":
        """Find the components of "demo" or of a pipeline folder; a component given by itself goes first. A
        transformer "demo-kv" is the demo's, trained with KV compression.

        Nothing is loaded yet. `t5_precision` defaults to the one a quantised T5 was saved in, else to int8,
        for the demo to fp32; `dtype` of the transformer and the VAE to bfloat16 on a GPU that has it, else
        float16, on a CPU to float32. `t5_device` "stream" passes T5 through the device block by block, "cpu"
        leaves the device to the other stages. `transformer_device` "stream" passes the transformer's blocks
        through the device. Without `needs_text_encoder` the prompts must be encoded already.
        Raises CheckpointError where a component is missing or is something else.
        """
        folder = DEMO if str(path) == "demo" else Path(path)
        components = Components.find(
            folder,
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
            variant=variant,
            needs_text_encoder=needs_text_encoder,
        )
        device = pick_device(device)
        if t5_precision is None and folder == DEMO and text_encoder is None:
            t5_precision = "fp32"
        stages = Stages(device, release, measure)
        text = TextStage(
            text_encoder=components.text_encoder,
            tokenizer=components.tokenizer,
            precision=t5_precision,
            place=check_place("t5_device", t5_device, T5_PLACES),
            device=device,
            stages=stages,
        )
        dtype = dtype or pick_dtype(device)
        return cls(
            components=components,
            device=device,
            dtype=dtype,
            text=text,
            transformer=TransformerStage(
                checkpoint=components.checkpoint,
                place=check_place("transformer_device", transformer_device, TRANSFORMER_PLACES),
                device=device,
                dtype=dtype,
                stages=stages,
            ),
            stages=stages,
        )

    def apart(self) -> "SigmaPipeline":
        """The same models in stages of their own, each freed after its use: what this one holds stays."""
        stages = Stages(self.device, "free")
        return replace(
            self,
            stages=stages,
            text=replace(self.text, stages=stages, _held=None),
            transformer=replace(self.transformer, stages=stages, _held_place=""),
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """What the transformer's files are."""
        return self.components.checkpoint

    @property
    def base_size(self) -> int:
        """The side, in pixels, of the square that the checkpoint was trained for."""
        return self.checkpoint.config.sample_size * 8

    def encode_prompts(
        self,
        prompt: str,
        negative: str = "",
        *,
        clean_caption: bool = False,
        embedding_cache: EmbeddingCache | None = None,
    ) -> PromptEmbeddings:
        """The embeddings of a prompt and a negative prompt, ready to save or to give to `generate`.

        T5 is loaded only where `embedding_cache` lacks one of them.
        """
        (positive, unwanted), encoder = self.text.encode((prompt, negative), clean_caption, embedding_cache)
        return PromptEmbeddings(
            positive=positive.prompt_embeds,
            negative=unwanted.prompt_embeds,
            positive_text=prompt,
            negative_text=negative,
            precision=encoder.precision,
            clean_caption=clean_caption,
            fingerprint=encoder.fingerprint,
            positive_truncated=positive.truncated,
            negative_truncated=unwanted.truncated,
        )

    def generate(
        self,
        prompt: str | PromptEmbeddings,
        negative: str = "",
        *,
        width: int | None = None,
        height: int | None = None,
        steps: int = 20,
        guidance_scale: float | None = None,
        seed: int = 0,
        count: int = 1,
        scheduler: str = "dpmpp_2m",
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        image: torch.Tensor | None = None,
        strength: float = 1.0,
        kv_compression_setting: str | None = None,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        decode_how: str = "auto",
        decode_budget: float | None = None,
        plan: Plan | None = None,
        embedding_cache: EmbeddingCache | None = None,
        callback: Callable[[Step], bool | None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Result:
        """Make `count` pictures of width x height pixels; picture k is drawn from the k-th noise of the seed.

        With `use_resolution_binning` the transformer works at the trained size nearest in shape and the
        pictures are scaled and cropped to the asked size, as the reference pipeline does. `image` (3, H, W)
        in [0, 1], with `strength` in (0, 1], starts from a picture instead of from noise alone.
        `kv_compression_setting` None is as the checkpoint was trained, else as on the command line.
        `decode_how` and `decode_budget` (bytes) are those of `vae.decode`; a `plan` of `plan` sets them, and
        how the other stages run. A stage that runs out of memory is released and runs once more in its next
        smaller way.
        A `prompt` that is already encoded brings its negative prompt and needs no T5; nor do texts that
        `embedding_cache` holds.
        Raises SigmaError before any model is loaded where a setting can be known to be wrong.
        """
        width = self.base_size if width is None else width
        height = self.base_size if height is None else height
        check_size(width, height)
        if guidance_scale is None:
            guidance_scale = default_guidance(scheduler)
        check_settings(scheduler, steps, guidance_scale, timesteps, sigmas, strength)
        if not isinstance(count, int) or count < 1:
            raise SigmaError(f"count is {count}; give a whole number of pictures, 1 or more.")
        made_width, made_height = self._made_size(width, height, use_resolution_binning)
        rules = self.transformer.kv_compression(kv_compression_setting, made_width, made_height)
        stage = on_stage or (lambda name: None)

        text_settings, transformer_settings = {}, {}
        if plan is not None:
            decode_how, decode_budget = plan.decode_how, plan.decode_budget or None
            text_settings = {"precision": plan.t5_precision, "place": plan.t5_device}
            transformer_settings = {
                "place": plan.transformer_device,
                "guidance_in_turn": plan.guidance_in_turn,
            }
        if isinstance(prompt, PromptEmbeddings):
            self._check_embeddings(prompt, negative, clean_caption)
            embeddings = prompt
            prompt, negative = embeddings.positive_text, embeddings.negative_text
            clean_caption, precision = embeddings.clean_caption, embeddings.precision
            encoded = [
                Encoded(embeddings.positive, embeddings.positive_truncated),
                Encoded(embeddings.negative, embeddings.negative_truncated),
            ]
        else:
            stage("text encoder")
            texts = (prompt, negative) if guidance_scale > 1 else (prompt,)
            encoded, encoder = self.text.encode(texts, clean_caption, embedding_cache, **text_settings)
            precision = encoder.precision
        image_latents = None
        if image is not None:
            stage("VAE encode")
            picture = crop_back(image[None], made_width, made_height)
            image_latents = self.stages.run("VAE encode", self._load_vae, lambda vae: encode(vae, picture))
            image_latents = image_latents.repeat(count, 1, 1, 1)

        generator = torch.Generator().manual_seed(seed)
        channels = self.checkpoint.config.in_channels
        noise = get_noise(count, made_height, made_width, generator, self.dtype, self.device, channels)
        stage("transformer")
        latents = self.transformer.denoise(
            noise,
            encoded[0],
            encoded[1] if guidance_scale > 1 else None,
            generator,
            **transformer_settings,
            scheduler=scheduler,
            steps=steps,
            guidance_scale=guidance_scale,
            timesteps=timesteps,
            sigmas=sigmas,
            strength=strength,
            image_latents=image_latents,
            eta=eta,
            kv_compression=rules,
            callback=callback,
        )

        stage("VAE decode")
        pictures = self.stages.run(
            "VAE decode", self._load_vae, lambda vae: decode(vae, latents, decode_how, decode_budget)
        )
        if (made_width, made_height) != (width, height):
            pictures = crop_back(pictures, width, height)
        settings = {
            "prompt": prompt,
            "negative": negative,
            "width": width,
            "height": height,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "scheduler": scheduler,
            "kv_compression": kv_compression_setting,
            "t5_precision": precision,
            "clean_caption": clean_caption,
            "model": self.checkpoint.path.name,
        }
        images = [_to_image(picture) for picture in pictures]
        return Result(images, latents.cpu(), settings, encoded[0].truncated)

    def plan(
        self, budget: float, width: int, height: int, count: int = 1, guidance_scale: float = 4.5
    ) -> Plan:
        """The plan that `generate` keeps `budget` bytes with; see `planner.plan`, also for what it raises."""
        models = read_models(self.checkpoint, self.components.text_encoder, self.components.vae)
        width, height = self._made_size(width, height, True)
        return make_plan(
            budget,
            width,
            height,
            count,
            models,
            guided=guidance_scale > 1,
            dtype=self.dtype,
            precision=self.text.precision,
            t5_device=None if self.text.place == "auto" else self.text.place,
            transformer_device=self.transformer.place,
            in_ram=self.device.type == "cpu",
        )

    def calibrate(
        self,
        prompts: tuple[str, ...],
        *,
        width: int,
        height: int,
        budget: float = 0.05,
        steps: int = 20,
        guidance_scale: float = 4.5,
        seed: int = 0,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_stage: Callable[[str], None] = lambda name: None,
    ) -> Calibration:
        """Measure how much KV compression the checkpoint bears at a size, see `calibration`.

        Each prompt is drawn with a seed of its own, from `seed`. `budget` is the error allowed, a share of 1.
        """
        check_size(width, height)
        check_settings("dpmpp_2m", steps, guidance_scale)
        width, height = self._made_size(width, height, False)

        on_stage("text encoder")
        (*encoded, negative), _ = self.text.encode((*prompts, ""))
        on_stage("transformer")
        return self.transformer.calibrate(
            prompts,
            encoded,
            negative,
            width,
            height,
            seed,
            budget=budget,
            steps=steps,
            guidance_scale=guidance_scale,
            on_progress=on_progress,
        )

    def _made_size(self, width: int, height: int, use_resolution_binning: bool) -> tuple[int, int]:
        """The size the transformer works at: a bucket of the checkpoint's base, or whole latents."""
        if not use_resolution_binning or self.checkpoint.config.sample_size not in BINNING:
            return -(-width // 8) * 8, -(-height // 8) * 8
        bucket = nearest(width, height, self.base_size, binning=True)
        return bucket.width, bucket.height

    def _check_embeddings(self, embeddings: PromptEmbeddings, negative: str, clean_caption: bool):
        if negative or clean_caption:
            raise SigmaError(
                "Encoded prompts bring their negative prompt and are cleaned or not; leave negative and "
                "clean_caption out."
            )
        expected = self.checkpoint.config.caption_channels
        if embeddings.width != expected:
            raise SigmaError(
                f"The prompt embeddings are {embeddings.width} wide, and {self.checkpoint.path} reads "
                f"{expected}. Encode the prompt with the text encoder that belongs to the transformer."
            )

    def _load_vae(self):
        return load_vae(self.components.vae, dtype=self.dtype, device=self.device)


def _to_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())
