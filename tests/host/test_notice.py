"""What nodes write on themselves in a real server."""

import torch
from diffusers import PixArtTransformer2DModel
from prompts import node, number, to_prompt
from safetensors.torch import save_file
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


def test_a_guessed_size_is_said_on_the_loader_and_a_saved_model_says_its_own(server):
    torch.manual_seed(0)
    made = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=72,
        num_layers=1,
        cross_attention_dim=144,
        sample_size=64,
        interpolation_scale=1,
        caption_channels=64,
        use_additional_conditions=False,
    )
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made.state_dict(), folder / "mine.safetensors")
    loader = {"transformer": "mine.safetensors", "variant": "auto", "dtype": "fp32"}
    prompt = {
        "1": {"class_type": "PixArtSigmaLoadTransformer", "inputs": loader},
        "2": {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "saved"}},
    }
    ((shown_on, text),) = server.texts(prompt)
    assert shown_on == "1" and "mine.safetensors" in text and "1024" in text and "variant" in text

    loader["variant"] = "512"
    ((shown_on, text),) = server.texts(prompt)
    assert shown_on == "1" and not text.strip(), "the notice stayed"
    saved = sorted((server.base / "output").glob("saved*.safetensors"))[-1]
    saved.rename(folder / "again.safetensors")
    loader.update(transformer="again.safetensors", variant="auto")
    assert server.texts(prompt) == []


def test_what_is_not_read_of_a_prompt_is_said_on_the_node(server):
    workflow = PACK / "example_workflows" / "demo_text_to_image.json"
    prompt = to_prompt(workflow, server.get("/object_info"))
    encode = node(prompt, "PixArtSigmaTextEncode")
    long = "a red embedding:Nothing circle " + "on a blue square " * 200 + "end"
    encode.update(positive=long, negative="a red embedding:Other circle")
    here = number(prompt, "PixArtSigmaTextEncode")
    texts = [text for shown_on, text in server.texts(prompt) if shown_on == here]
    shown = texts[-1]  # what came before was shown in its time
    assert "no embedding 'Nothing'" in shown and "no embedding 'Other'" in shown
    assert "longer than the 300 tokens" in shown and "blue square end" in shown

    theirs = {"class_type": "CLIPTextEncode", "inputs": {"clip": encode["clip"], "text": long}}
    prompt["theirs"] = theirs
    node(prompt, "PixArtSigmaSampler")["positive"] = ["theirs", 0]
    encode.update(positive="a red circle", negative="")
    texts = server.texts(prompt)
    assert [text.strip() for shown_on, text in texts if shown_on == here] == [""], "the notice stayed"
    (shown,) = [text for shown_on, text in texts if shown_on == "theirs"]
    assert "no embedding 'Nothing'" in shown and "blue square end" in shown


def test_a_recipe_says_on_the_sampler_that_it_does_not_guide(server):
    workflow = PACK / "example_workflows" / "demo_text_to_image.json"
    prompt = to_prompt(workflow, server.get("/object_info"))
    sampler = node(prompt, "PixArtSigmaSampler")
    sampler.update(schedule="one-step", seed=2)
    size = {"width": 64, "height": 96, "batch_size": 1}
    bucket = prompt[sampler["latent_image"][0]]
    prompt["size"] = {"class_type": "EmptyLatentImage", "inputs": size}
    sampler["latent_image"] = ["size", 0]
    *_, (shown_on, text) = server.texts(prompt)
    assert shown_on == number(prompt, "PixArtSigmaSampler")
    assert "64x96" in text and "one-step runs without guidance: cfg was 1, not 4.5" in text

    prompt["size"] = bucket
    sampler["cfg"] = 1
    ((shown_on, text),) = server.texts(prompt)
    assert shown_on == number(prompt, "PixArtSigmaSampler") and not text.strip(), "the notice stayed"
