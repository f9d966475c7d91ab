"""Each part of a file is found by its names alone, whatever wrote them."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from pixart_sigma.errors import CheckpointError
from pixart_sigma.files.parts import FACTS, choose, kind_of, place
from pixart_sigma.files.weight_files import read_header, read_metadata, read_state_dict

SIGMA = ("t_block.1.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.attn.qkv.weight")
T5 = ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")
VAE = ("decoder.conv_in.weight", "encoder.conv_in.weight")
PREFIXES = {
    "transformer": (
        "model.diffusion_model.",
        "diffusion_model.",
        "transformer.",
        "module.",
        "_orig_mod.module.",
        "module._orig_mod.module.model.",
        "_fsdp_wrapped_module._orig_mod.",
        "state_dict.",
        "state_dict.module.",
        "net.",
        "ema.",
        "model_ema.",
    ),
    "text_encoder": (
        "text_encoders.t5xxl.transformer.",
        "text_encoder.",
        "cond_stage_model.t5xxl.transformer.",
        "t5xxl.transformer.",
        "transformer.",
        "model.",
    ),
    "vae": ("vae.", "first_stage_model.", "module.", "model.", "state_dict.first_stage_model."),
}
NAMES = {"transformer": SIGMA, "text_encoder": T5, "vae": VAE}


@pytest.mark.parametrize(
    ("part", "prefix"), [(part, prefix) for part in PREFIXES for prefix in PREFIXES[part]]
)
def test_what_stands_in_front_is_taken_off(part, prefix):
    names = [prefix + name for name in NAMES[part]]
    assert choose(names, part).names == dict(zip(NAMES[part], names, strict=True))


def test_wrappers_in_the_middle_of_a_name():
    wrapped = "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn._orig_mod.qkv.weight"
    assert place(f"module.{wrapped}").bare == "blocks.0.attn.qkv.weight"
    mixed = [f"module.{SIGMA[0]}", SIGMA[1], f"_orig_mod.{wrapped}"]
    assert set(choose(mixed, "transformer").names) == set(SIGMA)


def test_one_part_of_several():
    file = [f"model.diffusion_model.{name}" for name in SIGMA]
    file += [f"vae.{name}" for name in VAE]
    file += [f"text_encoders.t5xxl.transformer.{name}" for name in T5]
    file += ["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight", FACTS]
    for part, names in NAMES.items():
        assert set(choose(file, part).names) == set(names), part


def test_a_transformer_without_a_prefix_beside_a_vae_with_one():
    file = [*SIGMA, *(f"vae.{name}" for name in VAE)]
    assert set(choose(file, "transformer").names) == set(SIGMA)
    assert set(choose(file, "vae").names) == set(VAE)


def test_what_nobody_owns_is_kept_to_be_named():
    names = [*(f"model.diffusion_model.{name}" for name in SIGMA), "surprise"]
    assert "surprise" in choose(names, "transformer").names


@pytest.mark.parametrize("average", ["ema.", "model_ema.", "state_dict_ema.", "model_ema.module."])
def test_weights_go_before_their_averages(average):
    names = [*SIGMA, *(average + name for name in SIGMA), f"{average}decay", "num_updates"]
    choice = choose(names, "transformer")
    assert choice.names == {name: name for name in SIGMA}
    assert choice.average == "left"
    alone = choose([*(average + name for name in SIGMA), f"{average}num_updates"], "transformer")
    assert (set(alone.names), alone.average) == (set(SIGMA), "taken")


def test_averages_whose_names_lost_their_dots():
    names = [f"first_stage_model.{name}" for name in VAE]
    averages = ["model_ema." + name.replace(".", "") for name in VAE]
    assert set(choose(names + averages, "vae").names) == set(VAE)
    assert "decoderother" in choose([*names, "model_ema.decoderother"], "vae").names


def test_one_weight_twice(tmp_path):
    save_file({name: torch.zeros(1) for name in (*SIGMA, f"module.{SIGMA[0]}")}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"twice, as .*{SIGMA[0]} and as .*{SIGMA[0]}"):
        read_header(tmp_path / "a.safetensors", part="transformer")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (SIGMA, "a PixArt-Sigma transformer"),
        (T5, "a T5 text encoder"),
        (VAE, "a VAE"),
        (("lora_unet_blocks_0_attn_qkv.lora_down.weight",), "a LoRA"),
        (("controlnet_blocks.0.before_proj.weight", *SIGMA), "a ControlNet"),
        (("control_model.input_blocks.0.0.weight",), "a ControlNet"),
        (("text_model.encoder.layers.0.mlp.fc1.weight",), "a CLIP text encoder"),
        (("something.else",), None),
    ],
)
def test_kinds(names, words):
    kind = kind_of(names)
    assert (kind and kind.words) == words


def test_a_file_of_other_parts_is_called_what_it_is(tmp_path):
    path = tmp_path / "a.safetensors"
    for part, names in NAMES.items():
        save_file({name: torch.zeros(1) for name in names}, path)
        for other in NAMES.keys() - {part}:
            with pytest.raises(
                CheckpointError, match=f"is {kind_of(names).words}, not {kind_of(NAMES[other]).words}"
            ):
                read_state_dict(path, part=other)
    both = {f"vae.{name}": torch.zeros(1) for name in VAE} | {
        f"text_encoder.{name}": torch.zeros(1) for name in T5
    }
    save_file(both, path)
    with pytest.raises(CheckpointError, match="is a.* and a.*, not a PixArt-Sigma transformer"):
        read_state_dict(path, part="transformer")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": "weights", "state_dict_ema": "averages", "optimizer": {"state": {0: {"exp_avg": 1}}}},
        {"model": "weights", "ema": "averages", "opt": {"exp_avg": "averages"}, "args": Namespace(lr=1e-4)},
        {"state_dict": "weights", "rng_state": {"torch": torch.zeros(3, dtype=torch.uint8)}, "step": 1},
        {"module": "weights", "epoch": 3, "global_steps": 9, "lr_scheduler": {"last_epoch": 1}},
        {"model_state_dict": "weights", "optimizer_state_dict": {"exp_avg": "averages"}},
        {"ema": "weights", "step": torch.tensor(5)},
        {"model": {"transformer": "weights", "vae": {VAE[0]: torch.zeros(2)}}, "step": 3},
    ],
)
def test_training_checkpoints(tmp_path, content):
    made = {
        "weights": {name: torch.ones(2) for name in SIGMA},
        "averages": {name: torch.zeros(2) for name in SIGMA},
    }

    def fill(value):
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return made.get(value, value) if isinstance(value, str) else value

    torch.save(fill(content), tmp_path / "a.pth")
    weights = read_state_dict(tmp_path / "a.pth", part="transformer")
    assert weights.keys() == set(SIGMA)
    assert all(bool(tensor.all()) for tensor in weights.values())


def test_metadata(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"modelspec.resolution": "512x512"})
    assert read_metadata(tmp_path / "a.safetensors") == {"modelspec.resolution": "512x512"}
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    assert read_metadata(tmp_path / "a.pth") == {}
