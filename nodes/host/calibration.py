"""Calibration of KV compression on a MODEL of ours, in the host's own sampling."""

import comfy.model_management
import comfy.utils
from comfy.patcher_extension import WrappersMP

from ...pixart_sigma.errors import SigmaError
from .kv_compression import KV_COMPRESSION, is_ours
from .sampling import sample


def calibrate(model, conditionings: list, negative, latent: dict, prompts, seed, steps, cfg, budget):
    """The `Calibration` of a MODEL at the latent's size; conditioning k is sampled with seed + k.

    Raises SigmaError for a MODEL that is not from our loader.
    """
    from ...pixart_sigma.studies.calibration import Calibrator
    from ...pixart_sigma.transformer.kv_calibration import Calibration
    from ...pixart_sigma.transformer.kv_rules import spell

    if not is_ours(model):
        raise SigmaError(
            f"This MODEL is a {type(model.model).__name__}, not from Load Σ Transformer. Load the file there "
            "to calibrate it."
        )
    height, width = (8 * side for side in latent["samples"].shape[-2:])
    calibrator = Calibrator(model.model.diffusion_model.sigma_config, height, width, budget)

    def watch(executor, network, conds, x, sigma, model_options):
        def both(rules):
            options = model_options["transformer_options"] | {KV_COMPRESSION: lambda *size: rules}
            return executor(network, conds, x, sigma, model_options | {"transformer_options": options})

        def guided(predicted):
            positive, unwanted = predicted
            return positive if conds[1] is None else unwanted + cfg * (positive - unwanted)

        uncompressed = both(())
        timestep = float(network.model_sampling.timestep(sigma)[0])
        calibrator.see(timestep, guided(uncompressed), lambda rules: guided(both(rules)))
        return uncompressed

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "pixart_sigma_calibration", watch)
    single = latent | {"samples": latent["samples"][:1]}

    def run(index, rules, sampled=model):
        return sample(
            sampled,
            conditionings[index],
            negative,
            single,
            seed + index,
            steps,
            cfg,
            "dpmpp_2m",
            "reference",
            1.0,
            spell(rules),
        )["samples"]

    for index in range(len(conditionings)):
        calibrator.start()
        calibrator.finish(run(index, (), watched))

    comfy.model_management.load_models_gpu([model])
    bar = comfy.utils.ProgressBar(1)

    def on_progress(done, total):
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    model.pre_run()  # as the host's samplers do around the steps of a run
    try:
        errors = calibrator.measure(on_progress)
    finally:
        model.cleanup()
    rules, error = calibrator.choose(errors, run)  # the sampler shows how far each run is
    return Calibration(
        rules=rules,
        error=error,
        budget=budget,
        saved=calibrator.saved(rules),
        width=width,
        height=height,
        steps=steps,
        prompts=tuple(prompts),
        errors=errors,
        fingerprint=model.model.fingerprint,
    )


def save(calibration, model) -> None:
    """Beside the checkpoint, where auto finds it. Raises SigmaError where that cannot be written."""
    from ...pixart_sigma.transformer.kv_calibration import calibration_path

    path = calibration_path(model.model.checkpoint_path)
    try:
        calibration.save(path)
    except OSError as error:
        raise SigmaError(
            f"The calibration cannot be written to {path}: {error.strerror}. Turn save off, and connect "
            "kv_compression to the sampler."
        ) from error
