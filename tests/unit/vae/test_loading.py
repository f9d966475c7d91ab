"""A VAE is read the same from every kind of file, and what is none says what it is."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_sigma.errors import CheckpointError
from pixart_sigma.vae.coding import decode_dtype
from pixart_sigma.vae.loading import load_vae, read_vae

ORIGINAL_NAMES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{3 - int(found[1])}.block.{found[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
OLD_NAMES = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


@pytest.fixture(scope="module")
def weights(pipeline_folder):
    return load_file(pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors")


def is_attention(key):
    return re.search(r"(attentions\.0\.(to_|query|key|value|proj)|attn_1\.(q|k|v|proj_out)).*weight", key)


def original(weights, convolutions=True):
    renamed = {}
    for key, tensor in weights.items():
        for pattern, name in ORIGINAL_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor[:, :, None, None] if convolutions and is_attention(key) else tensor
    return renamed


def old(weights, convolutions=False):
    renamed = {}
    for key, tensor in weights.items():
        for today, before in OLD_NAMES:
            key = key.replace(f"attentions.0.{today}", f"attentions.0.{before}")
        renamed[key] = tensor[:, :, None, None] if convolutions and is_attention(key) else tensor
    return renamed


def prefixed(prefix, weights):
    return {prefix + key: tensor for key, tensor in weights.items()}


COUNT = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(5)}
FORMS = {
    "diffusers": lambda weights: weights,
    "the original release": original,
    "the original release, linear attention": lambda weights: original(weights, convolutions=False),
    "old attention names": old,
    "old attention names, convolutions": lambda weights: old(weights, convolutions=True),
    "vae.": lambda weights: prefixed("vae.", original(weights)),
    "first_stage_model.": lambda weights: prefixed("first_stage_model.", original(weights)),
    "module.vae.": lambda weights: prefixed("module.vae.", weights),
    "beside a transformer": lambda weights: (
        prefixed("vae.", original(weights)) | {"model.diffusion_model.t_block.1.weight": torch.zeros(2)}
    ),
    "a training run": lambda weights: (
        original(weights)
        | prefixed(
            "model_ema.", {key.replace(".", ""): tensor * 0 for key, tensor in original(weights).items()}
        )
        | COUNT
        | {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.tensor(0.0)}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_the_same(tmp_path, weights, pipeline_folder, form):
    made = {key: tensor.clone().contiguous() for key, tensor in FORMS[form](weights).items()}
    save_file(made, tmp_path / "vae.safetensors")
    found, expected = load_vae(tmp_path / "vae.safetensors"), load_vae(pipeline_folder / "vae")
    assert found.config.scaling_factor == expected.config.scaling_factor
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


def test_a_pipelines_folder_has_its_vae(weights, pipeline_folder):
    loaded = load_vae(pipeline_folder).state_dict()
    assert all(torch.equal(loaded[key], weights[key].float()) for key in weights)


def test_averages_of_a_training_checkpoint(tmp_path, weights):
    torch.save(
        {"state_dict": weights, "state_dict_ema": prefixed("", weights), "epoch": 1}, tmp_path / "vae.ckpt"
    )
    assert read_vae(tmp_path / "vae.ckpt")[0].keys() == weights.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder.conv_in.weight": torch.tensor(1.0)}, "not that of a picture's convolution"),
        ({"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3, 3)}, "encoder.conv_in.weight is"),
        ({"decoder.conv_out.weight": torch.zeros(3, 16, 3, 3)}, r"conv_out.weight is \(3, 16, 3, 3\), not"),
        ({"surprise": torch.zeros(1)}, "unknown key surprise"),
        ({"encoder.conv_in.weight": torch.zeros(2, dtype=torch.int8)}, r"quantised VAE \(int8\)"),
    ],
)
@pytest.mark.parametrize("form", ["diffusers", "the original release"])
def test_what_does_not_fit_is_named(tmp_path, weights, change, words, form):
    made = {key: tensor.contiguous() for key, tensor in FORMS[form](weights).items()}
    save_file(made | change, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=words):
        read_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("form", ["diffusers", "the original release"])
def test_a_missing_weight_is_named(tmp_path, weights, form):
    made = {key: tensor.contiguous() for key, tensor in FORMS[form](weights).items()}
    del made["decoder.conv_out.bias"]
    save_file(made, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="lacks decoder.conv_out.bias"):
        read_vae(tmp_path / "vae.safetensors")


def test_the_vae_of_stable_diffusion_1(tmp_path, weights, pipeline_folder):
    """Alone its weights look like SDXL's; a config beside it or the model that it stands beside tells."""
    folder = tmp_path / "vae"
    shutil.copytree(pipeline_folder / "vae", folder)
    settings = json.loads((folder / "config.json").read_text()) | {"scaling_factor": 0.18215}
    (folder / "config.json").write_text(json.dumps(settings))
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(CheckpointError, match="Stable Diffusion 1.x"):
            read_vae(path)
    whole = prefixed("first_stage_model.", weights)
    whole["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(2)
    save_file(whole, tmp_path / "sd15.safetensors")
    with pytest.raises(CheckpointError, match="Stable Diffusion 1.x"):
        read_vae(tmp_path / "sd15.safetensors")


def test_a_config_without_a_scaling_factor_means_that_of_sdxl(tmp_path, pipeline_folder):
    """diffusers has that of Stable Diffusion 1.x as its default."""
    assert (
        load_vae(with_config(pipeline_folder, tmp_path / "a", scaling_factor=None)).config.scaling_factor
        == 0.13025
    )
    assert (
        load_vae(with_config(pipeline_folder, tmp_path / "b", scaling_factor=0.2)).config.scaling_factor
        == 0.2
    )


def test_a_vae_that_overflows_in_half_precision_decodes_in_full(tmp_path, pipeline_folder):
    """Which is what a config means that does not say otherwise."""
    for number, (upcast, expected) in enumerate(((None, torch.float32), (False, torch.float16))):
        folder = with_config(pipeline_folder, tmp_path / str(number), force_upcast=upcast)
        assert decode_dtype(load_vae(folder, torch.float16), torch.float16) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shift_factor": 0.1159}, "shift_factor 0.1159, which PixArt-Sigma is run without"),
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, r"latents_mean \[0.1, 0.2"),
        ({"latents_std": [5.0, 5.0, 5.0, 5.0]}, r"latents_std \[5.0, 5.0"),
        ({"act_fn": "relu"}, "act_fn 'relu'"),
        ({"scaling_factor": "much"}, "scaling_factor 'much'; SDXL's VAE has 0.13025"),
        ({"scaling_factor": 0}, "scaling_factor 0"),
        ({"use_quant_conv": False}, "unknown key quant_conv"),
        ({"layers_per_block": 2}, "lacks"),
        ({"layers_per_block": 10**5}, "layers_per_block 100000, which no VAE"),
        ({"layers_per_block": -1}, "layers_per_block -1, which no VAE"),
        ({"block_out_channels": [10**9] * 4}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [True] * 4}, "block_out_channels"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 1000}, "down_block_types"),
        ({"up_block_types": ["x"] * 4}, "up_block_types"),
        ({"norm_num_groups": 0}, "norm_num_groups 0"),
        ({"norm_num_groups": 7}, "can not be used|divisible by num_groups"),
        ({"in_channels": 16}, r"conv_in.weight is \(32, 3, 3, 3\), not \(32, 16"),
        ({"sample_size": "x"}, "sample_size 'x'"),
        ({"force_upcast": "x"}, "force_upcast 'x'"),
        ({"scaling_factor": -1}, "scaling_factor -1"),
        ({"scaling_factor": float("inf")}, "scaling_factor inf"),
    ],
)
def test_a_config_that_contradicts_is_named(tmp_path, pipeline_folder, settings, words):
    with pytest.raises(CheckpointError, match=words):
        read_vae(with_config(pipeline_folder, tmp_path / "vae", **settings))


@pytest.mark.parametrize("settings", [{"self": 1}, {"_class_name": 5}, {"unknown": {"a": [1]}}])
def test_what_a_config_says_beside_that_reaches_nobody(tmp_path, pipeline_folder, settings):
    config = read_vae(with_config(pipeline_folder, tmp_path / "vae", **settings))[1]
    assert config == read_vae(pipeline_folder / "vae")[1]


def test_weights_of_whole_numbers_are_refused(tmp_path, weights):
    made = weights | {"decoder.conv_in.bias": weights["decoder.conv_in.bias"].long()}
    save_file(made, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias holds torch.int64 numbers"):
        read_vae(tmp_path / "vae.safetensors")


def test_a_loaded_vae_does_not_read_from_its_file(tmp_path, pipeline_folder):
    """It could not go on when that is cut off."""
    folder = with_config(pipeline_folder, tmp_path / "vae")
    vae = load_vae(folder)
    os.truncate(folder / "diffusion_pytorch_model.safetensors", 100)
    assert all(parameter.isfinite().all() for parameter in vae.parameters())


def with_config(pipeline_folder, folder, **settings):
    """The VAE's folder with other settings; what is None is left out."""
    shutil.copytree(pipeline_folder / "vae", folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    kept = {name: value for name, value in config.items() if settings.get(name, 0) is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_other_models(pipeline_folder):
    for name, words in (("transformer", "a PixArt-Sigma transformer"), ("text_encoder", "a T5 text encoder")):
        with pytest.raises(CheckpointError, match=f"is {words}, not a VAE"):
            read_vae(pipeline_folder / name)
