"""Calibration of KV compression in the real host: what it finds, that `auto` uses it, that it can stop."""

import shutil

import comfy.model_management as management
import comfy.sample
import pytest
import torch
from pack.nodes.calibration import Calibrate
from pack.nodes.host.kv_compression import KV_COMPRESSION, set_kv_compression
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.host.transformer import load_model
from pack.nodes.text import encode
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.prompt_embeds import Prompts
from pack.pixart_sigma.settings import Settings
from pack.pixart_sigma.studies.calibration import calibrate as calibrate_by_the_engine
from pack.pixart_sigma.studies.runs import EngineRuns
from pack.pixart_sigma.transformer.calibration import Calibration, calibration_path
from pack.pixart_sigma.transformer.kv_rules import parse, spell
from pack.pixart_sigma.transformer.loading import load_transformer

PROMPTS = ("a red circle", "a blue star")
SETTINGS = {"error_percent": 8.0, "seed": 3, "steps": 4, "cfg": 4.5}
LATENTS = torch.zeros(1, 4, 16, 24)


@pytest.fixture
def folder(tmp_path):
    """The demo, as a calibration is written beside its weights."""
    return shutil.copytree(DEMO, tmp_path / "demo")


@pytest.fixture
def model(folder):
    return load_model(folder)


@pytest.fixture
def clip(folder):
    return load_clip(folder, "fp32", "auto")


def calibrate(model, clip, prompts=PROMPTS, save=True):
    latent = {"samples": LATENTS}
    text = "\n\n".join(prompts)
    return Calibrate.execute(model, clip, latent, text, save=save, **SETTINGS).args


def rules(model, *size):
    return model.model_options["transformer_options"][KV_COMPRESSION](*size)


def auto_rules(model, *size):
    return rules(set_kv_compression(model, "auto"), *size)


def test_calibration_finds_a_setting_that_auto_uses(model, clip, folder):
    path = calibration_path(model.model.checkpoint_path)
    wrappers = {kind: set(wrapped) for kind, wrapped in model.wrappers.items()}
    before = set_kv_compression(model, "auto")
    layers = model.model.diffusion_model.sigma_config.num_layers
    assert rules(before, 2048, 2048) == auto_rules(model, 2048, 2048) == parse("mean:2:deep", layers)

    setting, plot, speed = calibrate(model, clip, save=False)
    assert folder in path.parents and not path.exists()
    assert plot.ndim == 4 and plot.shape[-1] == 3 and plot.std() > 0.05

    assert calibrate(model, clip)[0] == setting
    found = Calibration.read(path)
    assert spell(found.rules) == setting != "off" and found.prompts == PROMPTS
    assert (found.width, found.height, found.steps) == (192, 128, 4) and 0 < found.error <= 0.08
    assert rules(before, 2048, 2048) == auto_rules(model, 2048, 2048) == found.rules
    assert auto_rules(model, 256, 256) == ()
    assert KV_COMPRESSION not in model.model_options["transformer_options"]
    assert {kind: set(wrapped) for kind, wrapped in model.wrappers.items()} == wrappers

    again = measure_by_the_engine(folder, clip)
    assert again.rules == found.rules and abs(again.error - found.error) < 1e-3, (again, found)

    path.write_text("{")
    with pytest.raises(SigmaError, match="is not a calibration"):
        auto_rules(model, 2048, 2048)


def measure_by_the_engine(folder, clip):
    starts = []
    for index, prompt in enumerate(PROMPTS):
        positive, negative = (encode(clip, text, False)[0][0] for text in (prompt, ""))
        noise = comfy.sample.prepare_noise(LATENTS, 3 + index)
        starts.append((noise, Prompts(positive, negative_embeds=negative)))
    settings = Settings(width=192, height=128, steps=4)
    runs = EngineRuns(load_transformer(folder), starts, settings)
    return calibrate_by_the_engine(runs, ("", ""), settings, budget=0.08)


def test_a_calibration_without_prompts_is_refused(model, clip):
    with pytest.raises(SigmaError, match="no prompt"):
        calibrate(model, clip, (" ", ""))


def test_a_calibration_can_be_interrupted(model, clip):
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        calibrate(model, clip)
