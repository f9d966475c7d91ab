"""What goes wrong or large in a real server: it is told on its node, and the next run works."""

import shutil
import sys

import pytest
import torch
from prompts import node, number, quick, to_prompt
from safetensors.torch import save_file
from server import PACK, Rejected

sys.path.insert(0, str(PACK / "tools" / "demo"))
from judge import look  # noqa: E402


@pytest.fixture(scope="module")
def demo_prompt(server):
    workflow = PACK / "example_workflows" / "demo_text_to_image.json"
    return to_prompt(workflow, server.get("/object_info"))


def test_nan_in_latents_is_told_on_the_sampler(server, demo_prompt):
    """As a VAE in half precision can make it. The host's Load Latent reads such a file."""
    numbers = {
        "latent_tensor": torch.full((1, 4, 32, 32), torch.nan),
        "latent_format_version_0": torch.ones(1),
    }
    (server.base / "input").mkdir(exist_ok=True)
    save_file(numbers, server.base / "input" / "nan.latent")
    prompt = quick(demo_prompt)
    prompt["nan"] = {"class_type": "LoadLatent", "inputs": {"latent": "nan.latent"}}
    node(prompt, "PixArtSigmaSampler")["latent_image"] = ["nan", 0]
    run = server.run(prompt)
    assert run.failed == number(prompt, "PixArtSigmaSampler")
    assert "NaN" in run.error and "VAE in fp32" in run.error
    assert server.run(quick(demo_prompt)).status == "success"


def test_a_model_that_was_deleted_after_a_run_is_named(server, demo_prompt):
    """Its weights alone, where a loader or the first prompt reads them again; then all of it."""
    folder = server.base / "models" / "diffusers" / "short-lived"
    shutil.copytree(PACK / "pixart_sigma" / "demo", folder)
    prompt = quick(demo_prompt)
    loader = node(prompt, "PixArtSigmaLoadTransformer")
    loader["transformer"] = "diffusers/short-lived"
    node(prompt, "PixArtSigmaLoadTextEncoder")["text_encoder"] = "diffusers/short-lived"
    node(prompt, "PixArtSigmaLoadVAE")["vae"] = "diffusers/short-lived"
    assert loader["dtype"] == "auto"
    run = server.run(prompt)
    assert run.status == "success", run.error

    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(folder / "elsewhere")
    node(prompt, "PixArtSigmaTextEncode")["positive"] = "a blue star"
    run = server.run(prompt)
    assert run.failed == number(prompt, "PixArtSigmaTextEncode")
    assert str(folder / "text_encoder") in run.error and "weights" in run.error
    (folder / "elsewhere").rename(weights)

    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    loader["dtype"] = "fp32"
    run = server.run(prompt)
    assert run.failed == number(prompt, "PixArtSigmaLoadTransformer")
    assert str(folder / "transformer") in run.error and "weights" in run.error

    shutil.rmtree(folder)
    with pytest.raises(Rejected) as refused:
        server.submit(prompt)
    assert "short-lived" in str(refused.value)
    assert server.run(quick(demo_prompt)).status == "success"


def test_two_prompts_in_the_queue_get_their_own_pictures(server, demo_prompt):
    waiting = {}
    for color in ("red", "yellow"):
        prompt = quick(demo_prompt, steps=10)
        node(prompt, "PixArtSigmaTextEncode")["positive"] = f"a {color} square on a blue background"
        waiting[color] = server.submit(prompt)
    for color, prompt_id in waiting.items():
        run = server.wait(prompt_id)
        assert run.status == "success", run.error
        (picture,) = server.pictures(run, number(demo_prompt, "SaveImage"))
        ground, seen = look(picture)
        assert ground == "blue" and {one.color for one in seen} == {color}


def test_a_large_picture_by_our_sampler_and_by_the_hosts(server, demo_prompt):
    """1024x1024, which is a grid of 64x64 tokens."""
    prompt = quick(demo_prompt)
    node(prompt, "PixArtSigmaAspectRatioBucket")["base"] = "1024"
    ours, decoder = number(prompt, "PixArtSigmaSampler"), number(prompt, "PixArtSigmaVAEDecode")
    sampler = prompt[ours]["inputs"]
    sampler.update(kv_compression="mean:2:deep", cfg=1.0)
    settings = {"sampler_name": "dpmpp_2m", "scheduler": "normal", "steps": 2, "cfg": 1.0, "denoise": 1.0}
    links = {name: sampler[name] for name in ("model", "positive", "negative", "latent_image", "seed")}
    prompt["host"] = {"class_type": "KSampler", "inputs": links | settings}
    decode = prompt[decoder]["inputs"] | {"samples": ["host", 0]}
    prompt["decode"] = {"class_type": "PixArtSigmaVAEDecode", "inputs": decode}
    prompt["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    run = server.wait(server.submit(prompt), 900)
    assert run.status == "success", run.error
    for shown in (number(prompt, "SaveImage"), "show"):
        (picture,) = server.pictures(run, shown)
        assert picture.shape == (1024, 1024, 3) and picture.std() > 5
