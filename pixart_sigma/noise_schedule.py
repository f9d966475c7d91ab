"""What a checkpoint was trained to predict and at which noise levels: a folder's scheduler_config.json.

The solver is not part of it; whoever makes the picture chooses that. The names and words are diffusers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import CheckpointError, SettingError
from .setting_checks import LAST_TIMESTEP, check_switches, check_word, is_finite

TIMESTEPS = LAST_TIMESTEP + 1
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
FINAL_SIGMAS = ("zero", "sigma_min")
# How the sigmas themselves are spaced, by diffusers' switch; without one they are those of the timesteps.
SIGMA_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SPACINGS.values())
# What a config leaves out is as its class has it, and as in DPMSolverMultistepScheduler but for these.
_LEADING = {"timestep_spacing": "leading"}
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = _LEADING | _STABLE_DIFFUSION | {"beta_schedule": "scaled_linear"}
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {},
    "DDIMScheduler": _LEADING,
    "DDIMParallelScheduler": _LEADING,
    "DDPMScheduler": _LEADING,
    "DDPMParallelScheduler": _LEADING,
    "PNDMScheduler": _LEADING,
    "DPMSolverSDEScheduler": _STABLE_DIFFUSION,
    "HeunDiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _STABLE_DIFFUSION,
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    **{name: {"prediction_type": "flow_prediction", "use_flow_sigmas": True} for name in FLOW_CLASSES},
}
# What changes every picture and is not done here, by the only value that is taken.
UNCHANGED = {
    "num_train_timesteps": TIMESTEPS,
    "thresholding": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "lambda_min_clipped": -float("inf"),
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of the 1000 timesteps, what the model predicts, and where the steps of a run lie; by
    default as published.

    prediction_type: "epsilon" is the noise, "v_prediction" arXiv 2202.00512, "sample" the clean latents;
        "flow_prediction" the difference of noise and clean latents, on straight lines between them (arXiv
        2209.03003), for which flow_shift moves the steps towards noise and betas mean nothing.
    trained_betas: in place of those that the three before it describe.
    rescale_betas_zero_snr: the last timestep is noise alone (arXiv 2305.08891).
    sigma_spacing: one of SIGMA_SPACINGS, or "" where timestep_spacing decides.
    source: who says so, for people; "" where nothing does.

    Raises SettingError, naming the first field that is wrong.
    """

    prediction_type: str = "epsilon"
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    sigma_spacing: str = ""
    final_sigmas_type: str = "zero"
    flow_shift: float = 1.0
    source: str = field(default="", compare=False)

    def __post_init__(self):
        check_word(self, "prediction_type", PREDICTION_TYPES)
        check_word(self, "beta_schedule", BETA_SCHEDULES)
        for name in ("beta_start", "beta_end"):
            if not _is_share(getattr(self, name)):
                raise SettingError(name, getattr(self, name), "give a number between 0 and 1")
        betas = self.trained_betas
        if betas is not None:
            if (
                not isinstance(betas, list | tuple)
                or len(betas) != TIMESTEPS
                or not all(map(_is_share, betas))
            ):
                raise SettingError("trained_betas", betas, f"give {TIMESTEPS} numbers between 0 and 1")
            object.__setattr__(self, "trained_betas", tuple(map(float, betas)))
        check_switches(self, "rescale_betas_zero_snr")
        check_word(self, "timestep_spacing", TIMESTEP_SPACINGS)
        if isinstance(self.steps_offset, bool) or self.steps_offset not in range(100):
            raise SettingError("steps_offset", self.steps_offset, "give a whole number from 0 to 99")
        check_word(self, "sigma_spacing", ("", *SIGMA_SPACINGS.values()))
        check_word(self, "final_sigmas_type", FINAL_SIGMAS)
        if not is_finite(self.flow_shift) or not 0 < self.flow_shift <= 1000:
            raise SettingError("flow_shift", self.flow_shift, "give a number above 0, such as 3")
        if self.is_flow and (self.sigma_spacing or self.rescale_betas_zero_snr):
            wrong = self.sigma_spacing or "rescale_betas_zero_snr"
            raise SettingError("prediction_type", self.prediction_type, f"{wrong} contradicts it; drop one")

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow_prediction"

    @property
    def spacing(self) -> tuple[str, int, str, str]:
        """Where the steps of a run lie."""
        return self.timestep_spacing, self.steps_offset, self.sigma_spacing, self.final_sigmas_type

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> "NoiseSchedule":
        """What diffusers' scheduler_config.json says; `name` is the file's, for errors.

        Options of a solver, such as its order, are left alone. Raises CheckpointError for what cannot be
        obeyed, with its value.
        """
        scheduler = config.get("_class_name", "DPMSolverMultistepScheduler")
        if not isinstance(scheduler, str) or scheduler not in CLASS_DEFAULTS:
            raise CheckpointError(
                f"{name} says _class_name {scheduler!r}, and its noise schedule is not known here; known are "
                f"{', '.join(CLASS_DEFAULTS)}."
            )
        found = CLASS_DEFAULTS[scheduler] | {key: value for key, value in config.items() if value is not None}
        for key, only in UNCHANGED.items():
            if found.get(key, only) not in (only, str(only)):
                raise CheckpointError(
                    f"{name} says {key} {found[key]!r}; PixArt-Sigma runs with {only!r} only."
                )
        if scheduler in FLOW_CLASSES:
            found["flow_shift"] = found.get("shift", 1.0)
        try:
            schedule = cls(
                **{key: found[key] for key in _CONFIG_FIELDS if key in found},
                sigma_spacing=_sigma_spacing(found),
                source=scheduler,
            )
        except SettingError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if schedule.is_flow != bool(found.get("use_flow_sigmas", False)):
            raise CheckpointError(
                f"{name} says prediction_type {schedule.prediction_type!r} with use_flow_sigmas "
                f"{found.get('use_flow_sigmas', False)!r}, which contradict each other; correct one of them."
            )
        return schedule

    def as_config(self) -> dict[str, Any]:
        """All of it in the words of a scheduler_config.json."""
        switches = {switch: word == self.sigma_spacing for switch, word in SIGMA_SPACINGS.items()}
        return {
            **{key: getattr(self, key) for key in _CONFIG_FIELDS},
            **switches,
            "trained_betas": None if self.trained_betas is None else list(self.trained_betas),
            "num_train_timesteps": TIMESTEPS,
            "use_flow_sigmas": self.is_flow,
        }

    def as_dict(self) -> dict[str, Any]:
        """All that decides a picture, ready for JSON."""
        return {known.name: getattr(self, known.name) for known in fields(self) if known.compare}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], source: str = "") -> "NoiseSchedule":
        """What `as_dict` gave; other entries are left alone. Raises SettingError."""
        names = {known.name for known in fields(cls) if known.compare}
        return cls(**{key: value for key, value in found.items() if key in names}, source=source)

    def evenly(self) -> "NoiseSchedule":
        """The same without a spacing of the sigmas, for steps of one's own."""
        return replace(self, sigma_spacing="")

    def spaced(self, spacing: str) -> "NoiseSchedule":
        """The same with its steps elsewhere; spacing: one of SPACINGS. Raises SettingError for a flow."""
        if self.is_flow:
            raise SettingError("spacing", spacing, "the checkpoint's flow schedule has its own; leave it out")
        if spacing in TIMESTEP_SPACINGS:
            return replace(self, timestep_spacing=spacing, sigma_spacing="")
        return replace(self, sigma_spacing=spacing)

    def describe(self) -> str:
        """One line for people."""
        if self.is_flow:
            return f"flow_prediction, shift {self.flow_shift:g}{self._said()}"
        betas = f"{self.beta_schedule} betas"
        if self.trained_betas is not None:
            betas = f"{TIMESTEPS} betas of its own"
        elif self.beta_schedule != "squaredcos_cap_v2":
            betas += f" {self.beta_start:g} to {self.beta_end:g}"
        zero = ", zero terminal SNR" if self.rescale_betas_zero_snr else ""
        spacing = (
            f"{self.sigma_spacing} sigmas" if self.sigma_spacing else f"{self.timestep_spacing} timesteps"
        )
        return f"{self.prediction_type}, {betas}{zero}, {spacing}{self._said()}"

    def _said(self) -> str:
        return f" (from {self.source})" if self.source else " (the published one)"


_CONFIG_FIELDS = tuple(
    known.name for known in fields(NoiseSchedule) if known.name not in ("sigma_spacing", "source")
)


def _sigma_spacing(found: Mapping[str, Any]) -> str:
    chosen = {switch: found[switch] for switch in SIGMA_SPACINGS if found.get(switch)}
    if len(chosen) > 1 or any(value is not True for value in chosen.values()):
        raise SettingError("sigma_spacing", chosen, "at most one of them can be true")
    return SIGMA_SPACINGS[next(iter(chosen))] if chosen else ""


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and is_finite(value) and 0 < value < 1


PUBLISHED = NoiseSchedule()
