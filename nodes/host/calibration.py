"""Calibration of KV compression on a MODEL of ours, in the host's own sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
from comfy.patcher_extension import WrappersMP

from ...pixart_sigma.errors import SigmaError
from ...pixart_sigma.settings import Settings
from .kv_compression import KV_COMPRESSION, is_ours
from .sampling import SamplerSettings, sample


def calibrate(
    model, conditionings: list, negative, latent: dict, prompts: list[str], settings: Settings, budget
):
    """The `Calibration` of a MODEL at the latent's size; conditioning k, that of prompt k, is sampled with
    seed + k.

    Raises SigmaError for a MODEL that is not from our loader.
    """
    from ...pixart_sigma.studies.calibration import calibrate as drive

    if not is_ours(model):
        raise SigmaError(
            f"This MODEL is a {type(model.model).__name__}, not from Load Σ Transformer. Load the file there "
            "to calibrate it."
        )
    bar = comfy.utils.ProgressBar(1)

    def on_step(done, total):
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    single = latent | {"samples": latent["samples"][:1]}
    runs = HostRuns(model, conditionings, negative, single, settings)
    # Of whole runs the sampler shows itself how far each is.
    return drive(runs, tuple(prompts), settings, budget, on_step=on_step)


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

    def run(self, index: int, rules, see=None):
        """The latents that the run of prompt `index` ends with; `see` is told its steps."""
        from ...pixart_sigma.transformer.kv_rules import spell

        model = self._watched(see) if see else self.model
        chosen = SamplerSettings(
            seed=self.settings.seed + index,
            steps=self.settings.steps,
            cfg=self.settings.guidance,
            kv_compression=spell(rules),
        )
        return sample(model, self.conditionings[index], self.negative, self.latent, chosen)["samples"]

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """The MODEL loaded and prepared as the host's samplers do around the steps of a run."""
        comfy.model_management.load_models_gpu([self.model])
        self.model.pre_run()
        try:
            yield
        finally:
            self.model.cleanup()

    def _watched(self, see):
        cfg = self.settings.guidance

        def watch(executor, network, conds, x, sigma, model_options):
            def both(rules):
                options = model_options["transformer_options"] | {KV_COMPRESSION: lambda *size: rules}
                return executor(network, conds, x, sigma, model_options | {"transformer_options": options})

            def guided(predicted):
                positive, unwanted = predicted
                return positive if conds[1] is None else unwanted + cfg * (positive - unwanted)

            uncompressed = both(())
            timestep = float(network.model_sampling.timestep(sigma)[0])
            see(timestep, guided(uncompressed), lambda rules: guided(both(rules)))
            return uncompressed

        watched = self.model.clone()
        watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "pixart_sigma_calibration", watch)
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
