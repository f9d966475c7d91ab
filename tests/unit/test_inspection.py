"""Every kind of file is called what it is, with what uses it."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_sigma import DEMO
from pixart_sigma.cli.commands import main
from pixart_sigma.errors import CheckpointError
from pixart_sigma.inspection import describe

LORA = ("transformer_blocks.0.attn1.to_q.lora_A.weight", "transformer_blocks.0.attn1.to_q.lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
# Whose names they are, and the tensors.
LORAS = {
    "PEFT": [f"base_model.model.{name}" for name in LORA],
    "diffusers": [f"transformer.{name}" for name in LORA],
    "kohya": [f"lora_unet_blocks_0_attn_qkv.{name}" for name in KOHYA],
    "OneTrainer": [f"lora_transformer_transformer_blocks_0_attn1_to_q.{name}" for name in KOHYA],
    "LyCORIS": [f"lycoris_transformer_blocks_0_ff_net_0_proj.lokr_{name}" for name in ("w1", "w2_a", "w2_b")],
    "ComfyUI": [f"diffusion_model.blocks.0.cross_attn.kv_linear.{name[-13:]}" for name in LORA],
}
OTHERS = {
    "an adapter of Stable Diffusion or SDXL": [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1.lora_down.weight"
    ],
    "a ControlNet": [
        "controlnet_blocks.0.before_proj.weight",
        "controlnet_blocks.0.transformer_block.ff.weight",
    ],
    "an IP-Adapter": ["ip_adapter.1.to_k_ip.weight"],
    "a CLIP text encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "Stable Diffusion": ["model.diffusion_model.input_blocks.0.0.weight"],
    "Flux or a model like it": ["double_blocks.0.img_attn.qkv.weight"],
    "no model that is known here: its first weight is some.weight": ["some.weight"],
}


def write(path, names):
    save_file({name: torch.zeros(4, 8) for name in names}, path)
    return path


def weights_of(folder):
    return load_file(next(folder.glob("*.safetensors")))


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def test_each_part_of_a_pipeline(pipeline_folder):
    for name, words, use in (
        (".", "PixArt-Sigma pipeline", "--model"),
        ("transformer", "PixArt-Sigma transformer", "--transformer"),
        ("text_encoder", "a T5 text encoder", "--text-encoder"),
        ("vae", "a VAE", "--vae"),
    ):
        text = describe(pipeline_folder / name)
        assert words in text.splitlines()[0] and use in text.splitlines()[-1], name


def test_what_is_called_as_few_step_weights_says_their_recipe(tmp_path, pipeline_folder):
    weights = weights_of(pipeline_folder / "transformer")
    save_file(weights, tmp_path / "nitro-512.safetensors")
    save_file(weights, tmp_path / "mine-512.safetensors", {"modelspec.title": "Sigma LCM", "prompt": "nitro"})
    save_file(weights, tmp_path / "plain-512.safetensors", {"prompt": '{"sampler_name": "lcm"}'})
    lora = write(tmp_path / "sigma-inkwash-2step.safetensors", LORA)
    for path, recipe in (
        (tmp_path / "nitro-512.safetensors", "one-step"),
        (tmp_path / "mine-512.safetensors", "lcm-4"),
        (lora, "phased-2"),
    ):
        assert f"for the recipe {recipe} (--recipe)" in describe(path)
    assert "recipe" not in describe(tmp_path / "plain-512.safetensors")


def test_a_checkpoint_of_several_models(tmp_path, pipeline_folder):
    weights = prefixed("model.diffusion_model.", weights_of(pipeline_folder / "transformer"))
    weights |= prefixed("vae.", weights_of(pipeline_folder / "vae"))
    save_file(weights, tmp_path / "both_512.safetensors")
    text = describe(tmp_path / "both_512.safetensors")
    assert "one file of several models" in text.splitlines()[0]
    assert "512 (from file name)" in text and "scaling factor 0.13025" in text
    assert "Load Σ Transformer" in text and "Load Σ VAE" in text


def test_a_checkpoint_of_another_model(tmp_path, pipeline_folder):
    weights = prefixed("first_stage_model.", weights_of(pipeline_folder / "vae"))
    weights["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "sd15.safetensors")
    with pytest.raises(CheckpointError, match=r"several models \(.*Stable Diffusion.*has the VAE of Stable"):
        describe(tmp_path / "sd15.safetensors")


@pytest.mark.parametrize("writer", LORAS)
def test_a_lora(tmp_path, writer):
    text = describe(write(tmp_path / "lora.safetensors", LORAS[writer]))
    assert "of a PixArt transformer" in text and "Load Σ LoRA" in text and "--lora" in text
    assert writer in next(line for line in text.splitlines() if line.startswith("written by"))
    assert "changes         1 layers: " + ("LoKr" if writer == "LyCORIS" else "LoRA") in text
    assert ("1 of them fused" in text) == (writer in ("kohya", "ComfyUI"))


def test_what_an_adapter_is(tmp_path):
    layer = "lora_transformer_transformer_blocks_{}_attn1_to_q"
    tensors = {}
    for index, rank in enumerate((4, 16)):
        tensors[f"{layer.format(index)}.lora_down.weight"] = torch.zeros(rank, 1152)
        tensors[f"{layer.format(index)}.lora_up.weight"] = torch.zeros(1152, rank)
        tensors[f"{layer.format(index)}.alpha"] = torch.tensor(8.0)
    tensors[f"{layer.format(1)}.dora_scale"] = torch.ones(1, 1152)
    tensors["lora_te_encoder_block_0_layer_0_SelfAttention_q.alpha"] = torch.tensor(1.0)
    tensors["bundle_emb.cat.t5"] = torch.zeros(1, 4096)
    tensors["something.else"] = torch.zeros(1)
    save_file(tensors, tmp_path / "lora.safetensors", {"ot_branch": "master"})
    lines = describe(tmp_path / "lora.safetensors").splitlines()
    assert lines[1:7] == [
        "written by      OneTrainer, in the names of OneTrainer or ai-toolkit",
        "changes         2 layers: LoRA of 1, LoRA with DoRA of 1",
        "rank            4, 16, alpha 8",
        "not known       1 tensors, such as something.else: it will be refused",
        "text encoder    1 tensors, for T5",
        "embeddings      1 tensors, which are not used",
    ]


def test_an_adapter_folder_of_peft(tmp_path):
    write(tmp_path / "adapter_model.safetensors", LORAS["PEFT"])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
    text = describe(tmp_path)
    assert "PEFT (LORA)" in text and "rank            4, alpha 2" in text


@pytest.mark.parametrize("words", OTHERS)
def test_what_is_of_no_use_is_named_all_the_same(tmp_path, capsys, words):
    path = write(tmp_path / "other.safetensors", OTHERS[words])
    with pytest.raises(CheckpointError, match=f"is {words}"):
        describe(path)
    assert main(["inspect", str(path)]) == 2
    assert re.search(f"is {words}", capsys.readouterr().err)


def test_gguf_without_weights_says_its_architecture(tmp_path):
    name, value = b"general.architecture", b"t5encoder"
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    head += len(name).to_bytes(8, "little") + name + (8).to_bytes(4, "little")
    (tmp_path / "t5.gguf").write_bytes(head + len(value).to_bytes(8, "little") + value)
    with pytest.raises(CheckpointError, match="is GGUF for the architecture 't5encoder' without any weights"):
        describe(tmp_path / "t5.gguf")
    (tmp_path / "t5.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CheckpointError, match="is GGUF of version 0"):
        describe(tmp_path / "t5.gguf")


@pytest.mark.parametrize("names", [["t5xxl"], ["emb_params"], ["bundle_emb.style.t5"]])
def test_a_textual_inversion(tmp_path, names):
    text = describe(write(tmp_path / "style.safetensors", names))
    assert "textual inversion" in text and "embedding:style" in text


def test_prompt_embeddings():
    prompt = "a red square to the left of a blue star on a white background"
    assert prompt in describe(DEMO / "prompt_embeddings.safetensors")


def test_averages_are_mentioned(tmp_path, to_original, diffusers_state_dict):
    weights = to_original(diffusers_state_dict)
    torch.save({"model": weights, "ema": weights}, tmp_path / "both_1024.pth")
    assert "are left out" in describe(tmp_path / "both_1024.pth")
    torch.save({"ema": weights}, tmp_path / "averages_1024.pth")
    assert "there is nothing else" in describe(tmp_path / "averages_1024.pth")


def test_the_variant_can_be_chosen(tmp_path, write_original, capsys):
    path = write_original(tmp_path / "sigma.pth")
    assert main(["inspect", str(path)]) == 0
    assert "choose it with --variant" in capsys.readouterr().out
    assert main(["inspect", str(path), "--variant", "2K"]) == 0
    assert "2K (as you chose)" in capsys.readouterr().out
