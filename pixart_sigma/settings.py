"""What a run makes and how it runs: two objects that are checked when they are made.

Nothing here imports torch, so that a mistake is known at once.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .aspect_ratio import BINNING, check_side, nearest
from .choices import (
    DECODES,
    DTYPES,
    MAX_SEQUENCE_LENGTH,
    MAX_STEPS,
    RELEASES,
    SCHEDULERS,
    T5_DEVICES,
    T5_PRECISIONS,
    TRANSFORMER_DEVICES,
)
from .errors import SettingError, SigmaError
from .noise_schedule import SPACINGS
from .recipes import FewStepRecipe, check_alone, parse_recipe
from .setting_checks import (
    check_count,
    check_seed,
    check_sigmas,
    check_switches,
    check_texts,
    check_timesteps,
    check_whole,
    check_word,
    is_finite,
)
from .speed import FEW_STEPS, Savings
from .speed import parse as parse_speed


@dataclass(frozen=True)
class Settings:
    """Which picture: all that decides it, apart from the models, a picture to start from and encoded prompts.

    width, height: pixels; None is the checkpoint's base.
    binning: the transformer works at the trained size nearest in shape, and the picture is scaled and cropped
        to the asked size, as the reference pipeline does.
    count: pictures; number k starts from the k-th noise of the seed.
    guidance_scale: 1 or less is none; None is the scheduler's own.
    timesteps, sigmas: in place of steps, where the scheduler takes them; highest first.
    eta: ddim's share of fresh noise, 0 to 1.
    recipe: how weights that were distilled to few steps are run, by its name or spelling in `recipes`; it
        decides the steps and the scheduler, and there is no guidance.
    strength: how much of a picture to start from is forgotten, above 0 and at most 1.
    kv_compression: as on the command line; None is as the checkpoint was trained.
    speed: which steps are forecast from those before, as on the command line; None is none.
    spacing: where the steps lie in the noise schedule; None is the checkpoint's own.
    nag_scale: without guidance, how far attention goes away from the negative prompt (normalised attention
        guidance), above 1; None leaves the negative prompt out.
    clean_caption: clean the prompts as the training captions were.
    max_sequence_length: how many tokens of a prompt are read, end token included. The model was trained with
        300.
    refiner_start: the share of the steps after which a second transformer takes over, between 0 and 1; None
        is a run of one.

    Raises SettingError, naming the first field that is wrong.
    """

    prompt: str = ""
    negative: str = ""
    width: int | None = None
    height: int | None = None
    binning: bool = True
    count: int = 1
    seed: int = 0
    steps: int = 20
    guidance_scale: float | None = None
    scheduler: str = "dpmpp_2m"
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float = 0.0
    strength: float = 1.0
    kv_compression: str | None = None
    speed: str | None = None
    spacing: str | None = None
    clean_caption: bool = False
    max_sequence_length: int = MAX_SEQUENCE_LENGTH
    recipe: str | None = None
    nag_scale: float | None = None
    refiner_start: float | None = None

    def __post_init__(self):
        check_texts(self, "prompt", "negative")
        check_switches(self, "binning", "clean_caption")
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None:
                _set(self, name, check_side(name, side))
        _set(self, "count", check_count(self.count))
        _set(self, "seed", check_seed(self.seed))
        advice = f"give a whole number from 1 to {MAX_STEPS}"
        _set(self, "steps", check_whole("steps", self.steps, 1, MAX_STEPS, advice))
        advice = "give a whole number of tokens, such as 300"
        _set(
            self,
            "max_sequence_length",
            check_whole("max_sequence_length", self.max_sequence_length, 1, None, advice),
        )
        if self.guidance_scale is not None and not is_finite(self.guidance_scale):
            raise SettingError(
                "guidance_scale", self.guidance_scale, "give a finite number such as 4.5, or 1 for none"
            )
        check_word(self, "scheduler", SCHEDULERS)
        if self.recipe is not None:
            _set(self, "recipe", check_alone(self))
        _check_schedule(self)
        if not is_finite(self.strength) or not 0 < self.strength <= 1:
            raise SettingError("strength", self.strength, "give a number above 0, and at most 1")
        if int(self.schedule_length * self.strength) < 1:
            steps = f"of {self.schedule_length} steps it leaves none, so raise "
            raise SettingError(
                "strength", self.strength, steps + ("one of them" if self.recipe is None else "it")
            )
        if self.kv_compression is not None:
            check_texts(self, "kv_compression")
        if self.speed is not None:
            _check_speed(self, self.speed)
        if self.spacing is not None:
            check_word(self, "spacing", SPACINGS)
        _check_nag_scale(self)
        _check_refiner_start(self)

    @property
    def guidance(self) -> float:
        """The guidance scale, the scheduler's own where none is given; with a recipe there is none."""
        own = SCHEDULERS[self.scheduler].guidance_scale if self.recipe is None else 1.0
        return own if self.guidance_scale is None else self.guidance_scale

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance."""
        return self.guidance > 1

    @property
    def speed_is_open(self) -> bool:
        """Whether the checkpoint decides what `speed` comes to: it is auto, or a file of calibrate."""
        return self.speed is not None and (self.speed == "auto" or self.speed.endswith(".json"))

    @property
    def savings(self) -> Savings:
        """What `speed` says. Raises SigmaError where the checkpoint is still to decide that."""
        return () if self.speed is None else parse_speed(self.speed)

    @property
    def few_step(self) -> FewStepRecipe | None:
        """What `recipe` says."""
        return None if self.recipe is None else parse_recipe(self.recipe)

    @property
    def uses_negative(self) -> bool:
        """Whether the negative prompt is used."""
        return self.guided or self.nag_scale is not None

    @property
    def texts(self) -> tuple[str, ...]:
        """What the text encoder is asked for."""
        return (self.prompt, self.negative) if self.uses_negative else (self.prompt,)

    @property
    def alike(self) -> "Settings":
        """These settings without what may differ between runs that go through the transformer together."""
        return replace(self.without_prompts(), seed=0)

    @property
    def schedule_length(self) -> int:
        """The steps of a run from pure noise."""
        if self.few_step is not None:
            return len(self.few_step.timesteps)
        if self.timesteps is not None:
            return len(self.timesteps)
        if self.sigmas is not None:
            return len(self.sigmas) - 1
        return 1 if self.scheduler == "one_step" else self.steps

    @property
    def skipped_steps(self) -> int:
        """The first steps of a run from pure noise that `strength` leaves out."""
        return self.schedule_length - int(self.schedule_length * self.strength)

    @property
    def refiner_step(self) -> int:
        """The first step of the second transformer, of a run from pure noise; after them all without one."""
        if self.refiner_start is None:
            return self.schedule_length
        return round(self.schedule_length * self.refiner_start)

    def complete(self, base_size: int) -> "Settings":
        """These settings with what is left open filled in, for a checkpoint of this base (a side in
        pixels)."""
        width, height = self.asked_size(base_size)
        return replace(self, width=width, height=height, guidance_scale=self.guidance)

    def without_prompts(self) -> "Settings":
        """These settings with all left out that encoded prompts bring."""
        return replace(
            self, prompt="", negative="", clean_caption=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )

    def asked_size(self, base_size: int) -> tuple[int, int]:
        """(width, height) of the pictures, for a checkpoint of this base."""
        return self.width or base_size, self.height or base_size

    def made_size(self, base_size: int) -> tuple[int, int]:
        """(width, height) at which the transformer works: of a bucket of the checkpoint's base, or of whole
        latents."""
        width, height = self.asked_size(base_size)
        if not self.binning or base_size // 8 not in BINNING:
            return -(-width // 8) * 8, -(-height // 8) * 8
        bucket = nearest(width, height, base_size, binning=True)
        return bucket.width, bucket.height

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dict(vars(self))  # which asdict copies to the bottom, for each picture of a batch

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Settings":
        """What `as_dict` gave; other entries are left alone, missing ones have their defaults."""
        return cls(**_known(cls, found))


@dataclass(frozen=True)
class Ways:
    """How a run computes: where, in which precision, within what memory. But for T5's precision and a decode
    in tiles, the picture changes by rounding alone.

    device: one of torch's, or "auto" for the first GPU.
    dtype: of the transformer and the VAE; "auto" is what the device computes best in.
    t5_precision: None is the one that a quantised T5 was saved in, else int8 (for the demo fp32).
    t5_device, transformer_device: "stream" keeps the weights in RAM and passes them through the device; "cpu"
        leaves the device to the others.
    guidance_in_turn: prompt and negative prompt one after the other, in half the memory.
    decode_budget: bytes on the device for the decode, the VAE's weights apart; None is what is free.
    budget: bytes on the device for the whole run, for which the planner chooses all that is not given.
    release: what happens to each model after its stage.
    measure: write down what each stage costs.

    Raises SettingError, naming the first field that is wrong.
    """

    device: str = "auto"
    dtype: str = "auto"
    t5_precision: str | None = None
    t5_device: str = "auto"
    transformer_device: str = "auto"
    guidance_in_turn: bool = False
    decode: str = "auto"
    decode_budget: float | None = None
    budget: float | None = None
    release: str = "free"
    measure: bool = False

    def __post_init__(self):
        check_texts(self, "device")
        check_word(self, "dtype", DTYPES)
        if self.t5_precision is not None:
            check_word(self, "t5_precision", T5_PRECISIONS)
        check_word(self, "t5_device", T5_DEVICES)
        check_word(self, "transformer_device", TRANSFORMER_DEVICES)
        check_word(self, "decode", DECODES)
        check_word(self, "release", RELEASES)
        check_switches(self, "guidance_in_turn", "measure")
        for name in ("decode_budget", "budget"):
            size = getattr(self, name)
            if size is not None and not (is_finite(size) and size > 0):
                raise SettingError(name, size, "give more than 0 bytes, such as 2 GB (2e9)")
        if self.budget is not None and (self.decode != "auto" or self.decode_budget is not None):
            raise SettingError(
                "budget", self.budget, "it plans the decode too, so leave decode and decode_budget out"
            )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Ways":
        """What `as_dict` gave; other entries are left alone, missing ones have their defaults."""
        return cls(**_known(cls, found))


def check_settings(settings: Any) -> Settings:
    """The settings; SigmaError for anything else in their place, such as a prompt."""
    if not isinstance(settings, Settings):
        raise SigmaError(
            f"settings is a {type(settings).__name__}; give Settings, such as Settings('a boat')."
        )
    return settings


def check_ways(ways: Any) -> Ways:
    """The ways; SigmaError for anything else in their place, such as a device."""
    if not isinstance(ways, Ways):
        raise SigmaError(f"ways is a {type(ways).__name__}; give Ways, such as Ways(device='cpu').")
    return ways


def _check_speed(settings: Settings, speed: str) -> None:
    """That it is one, and that there are steps to forecast: a recipe has too few."""
    check_texts(settings, "speed")
    if not settings.speed_is_open and not parse_speed(speed):
        return
    if settings.recipe is not None:
        advice = f"the recipe {settings.recipe} has too few steps to forecast any; leave it out"
        raise SettingError("speed", speed, advice)
    if not settings.speed_is_open and settings.schedule_length <= FEW_STEPS:
        advice = f"a run of {settings.schedule_length} steps has nothing to forecast from; leave it out"
        raise SettingError("speed", speed, advice)


def _check_schedule(settings: Settings) -> None:
    """Timesteps, sigmas and eta, which not every scheduler takes, and that strength leaves a step."""
    scheduler = SCHEDULERS[settings.scheduler]
    if settings.timesteps is not None and settings.sigmas is not None:
        raise SettingError("sigmas", settings.sigmas, "timesteps are given too; give one of them")
    for name, takes in (("timesteps", scheduler.timesteps), ("sigmas", scheduler.sigmas)):
        given = getattr(settings, name)
        if given is None:
            continue
        if not takes:
            takers = [other for other, facts in SCHEDULERS.items() if getattr(facts, name)]
            raise SettingError(
                name, given, f"the scheduler {settings.scheduler} takes none; use {' or '.join(takers)}"
            )
        _set(settings, name, CHECKS[name](given))
    if not is_finite(settings.eta) or not 0 <= settings.eta <= 1:
        raise SettingError("eta", settings.eta, "give a number from 0 to 1")
    if settings.eta and not scheduler.eta:
        raise SettingError(
            "eta", settings.eta, f"the scheduler {settings.scheduler} has none; use the scheduler ddim"
        )


def _check_nag_scale(settings: Settings) -> None:
    """Normalised attention guidance, which takes the place of guidance."""
    scale = settings.nag_scale
    if scale is None:
        return
    if not is_finite(scale) or scale <= 1:
        raise SettingError("nag_scale", scale, "give a number above 1, such as 5, or none")
    if settings.guided:
        raise SettingError(
            "nag_scale",
            scale,
            f"it takes the place of guidance, which is {settings.guidance:g}; set guidance to 1",
        )


def _check_refiner_start(settings: Settings) -> None:
    """A second transformer: both have a step, and nothing was measured with one or is forecast from it."""
    start = settings.refiner_start
    if start is None:
        return
    if not is_finite(start) or not 0 < start < 1:
        raise SettingError(
            "refiner_start", start, "give a share of the steps above 0 and below 1, such as 0.8"
        )
    measured = settings.kv_compression is not None and (
        settings.kv_compression == "auto" or settings.kv_compression.endswith(".json")
    )
    for name, wrong, why in (
        ("recipe", settings.recipe is not None, "it is for one transformer"),
        ("speed", settings.speed_is_open or bool(settings.savings), "steps are forecast from one's own"),
        ("kv_compression", measured, "it was measured with one; spell it out, such as mean:2:14-27"),
    ):
        if wrong:
            advice = f"{why}, and here a second transformer takes over; leave one of the two out"
            raise SettingError(name, getattr(settings, name), advice)
    if not 0 < settings.refiner_step < settings.schedule_length:
        steps = f"of {settings.schedule_length} steps it leaves none to one of the two transformers"
        raise SettingError("refiner_start", start, f"{steps}; give more steps, or another share")


CHECKS = {"timesteps": check_timesteps, "sigmas": check_sigmas}


def _known(cls: type, found: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if name in names
    }


def _set(settings, name: str, value: Any) -> None:
    object.__setattr__(settings, name, value)  # the usual way to complete a frozen dataclass
