"""The stages in a row: a prompt, its embeddings, latents, pictures. One model in memory at a time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from . import DEMO
from .adapter_files import AdapterFile
from .aspect_ratio import crop_back
from .choices import DTYPES
from .components import Components
from .devices import dtype_name, pick_device, pick_dtype
from .errors import SettingError
from .files.metadata import Metadata, Model
from .files.pictures import NO_PICTURE, Start, to_pillow
from .memory.stages import Stages
from .noise_schedule import NoiseSchedule
from .planner import Models, Plan
from .planner import plan as make_plan
from .refiner import Refiner, check_refiner
from .run_inputs import NOTHING_GIVEN, GivenPictures, Prompted, as_prompted, check_embeddings
from .runs import Run, denoise_runs
from .sampling.denoise import Step
from .sampling.schedulers import get_step_arguments, get_timesteps, scheduler_for
from .settings import Settings, Ways, check_settings, check_ways
from .text.cache import EmbeddingCache
from .text.embeddings import PromptEmbeddings
from .text.stage import TextStage
from .transformer.checkpoint import Checkpoint
from .transformer.config import TransformerConfig
from .transformer.control_pictures import ControlPicture, check_controls
from .transformer.kv_rules import spell
from .transformer.stage import TransformerStage
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
        transformer "demo-kv" is the demo's, trained with KV compression, "demo-phased" that for four steps.

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

    def with_adapters(self, adapters: Iterable[AdapterFile | str | Path]) -> "SigmaPipeline":
        """The same models, with adapters (LoRA and its kin; files or folders, or `AdapterFile` with a
        strength) that change the transformer's weights, and T5's, in this order. This pipeline stays as it
        is. Weights of T5 that are saved in 8 or 4 bit are not changed, which `components.text_notices` says.

        Raises CheckpointError for an adapter that does not fit the transformer, or T5.
        """
        components = self.components.with_adapters(adapters)
        changed = self._with_stages(Stages(self.device, self.ways.release, self.ways.measure))
        transformer = replace(changed.transformer, adapters=components.adapters)
        text = replace(changed.text, changes=components.text_changes)
        return replace(changed, components=components, text=text, transformer=transformer)

    def with_refiner(self, path: str | Path) -> "SigmaPipeline":
        """The same pipeline with a second transformer, a file or folder, which takes over at the settings'
        `refiner_start`. Raises SigmaError where it does not fit the first."""
        return replace(self, refiner=Refiner.find(path, self.transformer))

    def apart(self) -> "SigmaPipeline":
        """The same models in stages of their own, each freed after its use: what this one holds stays."""
        apart = self._with_stages(Stages(self.device, "free"))
        return replace(apart, ways=replace(self.ways, release="free", measure=False))

    def _with_stages(self, stages: Stages) -> "SigmaPipeline":
        return replace(
            self,
            stages=stages,
            text=replace(self.text, stages=stages, _held=None, _held_way=("", "")),
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
        controls: Iterable[ControlPicture] = (),
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
        it anew where this is white, 1, and keep the rest as the VAE renders it. controls: for ControlNets.
        callback is called after each step, on_stage(name) before a stage, on_decode(done, total) in strips.
        Raises SigmaError before any model is loaded where something can be known to be wrong.
        """
        start = Start.of(image, mask)
        controls = tuple(controls)
        settings, ways = self.settle(settings, ways, embeddings=embeddings, start=start, controls=controls)
        fingerprints = self._fingerprints()
        followed = tuple(control.describe() for control in controls)  # which reads their weights
        stage = on_stage or (lambda name: None)

        if embeddings is None:
            stage("text encoder")
            prompted, ways = self.encode(settings, ways, embedding_cache)
        else:
            prompted, settings, ways = as_prompted(embeddings, settings, ways)
        given = self._encode_pictures(start, controls, settings, stage)
        stage("transformer")
        latents, ways = self.denoise([Run(settings, prompted)], ways, given, callback)
        stage("VAE decode")
        images, ways = self.decode(latents, settings, ways, on_decode)
        fingerprints["text_encoder"] = prompted.fingerprint
        metadata = self.describe(settings, ways, fingerprints, prompted.tokenizer)
        metadata = replace(
            metadata,
            image_sha256=start.image_sha256,
            mask_sha256=start.mask_sha256,
            embeddings_sha256=prompted.digest,
            controls=followed,
        )
        return Result(images, latents.cpu(), metadata, prompted.positive.truncated)

    def settle(
        self,
        settings: Settings,
        ways: Ways | None = None,
        *,
        embeddings: PromptEmbeddings | None = None,
        start: Start = NO_PICTURE,
        controls: Iterable[ControlPicture] = (),
    ) -> tuple[Settings, Ways]:
        """The settings with nothing left open, and the ways, which a budget has planned, as `generate` runs
        them. Raises SigmaError where something can be known to be wrong; no model is loaded."""
        ways = self._run_ways(ways)
        settings = check_settings(settings).complete(self.base_size)
        controls = check_controls(controls, self._configs())
        check_refiner(self.refiner, settings, ways, self.transformer)
        settings = self._check(settings, embeddings, start)
        return settings, self._within_budget(settings, ways, start, controls)

    def encode(
        self, settings: Settings, ways: Ways, cache: EmbeddingCache | None = None
    ) -> tuple[Prompted, Ways]:
        """The prompts of settled settings as T5 makes them, and the ways as it ran; it is loaded for what
        `cache` lacks."""
        encoded, encoder, ways = self.text.encode(settings.texts, settings, ways, cache)
        positive, *negative = encoded
        unwanted = negative[0] if negative else None
        return Prompted(positive, unwanted, encoder.fingerprint, encoder.tokenizer), ways

    def denoise(
        self,
        runs: Sequence[Run],
        ways: Ways,
        given: GivenPictures = NOTHING_GIVEN,
        callback: Callable[[Step], bool | None] | None = None,
    ) -> tuple[torch.Tensor, Ways]:
        """The latents (B, 4, h, w) of runs with settled settings, one after the other, and the ways as the
        transformer ran. Several runs differ in their prompts and seeds alone, and go through it together."""
        return denoise_runs(runs, ways, given, self.transformer, self.refiner, callback)

    def decode(
        self,
        latents: torch.Tensor,
        settings: Settings,
        ways: Ways,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Image.Image], Ways]:
        """The pictures of latents, as large as settled settings ask, and the ways with what the decode came
        to. on_progress(done, total) is called between strips."""
        pictures, ways = self.vae.decode(latents, ways, on_progress or (lambda done, total: None))
        pictures = crop_back(pictures, *settings.asked_size(self.base_size))
        return list(map(to_pillow, pictures)), ways

    def describe(
        self, settings: Settings, ways: Ways, fingerprints: dict[str, str], tokenizer: str = ""
    ) -> Metadata:
        """All that makes a picture from words alone again, of models with these fingerprints. tokenizer: its
        name, where it is not T5's own."""
        return Metadata(
            settings=settings,
            ways=replace(ways, device=str(self.device), dtype=dtype_name(self.dtype)),
            models=self._models(fingerprints, tokenizer),
            **self.components.said_of_transformer,
        )

    def plan(
        self,
        settings: Settings,
        ways: Ways | None = None,
        *,
        controlnets: Iterable[str | Path] = (),
        from_picture: bool = False,
    ) -> Plan:
        """The plan that `generate` keeps `ways.budget` bytes with, of a run with these files of ControlNets;
        see `planner.plan`, also for what it raises."""
        found = self.components
        models = Models.read(found.checkpoint, found.text_encoder, found.vae)
        return make_plan(
            settings,
            self._run_ways(ways),
            models.with_controlnets(controlnets),
            dtype=self.dtype,
            in_ram=self.device.type == "cpu",
            from_picture=from_picture,
        )

    def _within_budget(
        self, settings: Settings, ways: Ways, start: Start, controls: tuple[ControlPicture, ...]
    ) -> Ways:
        if ways.budget is None:
            return ways
        files = [control.controlnet for control in controls]
        return self.plan(settings, ways, controlnets=files, from_picture=start.image is not None).ways

    def fingerprints(self) -> dict[str, str]:
        """What the files of each component are known by; of T5 only where it can be used."""
        found = self._fingerprints()
        encoder = self.text.identify(self.ways.t5_precision)
        return found | ({"text_encoder": encoder.fingerprint} if encoder else {})

    def _fingerprints(self) -> dict[str, str]:
        return self.components.fingerprints() | (self.refiner.fingerprints() if self.refiner else {})

    def _configs(self) -> list[TransformerConfig]:
        """Of the transformers of a run."""
        second = [self.refiner.stage.checkpoint] if self.refiner else []
        return [checkpoint.config for checkpoint in (self.checkpoint, *second)]

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
            check_embeddings(embeddings, settings, self.checkpoint)
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

    def _encode_pictures(
        self,
        start: Start,
        controls: tuple[ControlPicture, ...],
        settings: Settings,
        stage: Callable[[str], None],
    ) -> GivenPictures:
        if start.image is not None or controls:
            stage("VAE encode")

        def encode(image: torch.Tensor) -> torch.Tensor:
            return self.vae.encode(crop_back(image[None], *settings.made_size(self.base_size)))

        image_latents = None if start.image is None else encode(start.image).repeat(settings.count, 1, 1, 1)
        controlled = tuple((control, encode(control.image)) for control in controls)
        return GivenPictures(image_latents, start.mask, controlled)
