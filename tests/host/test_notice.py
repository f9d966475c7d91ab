"""What the sampler writes on its node in a real server."""

import json

import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api
from server import PACK


@pytest.fixture(scope="module")
def demo_prompt(server):
    workflow = (PACK / "example_workflows" / "demo_text_to_image.json").read_text(encoding="utf-8")
    return convert_ui_to_api(json.loads(workflow), server.get("/object_info"))


def test_a_size_that_the_model_is_not_made_for_is_said_on_the_sampler(server, demo_prompt):
    size = {"width": 64, "height": 96, "batch_size": 1}
    demo_prompt["size"] = {"class_type": "EmptyLatentImage", "inputs": size}
    sampler, inputs = next(
        (name, entry["inputs"])
        for name, entry in demo_prompt.items()
        if entry["class_type"] == "PixArtSigmaSampler"
    )
    inputs.update(latent_image=["size", 0], steps=1)
    ((node, text),) = server.texts(demo_prompt)
    assert node == sampler
    assert "64x96" in text and "256x256" in text and "Aspect-Ratio Bucket" in text
    assert text in server.log.read_text(encoding="utf-8")

    size.update(width=256, height=256)
    ((node, text),) = server.texts(demo_prompt)
    assert node == sampler and not text.strip(), "the notice stayed"
    inputs["seed"] = 1
    assert server.texts(demo_prompt) == []
