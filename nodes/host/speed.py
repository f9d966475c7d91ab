"""Steps of any of the host's samplers that are forecast from those before, on our MODEL and its own PixArt.

The setting travels with a MODEL. What was computed is of one run: it is put into the options of that run, and
gone with them.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator

import comfy.model_sampling
import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.speed import FEW_STEPS, Savings, parse, spell
from ...pixart_sigma.transformer.calibrated_speed import choose
from ...pixart_sigma.transformer.calibration import Choice, find_calibration
from .few_step import RecipeSampler
from .kv_compression import KV_COMPRESSION, can_compress

SPEED = "pixart_sigma_speed"  # in transformer_options: the setting; of our wrappers: the key
FORECASTS = "pixart_sigma_forecasts"  # in those of one run: its `Forecasts`
STEP_CACHE = "easycache"  # the host's, in transformer_options: of EasyCache and of LazyCache


def is_set(model) -> bool:
    """Whether a MODEL has a setting already."""
    return SPEED in model.model_options["transformer_options"]


def set_speed(model, setting: str):
    """A clone of the MODEL of whose steps some are forecast, by every sampler, as `setting` says: off, auto,
    or a spelling of `pixart_sigma.speed`. An earlier setting is replaced, by off it is taken out.

    Raises SigmaError for a setting that is not understood, for a MODEL that is not PixArt-Sigma, and for one
    with EasyCache or LazyCache.
    """
    if not can_compress(model):
        raise SigmaError(
            f"Σ Speed is for PixArt-Sigma, and this MODEL is a {type(model.model).__name__}. Connect Load Σ "
            "Transformer, or ComfyUI's own loader with a PixArt-Sigma file."
        )
    setting = setting.strip().lower()
    off = setting != "auto" and not parse(setting)  # which is known to be understood from here on
    model = model.clone()
    options = model.model_options["transformer_options"]
    options.pop(SPEED, None)
    for kind in WRAPPERS:
        model.remove_wrappers_with_key(kind, SPEED)
    if off:
        return model
    _refuse_step_cache(options)
    options[SPEED] = setting
    for kind, wrapper in WRAPPERS.items():
        model.add_wrapper_with_key(kind, SPEED, wrapper)
    return model


def measured(network, steps: int, as_measured: bool = False) -> Choice:
    """What auto comes to in a run of so many steps; `network` is the host's. Other steps than these are
    chosen only where the run is `as_measured`. Asked at each run: a calibration may be written after the node
    has run."""
    calibration = None
    if hasattr(network, "checkpoint_path"):
        calibration = find_calibration(network.checkpoint_path, lambda: network.fingerprint)
    return choose(calibration, steps, as_measured)


def _refuse_step_cache(options: dict) -> None:
    if STEP_CACHE in options:
        name = getattr(options[STEP_CACHE], "name", "EasyCache")
        raise SigmaError(
            f"Σ Speed and {name} are both on this MODEL, and both leave out steps. Take one of them out; in "
            "Σ Sampler set speed to off."
        )


class Forecasts:
    """What of one run is computed and what is forecast, of whatever asks the model in each of its steps."""

    def __init__(self, savings: Savings):
        from ...pixart_sigma.sampling.forecast import ForecastRun

        self.run = ForecastRun(savings)
        self.sigma = math.inf
        self.asked: Counter = Counter()  # in this step, by what is asked alike
        self.total = 0

    def step(self, sigma: torch.Tensor, model_sampling) -> None:
        """Another call by the sampler, at noise level sigma (B,)."""
        self.sigma = float(sigma.flatten()[0])
        self.asked.clear()
        timestep = float(model_sampling.timestep(sigma.flatten()[0]))
        self.run.step(timestep, noise_to_signal(self.sigma, model_sampling))

    def predict(self, executor, network, conds, x, sigma, model_options) -> list[torch.Tensor]:
        """The clean latents (B, 4, h, w) for each of `conds`, zeros for those that are None; the arguments
        are those of the host's calc_cond_batch, whose `executor` computes them."""
        kind = _kind(model_options["transformer_options"])
        caller = kind, self.asked[kind]
        self.asked[kind] += 1
        self.total += 1
        about = _about(conds, x, self.sigma)

        def compute(alone: bool) -> list[torch.Tensor]:
            asked = [conds[0], None] if alone else conds
            return executor(network, asked, x, sigma, model_options)

        present = [index for index, cond in enumerate(conds) if cond is not None]
        if present == [0, 1]:  # a prompt and its negative one
            return self.run.ask(lambda alone: compute(alone)[: 2 - alone], 2, caller, about)
        if not present:
            return compute(False)

        def together(alone: bool) -> list[torch.Tensor]:
            values = compute(False)
            return [torch.stack([values[index] for index in present])]

        (forecast,) = self.run.ask(together, 1, caller, about)
        values = dict(zip(present, forecast, strict=True))
        return [values.get(index, torch.zeros_like(x)) for index in range(len(conds))]


def noise_to_signal(sigma: float, model_sampling) -> float:
    """What the host calls sigma, for the engine: of a flow it is the share of noise, (1 - sigma) x0 + sigma
    noise."""
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
        return sigma
    return sigma / (1 - sigma) if sigma < 1 else math.inf


def _kind(options: dict) -> tuple:
    """By what one call differs from another of the same step: the patches of guidance that looks at the model
    with a part of it left out, and the window of the batch."""
    replaced = options.get("patches_replace", {})
    patches = [(name, place, id(patch)) for name in replaced for place, patch in replaced[name].items()]
    patches += [(name, id(patch)) for name, listed in options.get("patches", {}).items() for patch in listed]
    window = options.get("context_window")
    return tuple(patches), None if window is None else tuple(window.index_list)


def _about(conds, x: torch.Tensor, sigma: float) -> tuple:
    """What no forecast goes across: the latents' shape, the conditioning, and the noise levels at which that
    changes."""
    entries = [entry for cond in conds if cond is not None for entry in cond]
    names = tuple(None if cond is None else tuple(entry.get("uuid") for entry in cond) for cond in conds)
    sides = tuple((sigma > bound, sigma < bound) for entry in entries for bound in _bounds(entry))
    return x.shape, names, sides


def _bounds(entry: dict) -> Iterator[float]:
    """The noise levels at which an entry of a conditioning, its hooks or its ControlNets begin, change or
    end."""
    yield from (float(entry[name]) for name in ("timestep_start", "timestep_end") if name in entry)
    hooks = entry.get("hooks")
    for hook in [] if hooks is None else hooks.hooks:
        yield from (float(keyframe.start_t) for keyframe in hook.hook_keyframe.keyframes)
    control = entry.get("control")
    while control is not None:
        yield from map(float, control.timestep_range or ())
        control = control.previous_controlnet


def _sample(executor, noise, latent_image, sampler, sigmas, *arguments, **named):
    """A run with what it remembers in its own options, which are the guider's while it lasts."""
    guider = executor.class_obj
    model_options = guider.model_options
    setting = model_options["transformer_options"][SPEED]
    _refuse_step_cache(model_options["transformer_options"])
    if isinstance(sampler, RecipeSampler):
        raise SigmaError(
            "The sampler is that of Σ Few-Step Recipe, between whose steps nothing can be forecast. Take Σ "
            "Speed out."
        )
    steps = len(sigmas) - 1
    choice = Choice()
    if steps <= FEW_STEPS:
        _refuse_few_steps(setting, sigmas, latent_image)
    elif setting == "auto":
        choice = measured(guider.model_patcher.model, steps)
    else:
        choice = Choice(savings=parse(setting))
    forecasts = Forecasts(choice.savings)
    guider.model_options = create_model_options_clone(model_options)
    options = guider.model_options["transformer_options"]
    options[FORECASTS] = forecasts
    if choice.rules:  # measured together with the forecasts; what is set by itself stays
        options.setdefault(KV_COMPRESSION, lambda height, width: choice.rules)
    try:
        return executor(noise, latent_image, sampler, sigmas, *arguments, **named)
    finally:
        guider.model_options = model_options
        logging.getLogger(__name__).info(
            f"Speed {spell(choice.savings)}: {len(forecasts.run.computed)} of {forecasts.total} predictions "
            "were computed."
        )


def _refuse_few_steps(setting: str, sigmas: torch.Tensor, latent_image: torch.Tensor) -> None:
    """SigmaError where few steps make a whole picture from noise, and the setting is not auto."""
    if setting != "auto" and not latent_image.any() and not sigmas[-1] > 0:
        raise SigmaError(
            f"Speed is {setting}, and in a run of {len(sigmas) - 1} steps there is nothing to forecast from. "
            "Take Σ Speed out, or set it to off or auto."
        )


def _step(executor, x, sigma, *arguments, **named):
    guider = executor.class_obj
    forecasts = guider.model_options["transformer_options"].get(FORECASTS)
    if forecasts is not None:
        forecasts.step(sigma, guider.inner_model.model_sampling)
    return executor(x, sigma, *arguments, **named)


def _predict(executor, network, conds, x, sigma, model_options):
    forecasts = model_options["transformer_options"].get(FORECASTS)
    if forecasts is None:
        return executor(network, conds, x, sigma, model_options)
    return forecasts.predict(executor, network, conds, x, sigma, model_options)


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _sample,
    WrappersMP.PREDICT_NOISE: _step,
    WrappersMP.CALC_COND_BATCH: _predict,
}
