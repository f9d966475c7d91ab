"""Calibration of what a MODEL of ours bears to be saved, in the host's own sampling."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
from comfy.patcher_extension import WrappersMP

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.settings import Settings
from ...pixart_sigma.speed import spell as spell_speed
from .kv_compression import KV_COMPRESSION, is_ours
from .sampling import SamplerSettings, sample
from .speed import set_speed

CALIBRATION = "pixart_sigma_calibration"  # the key of our wrappers


def calibrate(
    model,
    conditionings: list,
    negative,
    latent: dict,
    prompts: list[str],
    settings: Settings,
    budget: float,
    reference: str = "own",
    cost: str = "multiply_adds",
):
    """The `Calibration` of a MODEL at the latent's size; conditioning k, that of prompt k, is sampled with
    seed + k. The other arguments are those of the engine's `calibrate`.

    Raises SigmaError for a MODEL that is not from our loader.
    """
    from ...pixart_sigma.studies.calibration import calibrate as drive

    if not is_ours(model):
        raise SigmaError(
            f"This MODEL is a {type(model.model).__name__}, not from Load Σ Transformer. Load the file there "
            "to calibrate it."
        )
    bar = comfy.utils.ProgressBar(1)

    def on_progress(done, total):
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    single = latent | {"samples": latent["samples"][:1]}
    runs = HostRuns(set_speed(model, "off"), conditionings, negative, single, settings)
    return drive(
        runs,
        tuple(prompts),
        settings,
        budget,
        reference=reference,
        cost=cost,
        on_step=on_progress,
        on_run=on_progress,
    )


@dataclass
class HostRuns:
    """Whole runs by our sampler on the host's, as `pixart_sigma.studies.calibration` asks for them."""

    model: object
    conditionings: list
    negative: list
    latent: dict
    settings: Settings

    def __post_init__(self):
        self.config = self.model.model.diffusion_model.sigma_config
        self.fingerprint = self.model.model.fingerprint
        self.noise_schedule = self.model.model.noise_schedule

    def run(self, index: int, choice, see=None):
        """The run of prompt `index`; `see` is told the steps of one without forecasts."""
        from ...pixart_sigma.studies.runs import Ran
        from ...pixart_sigma.transformer.kv_rules import spell

        asked = []

        def count(executor, x, sigma, *arguments, **named):
            asked.append((float(executor.class_obj.model_sampling.timestep(sigma).flatten()[0]), len(x)))
            return executor(x, sigma, *arguments, **named)

        model = self._watched(see, choice.rules) if see else self.model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, CALIBRATION, count)
        chosen = SamplerSettings(
            seed=self.settings.seed + index,
            steps=choice.steps or self.settings.steps,
            cfg=self.settings.guidance,
            kv_compression=spell(choice.rules),
            speed=spell_speed(choice.savings),
            spacing=choice.spacing,
        )
        started = time.perf_counter()
        sampled = sample(model, self.conditionings[index], self.negative, self.latent, chosen)["samples"]
        # Steps that are repeated later count no more.
        return Ran(sampled, time.perf_counter() - started, asked.copy())

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """The MODEL loaded and prepared as the host's samplers do around the steps of a run."""
        comfy.model_management.load_models_gpu([self.model])
        self.model.pre_run()
        try:
            yield
        finally:
            self.model.cleanup()

    def _watched(self, see, rules):
        cfg = self.settings.guidance

        def watch(executor, network, conds, x, sigma, model_options):
            def ask(others):
                options = model_options["transformer_options"] | {KV_COMPRESSION: lambda *size: others}
                return executor(network, conds, x, sigma, model_options | {"transformer_options": options})

            def guided(predicted):
                positive, unwanted = predicted
                return positive if conds[1] is None else unwanted + cfg * (positive - unwanted)

            predicted = ask(rules)
            timestep = float(network.model_sampling.timestep(sigma)[0])
            see(timestep, guided(predicted), lambda others: guided(ask(others)))
            return predicted

        watched = self.model.clone()
        watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, CALIBRATION, watch)
        return watched


def save(calibration, model) -> None:
    """Beside the checkpoint, where auto finds it. Raises SigmaError where that cannot be written."""
    from ...pixart_sigma.transformer.calibration import calibration_path

    path = calibration_path(model.model.checkpoint_path)
    try:
        calibration.save(path)
    except OSError as error:
        raise SigmaError(
            f"The calibration cannot be written to {path}: {error.strerror}. Turn save off, and connect "
            "kv_compression to the sampler."
        ) from error
