"""The stages in a row: a prompt, its embeddings, latents, pictures. One model in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from . import DEMO
from .aspect_ratio import crop_back
from .choices import DTYPES, T5_PRECISIONS
from .components import Components
from .devices import pick_device, pick_dtype
from .errors import SettingError, SigmaError
from .files.fingerprint import digest
from .files.metadata import Metadata, Model
from .files.pictures import Start, latent_mask
from .memory.stages import Stages
from .noise_schedule import NoiseSchedule
from .planner import Models, Plan
from .planner import plan as make_plan
from .prompt_embeds import Encoded, Prompts
from .refiner import Refiner, check_refiner
from .sampling.denoise import Step, Unfinished, denoise
from .sampling.guidance import guide
from .sampling.noise import get_noise
from .sampling.schedulers import get_step_arguments, get_timesteps, scheduler_for
from .settings import Settings, Ways, check_settings, check_ways
from .text.cache import EmbeddingCache
from .text.embeddings import PromptEmbeddings
from .text.stage import TextStage
from .transformer.checkpoint import Checkpoint
from .transformer.kv_rules import spell
from .transformer.stage import Pass, TransformerStage
from .vae.stage import VAEStage

# Of Ways, what a pipeline has for all its runs.
FIXED = ("device", "dtype", "release", "measure")


@dataclass(frozen=True)
class Result:
    """Pictures, the latents (B, 4, h, w) they came from, all that makes them again, and the prompt's words
    that did not fit."""

    images: list[Image.Image]
    latents: torch.Tensor
    metadata: Metadata
    truncated: str = ""


@dataclass(frozen=True)
class _Prompted:
    """The prompts of a run as the text encoder made them, or as they were given."""

    positive: Encoded
    negative: Encoded | None
    fingerprint: str
    tokenizer: str = ""  # its name, where it is not the encoder's own
    digest: str = ""  # of embeddings that were given, where nobody knows who made them

    def prompts(self, device: torch.device, dtype: torch.dtype) -> Prompts:
        negative = None if self.negative is None else self.negative.prompt_embeds.to(device, dtype)
        return Prompts(self.positive.prompt_embeds.to(device, dtype), None, negative)


@dataclass
class SigmaPipeline:
    """PixArt-Sigma from files on disk. `from_path` finds the components; `generate` runs the stages."""

    components: Components
    ways: Ways
    text: TextStage
    transformer: TransformerStage
    vae: VAEStage
    stages: Stages = field(repr=False)
    refiner: Refiner | None = None

    @classmethod
    def from_path(
        cls,
        path: str | Path = "demo",
        ways: Ways | None = None,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        vae: str | Path | None = None,
        variant: str | None = None,
        noise_schedule: NoiseSchedule | None = None,
        needs_text_encoder: bool = True,
    ) -> "SigmaPipeline":
        """Find the components of "demo" or of a pipeline folder; a component given by itself goes first. A
        transformer "demo-kv" is the demo's, trained with KV compression.

        Nothing is loaded yet. A `dtype` of "auto" is bfloat16 on a GPU that has it, else float16, on a CPU
        float32; a `t5_precision` of None the one that a quantised T5 was saved in, else int8, for the demo
        fp32; a `noise_schedule` of None is the checkpoint's. Without `needs_text_encoder` the prompts must be
        encoded already.
        Raises CheckpointError where a component is missing or is something else.
        """
        folder = DEMO if str(path) == "demo" else Path(path)
        ways = Ways() if ways is None else check_ways(ways)
        components = Components.find(
            folder,
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            variant=variant,
            noise_schedule=noise_schedule,
            needs_text_encoder=needs_text_encoder,
        )
        if ways.t5_precision is None and folder == DEMO and text_encoder is None:
            ways = replace(ways, t5_precision="fp32")
        device = pick_device(ways.device)
        named = DTYPES[ways.dtype]
        dtype = getattr(torch, named) if named else pick_dtype(device)
        stages = Stages(device, ways.release, ways.measure)
        return cls(
            components=components,
            ways=ways,
            text=TextStage(components.text_encoder, components.tokenizer, device, stages),
            transformer=TransformerStage(components.checkpoint, device, dtype, stages),
            vae=VAEStage(components.vae, device, dtype, stages),
            stages=stages,
        )

    def with_refiner(self, path: str | Path) -> "SigmaPipeline":
        """The same pipeline with a second transformer, a file or folder, which takes over at the settings'
        `refiner_start`. Raises SigmaError where it does not fit the first."""
        return replace(self, refiner=Refiner.find(path, self.transformer))

    def apart(self) -> "SigmaPipeline":
        """The same models in stages of their own, each freed after its use: what this one holds stays."""
        stages = Stages(self.device, "free")
        return replace(
            self,
            ways=replace(self.ways, release="free", measure=False),
            stages=stages,
            text=replace(self.text, stages=stages, _held=None),
            transformer=replace(self.transformer, stages=stages, _held_place=""),
            vae=replace(self.vae, stages=stages),
            refiner=self.refiner and self.refiner.within(stages),
        )

    @property
    def device(self) -> torch.device:
        """Where the stages compute."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer and the VAE compute in."""
        return self.transformer.dtype

    @property
    def checkpoint(self) -> Checkpoint:
        """What the transformer's files are."""
        return self.components.checkpoint

    @property
    def base_size(self) -> int:
        """The side, in pixels, of the square that the checkpoint was trained for."""
        return self.checkpoint.config.sample_size * 8

    def encode_prompts(
        self, settings: Settings, ways: Ways | None = None, embedding_cache: EmbeddingCache | None = None
    ) -> PromptEmbeddings:
        """The embeddings of the settings' prompt and negative prompt, ready to save or to give to `generate`.

        T5 is loaded only where `embedding_cache` lacks one of them.
        """
        texts = (check_settings(settings).prompt, settings.negative)
        (positive, negative), encoder, _ = self.text.encode(
            texts, settings, self._run_ways(ways), embedding_cache
        )
        return PromptEmbeddings.made(settings, positive, negative, encoder.precision, encoder.fingerprint)

    def generate(
        self,
        settings: Settings,
        ways: Ways | None = None,
        *,
        embeddings: PromptEmbeddings | None = None,
        image: torch.Tensor | Image.Image | None = None,
        mask: torch.Tensor | Image.Image | None = None,
        embedding_cache: EmbeddingCache | None = None,
        callback: Callable[[Step], bool | None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        on_decode: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Make the pictures that the settings describe; picture k is drawn from the k-th noise of the seed.

        ways: how this run computes, where it differs from the pipeline's own; with a budget the planner
        chooses. A stage that runs out of memory is released and runs once more in its next smaller way.
        embeddings: encoded prompts, which bring their words, so that the settings have none, and need no T5;
        nor do texts that `embedding_cache` holds. image, of Pillow or (3, H, W) in [0, 1]: start from this
        picture, by the settings' strength, instead of from noise alone. mask, of Pillow or (1, H, W): paint
        the picture anew where it is white, 1, and keep the rest as the VAE renders it. callback is called
        after each step, on_stage(name) before each stage, on_decode(done, total) while strips are decoded.
        Raises SigmaError before any model is loaded where something can be known to be wrong.
        """
        ways = self._run_ways(ways)
        settings = check_settings(settings).complete(self.base_size)
        start = Start.of(image, mask)
        check_refiner(self.refiner, settings, ways, self.transformer)
        settings, fingerprints = self._check(settings, embeddings, start), self._fingerprints()
        if ways.budget is not None:
            ways = self.plan(settings, ways).ways
        stage = on_stage or (lambda name: None)

        if embeddings is None:
            stage("text encoder")
            prompted, ways = self._encode(settings, ways, embedding_cache)
        else:
            prompted, settings, ways = _given(embeddings, settings, ways)
        image_latents = None
        if start.image is not None:
            stage("VAE encode")
            image_latents = self._encode_image(start.image, settings)
        stage("transformer")
        latents, ways = self._denoise(settings, ways, prompted, image_latents, start.mask, callback)
        stage("VAE decode")
        pictures, ways = self.vae.decode(latents, ways, on_decode or (lambda done, total: None))
        pictures = crop_back(pictures, *settings.asked_size(self.base_size))

        fingerprints["text_encoder"] = prompted.fingerprint
        metadata = Metadata(
            settings=settings,
            ways=replace(ways, device=str(self.device), dtype=_dtype_name(self.dtype)),
            models=self._models(fingerprints, prompted.tokenizer),
            image_sha256=start.image_sha256,
            mask_sha256=start.mask_sha256,
            embeddings_sha256=prompted.digest,
            variant=self.checkpoint.variant,
            noise_schedule=self.checkpoint.noise_schedule,
        )
        return Result(list(map(_to_image, pictures)), latents.cpu(), metadata, prompted.positive.truncated)

    def plan(self, settings: Settings, ways: Ways | None = None) -> Plan:
        """The plan that `generate` keeps `ways.budget` bytes with; see `planner.plan`, also for what it
        raises."""
        found = self.components
        return make_plan(
            settings,
            self._run_ways(ways),
            Models.read(found.checkpoint, found.text_encoder, found.vae),
            dtype=self.dtype,
            in_ram=self.device.type == "cpu",
        )

    def fingerprints(self) -> dict[str, str]:
        """What the files of each component are known by; of T5 only where it can be used."""
        found = self._fingerprints()
        encoder = self.text.identify(self.ways.t5_precision)
        return found | ({"text_encoder": encoder.fingerprint} if encoder else {})

    def _fingerprints(self) -> dict[str, str]:
        return self.components.fingerprints() | (self.refiner.fingerprints() if self.refiner else {})

    def _models(self, fingerprints: dict[str, str], tokenizer: str) -> dict[str, Model]:
        names = self.components.names() | (self.refiner.names() if self.refiner else {})
        if tokenizer:  # the text encoder's fingerprint covers it
            names["tokenizer"], fingerprints = tokenizer, fingerprints | {"tokenizer": ""}
        return {component: Model(names.get(component, ""), sha) for component, sha in fingerprints.items()}

    def _run_ways(self, ways: Ways | None) -> Ways:
        if ways is None:
            return self.ways
        check_ways(ways)
        for name in FIXED:
            if getattr(ways, name) != getattr(self.ways, name):
                raise SettingError(
                    name,
                    repr(getattr(ways, name)),
                    f"the pipeline has {getattr(self.ways, name)!r} for all its runs; make another with "
                    "SigmaPipeline.from_path",
                )
        if ways.t5_precision is None:
            ways = replace(ways, t5_precision=self.ways.t5_precision)
        return ways

    def _check(self, settings: Settings, embeddings: PromptEmbeddings | None, start: Start) -> Settings:
        """The settings with what speed and KV compression come to, once all is known to fit together."""
        if start.image is None and settings.strength != 1:
            raise SettingError("strength", settings.strength, "there is no picture to start from")
        if embeddings is not None:
            _check_embeddings(embeddings, settings, self.checkpoint)
        settings = self.transformer.at_speed(settings)
        scheduler = scheduler_for(settings, self.checkpoint.noise_schedule)
        get_step_arguments(scheduler, None, settings.eta, settings.count)
        get_timesteps(scheduler, settings)
        size = settings.made_size(self.base_size)
        rules = self.transformer.kv_compression(settings.kv_compression, *size)
        if self.refiner:
            self.refiner.stage.kv_compression(settings.kv_compression, *size)
        if settings.kv_compression == "auto" or str(settings.kv_compression).endswith(".json"):
            settings = replace(settings, kv_compression=spell(rules))  # what it is today
        return settings

    def _encode(self, settings: Settings, ways: Ways, cache: EmbeddingCache | None) -> tuple[_Prompted, Ways]:
        texts = (settings.prompt, settings.negative) if settings.uses_negative else (settings.prompt,)
        encoded, encoder, ways = self.text.encode(texts, settings, ways, cache)
        positive, *negative = encoded
        unwanted = negative[0] if negative else None
        return _Prompted(positive, unwanted, encoder.fingerprint, encoder.tokenizer), ways

    def _encode_image(self, image: torch.Tensor, settings: Settings) -> torch.Tensor:
        picture = crop_back(image[None], *settings.made_size(self.base_size))
        return self.vae.encode(picture).repeat(settings.count, 1, 1, 1)

    def _denoise(
        self,
        settings: Settings,
        ways: Ways,
        prompted: _Prompted,
        image_latents: torch.Tensor | None,
        mask: torch.Tensor | None,
        callback: Callable[[Step], bool | None] | None,
    ) -> tuple[torch.Tensor, Ways]:
        width, height = settings.made_size(self.base_size)
        painted = None if mask is None else latent_mask(mask, width, height)
        generator = torch.Generator().manual_seed(settings.seed)
        channels = self.checkpoint.config.in_channels
        noise = get_noise(settings.count, height, width, generator, self.dtype, self.device, channels)
        prompts = prompted.prompts(self.device, self.dtype)
        work = Pass(height, width, settings.count, settings.guided)

        def part(begun: torch.Tensor | Unfinished, on_step, stage: TransformerStage, ways: Ways):
            state = generator.get_state()  # for a smaller way, where memory runs out

            def use(transformer, in_turn: bool) -> torch.Tensor:
                return denoise(
                    guide(transformer, prompts, settings, in_turn, self.checkpoint.noise_schedule),
                    begun,
                    settings,
                    noise_schedule=self.checkpoint.noise_schedule,
                    image_latents=image_latents,
                    mask=painted,
                    generator=generator.set_state(state),
                    callback=on_step,
                )

            return stage.run(use, work, ways)

        if self.refiner is None:
            return part(noise, callback, self.transformer, ways)
        switch = settings.refiner_step - settings.skipped_steps
        return self.refiner.run_after(self.transformer, part, noise, switch, ways, callback)


def _given(embeddings: PromptEmbeddings, settings: Settings, ways: Ways) -> tuple[_Prompted, Settings, Ways]:
    """Prompts that are encoded already, and what they decide."""
    unknown = "" if embeddings.fingerprint else digest(embeddings.positive, embeddings.negative)
    prompted = _Prompted(
        Encoded(embeddings.positive, embeddings.positive_truncated),
        Encoded(embeddings.negative, embeddings.negative_truncated) if settings.uses_negative else None,
        embeddings.fingerprint,
        digest=unknown,
    )
    settings = replace(
        settings,
        prompt=embeddings.positive_text,
        negative=embeddings.negative_text,
        clean_caption=embeddings.clean_caption,
        max_sequence_length=embeddings.max_sequence_length,
    )
    precision = embeddings.precision if embeddings.precision in T5_PRECISIONS else None
    return prompted, settings, replace(ways, t5_precision=precision)


def _check_embeddings(embeddings: PromptEmbeddings, settings: Settings, checkpoint: Checkpoint) -> None:
    if not isinstance(embeddings, PromptEmbeddings):
        raise SigmaError(
            f"embeddings is a {type(embeddings).__name__}; give PromptEmbeddings, such as "
            "PromptEmbeddings.load(file)."
        )
    if settings != settings.without_prompts():
        raise SigmaError(
            "Encoded prompts bring their words, cleaned or not and cut already; leave prompt, negative, "
            "clean_caption and max_sequence_length out."
        )
    expected = checkpoint.config.caption_channels
    if embeddings.width != expected:
        raise SigmaError(
            f"The prompt embeddings are {embeddings.width} wide, and {checkpoint.path} reads "
            f"{expected}. Encode the prompt with the text encoder that belongs to the transformer."
        )


def _dtype_name(dtype: torch.dtype) -> str:
    named = str(dtype).removeprefix("torch.")
    return next(name for name, value in DTYPES.items() if value == named)


def _to_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())
