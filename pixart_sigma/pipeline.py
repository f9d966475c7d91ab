"""The stages in a row: a prompt, its embeddings, latents, pictures. One model in memory at a time."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import DEMO
from .aspect_ratio import BINNING, check_size, crop_back, nearest
from .calibration import Calibration, calibrate, find_calibrated, fingerprint_of
from .caption_cleaning import prepare_prompt
from .checkpoint import Checkpoint, find_components, inspect, load_transformer_state_dict
from .embeddings import EmbeddingCache, EncoderIdentity, PromptEmbeddings, cache_key, identify
from .errors import CheckpointError, SigmaError
from .kv_compression import KVCompression, resolve
from .memory import Stages
from .planner import Plan, read_models
from .planner import plan as make_plan
from .sampling import Step, check_settings, denoise, get_noise
from .schedulers import default_guidance
from .text_encoder import Encoded, TextEncoder, pad_embeds
from .text_streaming import STREAMED
from .transformer import load_transformer
from .vae import decode, encode, load_vae

T5_PLACES = {"auto": "on the device", "stream": "streamed", "cpu": "on the CPU"}
TRANSFORMER_PLACES = ("auto", "stream")


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

    checkpoint: Checkpoint
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path
    device: torch.device
    dtype: torch.dtype
    t5_precision: str | None
    t5_device: str
    transformer_device: str
    stages: Stages = field(repr=False)
    _held_encoder: EncoderIdentity | None = field(default=None, repr=False)
    _held_transformer_place: str = field(default="", repr=False)

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
        """Find the components of "demo" or of a pipeline folder; a component given by itself goes first.

        Nothing is loaded yet. `t5_precision` defaults to the one a quantised T5 was saved in, else to int8,
        for the demo to fp32; `dtype` of the transformer and the VAE to bfloat16 on a GPU that has it, else
        float16, on a CPU to float32. `t5_device` "stream" passes T5 through the device block by block, "cpu"
        leaves the device to the other stages. `transformer_device` "stream" passes the transformer's blocks
        through the device. Without `needs_text_encoder` the prompts must be encoded already.
        Raises CheckpointError where a component is missing or is something else.
        """
        folder = DEMO if str(path) == "demo" else Path(path)
        checkpoint = inspect(transformer or folder, variant=variant)
        components = find_components(folder)
        needed = [("text_encoder", text_encoder)] if needs_text_encoder else []
        for name, given in (*needed, ("vae", vae)):
            if given is None and name not in components:
                option = "--" + name.replace("_", "-")
                raise CheckpointError(
                    f"{folder} has no {name}: give a whole pipeline folder, or the file with {option}."
                )
        device = _device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else _half(device)
        if t5_precision is None and folder == DEMO and text_encoder is None:
            t5_precision = "fp32"
        return cls(
            checkpoint=checkpoint,
            text_encoder=Path(text_encoder) if text_encoder else components.get("text_encoder"),
            # The demo's tokenizer knows 128 words, and no other encoder means them.
            tokenizer=None
            if text_encoder and (folder == DEMO or _has_tokenizer(Path(text_encoder)))
            else components.get("tokenizer"),
            vae=Path(vae) if vae else components["vae"],
            device=device,
            dtype=dtype,
            t5_precision=t5_precision,
            t5_device=_check_place("t5_device", t5_device, T5_PLACES),
            transformer_device=_check_place("transformer_device", transformer_device, TRANSFORMER_PLACES),
            stages=Stages(device, release, measure),
        )

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
        (positive, unwanted), encoder = self.encode_texts((prompt, negative), clean_caption, embedding_cache)
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
        rules = self._kv_compression(kv_compression_setting, made_width, made_height)
        stage = on_stage or (lambda name: None)

        text_settings = {}
        if plan is not None:
            decode_how, decode_budget = plan.decode_how, plan.decode_budget or None
            text_settings = {"precision": plan.t5_precision, "place": plan.t5_device}
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
            encoded, encoder = self.encode_texts(texts, clean_caption, embedding_cache, **text_settings)
            precision = encoder.precision
        image_latents = None
        if image is not None:
            stage("VAE encode")
            picture = crop_back(image[None], made_width, made_height)
            image_latents = self.stages.run("VAE encode", self._load_vae, lambda vae: encode(vae, picture))
            image_latents = image_latents.repeat(count, 1, 1, 1)

        generator = torch.Generator().manual_seed(seed)
        latents = get_noise(
            count,
            made_height,
            made_width,
            generator,
            self.dtype,
            self.device,
            self.checkpoint.config.in_channels,
        )
        stage("transformer")
        embeds, mask = pad_embeds([encoded[0].prompt_embeds] * count)
        negative_embeds = negative_mask = None
        if guidance_scale > 1:
            negative_embeds, negative_mask = pad_embeds([encoded[1].prompt_embeds] * count)
            negative_embeds = negative_embeds.to(self.device, self.dtype)
        embeds, noise = embeds.to(self.device, self.dtype), latents
        state = generator.get_state()

        def run_denoise(place: str, guidance_in_turn: bool):
            def use(transformer):
                return denoise(
                    transformer,
                    noise,
                    embeds,
                    mask,
                    negative_embeds,
                    negative_mask,
                    scheduler=scheduler,
                    steps=steps,
                    guidance_scale=guidance_scale,
                    timesteps=timesteps,
                    sigmas=sigmas,
                    strength=strength,
                    image_latents=image_latents,
                    generator=generator.set_state(state),
                    eta=eta,
                    kv_compression=rules,
                    guidance_in_turn=guidance_in_turn,
                    callback=callback,
                )

            return self._run_transformer(place, use)

        place, in_turn = self.transformer_device, False
        if plan is not None:
            place, in_turn = plan.transformer_device, plan.guidance_in_turn
        ways = self._denoising_ways(run_denoise, place, in_turn, negative_embeds is not None)
        latents = _first_that_fits("transformer", ways)

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
        models = read_models(self.checkpoint, self.text_encoder, self.vae)
        width, height = self._made_size(width, height, True)
        return make_plan(
            budget,
            width,
            height,
            count,
            models,
            guided=guidance_scale > 1,
            dtype=self.dtype,
            precision=self.t5_precision,
            t5_device=None if self.t5_device == "auto" else self.t5_device,
            transformer_device=self.transformer_device,
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

        def load_text_encoder():
            return self._load_text_encoder(self.t5_precision, self.t5_device)

        def encode_all(text_encoder: TextEncoder):
            return [text_encoder.encode(prompt).prompt_embeds for prompt in (*prompts, "")]

        on_stage("text encoder")
        *embeds, negative = self.stages.run(
            "text encoder", load_text_encoder, encode_all, self.t5_device == "cpu"
        )

        def measure(transformer):
            def place(tensor):
                return tensor.to(self.device, self.dtype)

            channels = self.checkpoint.config.in_channels
            noise = [
                get_noise(1, height, width, seed + index, self.dtype, self.device, channels)
                for index in range(len(prompts))
            ]
            runs = [
                (latents, place(positive), place(negative))
                for latents, positive in zip(noise, embeds, strict=True)
            ]
            return calibrate(
                transformer,
                runs,
                prompts,
                budget=budget,
                steps=steps,
                guidance_scale=guidance_scale,
                on_progress=on_progress,
            )

        on_stage("transformer")
        return self._run_transformer(self.transformer_device, measure)

    def _kv_compression(self, setting: str | None, width: int, height: int) -> tuple[KVCompression, ...]:
        """The rules of a run. Raises SigmaError where the setting does not fit the checkpoint."""
        checkpoint = self.checkpoint

        def fingerprint():
            return fingerprint_of(load_transformer_state_dict(checkpoint))

        if setting is not None and setting.endswith(".json"):
            calibration = Calibration.read(Path(setting))
            if not calibration.fits(fingerprint()):
                raise SigmaError(
                    f"{setting} was measured on another checkpoint than {checkpoint.path}; calibrate it."
                )
            return resolve(calibration.rules, checkpoint.config, height, width)
        calibrated = find_calibrated(checkpoint.path, fingerprint) if setting == "auto" else None
        return resolve(setting, checkpoint.config, height, width, calibrated)

    def _made_size(self, width: int, height: int, use_resolution_binning: bool) -> tuple[int, int]:
        """The size the transformer works at: a bucket of the checkpoint's base, or whole latents."""
        if not use_resolution_binning or self.checkpoint.config.sample_size not in BINNING:
            return -(-width // 8) * 8, -(-height // 8) * 8
        bucket = nearest(width, height, self.base_size, binning=True)
        return bucket.width, bucket.height

    def encode_texts(
        self,
        texts: tuple[str, ...],
        clean_caption: bool,
        cache: EmbeddingCache | None,
        precision: str | None = None,
        place: str | None = None,
    ) -> tuple[list[Encoded], EncoderIdentity]:
        """What T5 makes of each text, and which T5; it is loaded only for what `cache` lacks.

        T5 runs in the pipeline's precision and place unless others are given; where memory runs out it is
        streamed, and if that is not possible or not enough, it runs on the CPU.
        """
        precision, place = precision or self.t5_precision, place or self.t5_device
        encoder = self._held_encoder or self._identify(precision)
        keys: list[str | None] = [None] * len(texts)
        if cache is not None and encoder is not None:
            prepared = [prepare_prompt(text, clean_caption) for text in texts]
            keys = [cache_key(encoder, self._device_of(place), text=text) for text in prepared]
        found = [key and cache.get(key) for key in keys]
        if all(found):
            return found, encoder

        def encode_missing(text_encoder: TextEncoder):
            encoded = [
                known or text_encoder.encode(text, clean_caption=clean_caption)
                for text, known in zip(texts, found, strict=True)
            ]
            return encoded, text_encoder.precision

        def run_in(place: str):
            load = partial(self._load_text_encoder, precision, place)
            return self.stages.run("text encoder", load, encode_missing, on_cpu=place == "cpu")

        places = [place]
        if self.device.type != "cpu":
            streamable = encoder is None or encoder.precision in STREAMED
            smaller = ("stream", "cpu") if streamable else ("cpu",)
            places += [other for other in smaller if place not in (other, "cpu")]
        ways = {T5_PLACES[place]: partial(run_in, place) for place in places}
        encoded, loaded_precision = _first_that_fits("text encoder", ways)
        encoder = encoder or EncoderIdentity("", loaded_precision)
        if self.stages.release != "free":
            self._held_encoder = encoder  # whatever its files are by the next run
        for key, known, new in zip(keys, found, encoded, strict=True):
            if key and known is None:
                cache.put(key, new)
        return encoded, encoder

    def _identify(self, precision: str | None) -> EncoderIdentity | None:
        """The T5 that will be loaded; None where its files are unusable, which loading it says better."""
        if self.text_encoder is None:
            return None
        try:
            return identify(self.text_encoder, self.tokenizer, precision)
        except (SigmaError, OSError):
            return None

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

    def _device_of(self, place: str) -> torch.device:
        return torch.device("cpu") if place == "cpu" else self.device

    def _load_text_encoder(self, precision: str | None, place: str):
        if self.text_encoder is None:
            raise CheckpointError("This pipeline has no text encoder; give it encoded prompts.")
        return TextEncoder.load(
            self.text_encoder,
            tokenizer=self.tokenizer,
            precision=precision,
            device=self._device_of(place),
            stream=place == "stream",
        )

    def _denoising_ways(
        self, run: Callable[[str, bool], torch.Tensor], place: str, in_turn: bool, guided: bool
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """run(place, guidance in turn) as it is asked for, then in smaller ways."""
        ways = {}
        for other in dict.fromkeys((place, place if self.device.type == "cpu" else "stream")):
            suffix = ", streamed" if other == "stream" else ""
            if not (guided and in_turn and other == place):
                ways["one pass" + suffix] = partial(run, other, False)
            if guided:
                ways["prompt and negative in turn" + suffix] = partial(run, other, True)
        return ways

    def _run_transformer(self, place: str, use: Callable[[Any], Any]) -> Any:
        """use(transformer), the transformer in this place, also where another run left it in another one."""
        if self._held_transformer_place != place:
            self.stages.drop("transformer")
        self._held_transformer_place = place
        return self.stages.run("transformer", partial(self._load_transformer, place), use)

    def _load_transformer(self, place: str):
        return load_transformer(
            self.checkpoint, dtype=self.dtype, device=self.device, stream=place == "stream"
        )

    def _load_vae(self):
        return load_vae(self.vae, dtype=self.dtype, device=self.device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SigmaError(f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _first_that_fits(stage: str, ways: dict[str, Callable[[], Any]]) -> Any:
    """What the first way gives that does not run out of memory; SigmaError after the last."""
    for number, (name, run) in enumerate(ways.items(), start=1):
        try:
            return run()
        except torch.OutOfMemoryError:
            following = list(ways)[number : number + 1]
            logging.getLogger(__name__).warning(
                f"Memory ran out in the {stage} ({name})."
                + "".join(f" It is released and runs again: {way}." for way in following)
            )
    raise SigmaError(
        f"Memory ran out in the {stage}. Close other programs or make a smaller picture; `pixart-sigma plan` "
        "says what each stage needs."
    )


def _check_place(name: str, place: str, places: Iterable[str]) -> str:
    if place not in places:
        raise SigmaError(f"{name} is {place!r}; choose one of {', '.join(places)}.")
    return place


def _half(device: torch.device) -> torch.dtype:
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in ("tokenizer", "spiece.model", "tokenizer.json"))


def _to_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())
