"""What the sampler writes on its node in a real server."""

from prompts import node, number, to_prompt
from server import PACK


def test_a_size_that_the_model_is_not_made_for_is_said_on_the_sampler(server):
    workflow = PACK / "example_workflows" / "demo_text_to_image.json"
    prompt = to_prompt(workflow, server.get("/object_info"))
    size = {"width": 64, "height": 96, "batch_size": 1}
    prompt["size"] = {"class_type": "EmptyLatentImage", "inputs": size}
    sampler = node(prompt, "PixArtSigmaSampler")
    sampler.update(latent_image=["size", 0], steps=1)
    ((shown_on, text),) = server.texts(prompt)
    assert shown_on == number(prompt, "PixArtSigmaSampler")
    assert "64x96" in text and "256x256" in text and "Σ Aspect-Ratio Bucket" in text
    assert text in server.log.read_text(encoding="utf-8")

    size.update(width=256, height=256)
    ((shown_on, text),) = server.texts(prompt)
    assert shown_on == number(prompt, "PixArtSigmaSampler") and not text.strip(), "the notice stayed"
    sampler["seed"] = 1
    assert server.texts(prompt) == []
