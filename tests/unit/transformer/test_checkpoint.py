"""Every published format is read the same, and every file that is not one says what it is."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from pixart_sigma import DEMO
from pixart_sigma.components import Components
from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.files.locating import find_weight_files
from pixart_sigma.files.parts import FACTS
from pixart_sigma.files.weight_files import check_file, facts_tensor, read_header, read_state_dict
from pixart_sigma.noise_schedule import PUBLISHED, NoiseSchedule
from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
from pixart_sigma.transformer.config import KVWeights
from pixart_sigma.transformer.keys import to_diffusers_keys, to_original_keys
from pixart_sigma.transformer.variant import ONETRAINER


def assert_same(state_dict, expected):
    assert state_dict.keys() == expected.keys()
    for key in expected:
        assert torch.equal(state_dict[key].float(), expected[key].float()), key


def with_config(folder: Path, target: Path, remove=(), **changes) -> Path:
    shutil.copytree(folder, target)
    settings = json.loads((target / "config.json").read_text()) | changes
    for name in remove:
        settings.pop(name, None)
    (target / "config.json").write_text(json.dumps(settings))
    return target


# The formats


def test_pipeline_folder(pipeline_folder, diffusers_state_dict):
    found = inspect(pipeline_folder)
    assert (found.kind, found.key_style, found.dtype) == ("pipeline", "diffusers", torch.float32)
    assert (found.variant, found.variant_source) == ("1024", "config")
    assert set(found.components) == {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"}
    assert found.components["vae"] == pipeline_folder / "vae"
    assert found.files == (pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors",)
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)


def test_config_builds_the_same_network(tiny_transformer, transformer_folder):
    from diffusers import PixArtTransformer2DModel

    config = inspect(transformer_folder).config
    with torch.device("meta"):
        built = PixArtTransformer2DModel(**config.to_diffusers())
    for name in config.to_diffusers():
        assert built.config[name] == tiny_transformer.config[name], name
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (2, 2, 72)
    assert (config.qk_norm, config.kv_compression) == (False, None)


def test_transformer_folder_and_its_file(transformer_folder, diffusers_state_dict):
    for path in (transformer_folder, transformer_folder / "diffusion_pytorch_model.safetensors"):
        found = inspect(path)
        assert (found.kind, found.variant_source) == ("transformer", "config")
        assert found.components == {"transformer": path}
        assert_same(load_transformer_state_dict(found), diffusers_state_dict)


def test_diffusers_single_file(diffusers_file, diffusers_state_dict):
    found = inspect(str(diffusers_file))
    assert (found.key_style, found.variant, found.variant_source) == ("diffusers", "1024", "default")
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)


def test_pickled_transformer_folder(tmp_path, diffusers_state_dict):
    torch.save(diffusers_state_dict, tmp_path / "diffusion_pytorch_model.bin")
    assert_same(load_transformer_state_dict(inspect(tmp_path)), diffusers_state_dict)


def test_sharded_folder_and_its_index(sharded_folder, diffusers_state_dict):
    index = sharded_folder / "diffusion_pytorch_model.safetensors.index.json"
    for path in (sharded_folder, index):
        found = inspect(path)
        assert len(found.files) > 1
        assert found.variant_source == "config"
        assert_same(load_transformer_state_dict(found), diffusers_state_dict)


@pytest.mark.parametrize("top", ["state_dict", "state_dict_ema", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model.", "net."])
def test_original_pth(tmp_path, write_original, diffusers_state_dict, top, prefix):
    found = inspect(write_original(tmp_path / "tiny.pth", top=top, prefix=prefix))
    assert (found.key_style, found.kind) == ("original", "transformer")
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.diffusion_model.", "net.", "state_dict.", "model.", "state_dict.module."]
)
def test_original_safetensors(tmp_path, write_original, diffusers_state_dict, prefix):
    found = inspect(write_original(tmp_path / "tiny.safetensors", prefix=prefix))
    assert found.key_style == "original"
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)


def test_state_dict_goes_before_its_average(tmp_path, to_original, diffusers_state_dict):
    weights = to_original(diffusers_state_dict)
    averaged = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    torch.save(
        {"state_dict_ema": averaged, "state_dict": weights, "optimizer": {"lr": 1}}, tmp_path / "a.pth"
    )
    assert_same(load_transformer_state_dict(inspect(tmp_path / "a.pth")), diffusers_state_dict)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_storage_dtypes(tmp_path, write_original, diffusers_state_dict, dtype, suffix):
    found = inspect(write_original(tmp_path / f"tiny.{suffix}", dtype=dtype))
    assert found.dtype == dtype
    expected = {key: tensor.to(dtype) for key, tensor in diffusers_state_dict.items()}
    assert_same(load_transformer_state_dict(found), expected)


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"blocks.0.attn.qkv.weight.quant_state.bitsandbytes__nf4": torch.zeros(2)}, "bitsandbytes nf4"),
        ({"blocks.0.attn.qkv.SCB": torch.zeros(2)}, "bitsandbytes int8"),
        ({"blocks.0.mlp.fc1.wscales": torch.zeros(2)}, "SVDQuant"),
        ({"blocks.0.mlp.fc1.proj_down": torch.zeros(2)}, "SVDQuant"),
        ({"blocks.0.mlp.fc1.qweight": torch.zeros(2, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({"blocks.0.mlp.fc1.zero_point": torch.zeros(2)}, "SDNQ"),
        ({"blocks.0.mlp.fc1.svd_up": torch.zeros(2)}, "SDNQ"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(576, 144, dtype=torch.int8)}, "int8"),
        (
            {
                "blocks.0.mlp.fc1.weight": torch.zeros(576, 144, dtype=torch.int8),
                "blocks.0.mlp.fc1.weight_scale": torch.ones(576, 1),
            },
            "scales beside the weights",  # rotated or not, nothing says
        ),
    ],
)
def test_quantised_weights_are_called_so(tmp_path, write_original, beside, words):
    path = tmp_path / "tiny.safetensors"
    weights = load_file(write_original(path))
    save_file(weights | beside, path)
    with pytest.raises(CheckpointError, match=rf"is a quantised .*\(.*{words}.*\).* Use its weights in"):
        inspect(path)


def test_a_quantised_folder_is_called_so(tmp_path, transformer_folder):
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = with_config(transformer_folder, tmp_path / "a", quantization_config=quantization)
    with pytest.raises(CheckpointError, match=r"quantised PixArt-Sigma transformer \(bitsandbytes nf4\)"):
        inspect(folder)


@pytest.mark.parametrize("key", ["blocks.0.attn.qkv.weight", "x_embedder.proj.weight", "surprise"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_tensor_without_dimensions(tmp_path, write_original, key, name):
    path = write_original(tmp_path / name, extra={key: torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match="weight|parts"):
        inspect(path)


def test_suffix_does_not_matter(tmp_path, write_original, diffusers_state_dict):
    path = write_original(tmp_path / "tiny.safetensors").rename(tmp_path / "tiny.pth")
    assert_same(load_transformer_state_dict(inspect(path)), diffusers_state_dict)


def test_legacy_pickle_warns(tmp_path, diffusers_state_dict):
    path = tmp_path / "old.pth"
    torch.save(diffusers_state_dict, path, _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match=r"before 1\.6"):
        found = inspect(path)
    with pytest.warns(UserWarning, match=r"before 1\.6"):
        assert_same(load_transformer_state_dict(found), diffusers_state_dict)


def test_described_for_people(tmp_path, write_original):
    text = inspect(write_original(tmp_path / "tiny-2K.pth", kv_layers=(1,), dtype=torch.float16)).describe()
    for words in (
        "2K (from file name)",
        "2048 pixels",
        "2 layers",
        "ratio 2 on layers 1",
        "float16",
        "original",
    ):
        assert words in text


# The noise schedule, which is not in the weights


def with_scheduler(folder: Path, **config) -> Path:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_the_noise_schedule_is_that_of_the_pipeline_that_the_transformer_lies_in(tmp_path, pipeline_folder):
    assert inspect(pipeline_folder).noise_schedule == PUBLISHED
    assert "epsilon, linear betas 0.0001 to 0.02, linspace timesteps (from DPMSolverMultistepScheduler)" in (
        inspect(pipeline_folder).describe()
    )
    folder = tmp_path / "finetune"
    shutil.copytree(pipeline_folder / "transformer", folder / "transformer")
    assert "(the published one)" in inspect(folder).describe()
    with_scheduler(
        folder, _class_name="EulerDiscreteScheduler", prediction_type="v_prediction", use_karras_sigmas=True
    )
    expected = NoiseSchedule("v_prediction", sigma_spacing="karras")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (folder, folder / "transformer", weights):
        assert inspect(path).noise_schedule == expected
        assert (
            "v_prediction, linear betas 0.0001 to 0.02, karras sigmas (from Euler" in inspect(path).describe()
        )
    shutil.move(weights, folder / "transformer" / "mine.safetensors")
    assert inspect(folder / "transformer" / "mine.safetensors").noise_schedule == PUBLISHED
    with_scheduler(folder, prediction_type="score")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: prediction_type is 'score'"):
        inspect(folder)


@pytest.mark.parametrize(
    "markers, expected",
    [
        (("v_pred",), NoiseSchedule("v_prediction")),
        (("v_pred", "ztsnr"), NoiseSchedule("v_prediction", rescale_betas_zero_snr=True)),
        ((), PUBLISHED),
    ],
)
def test_the_markers_that_comfyui_writes(tmp_path, write_original, diffusers_state_dict, markers, expected):
    extra = {marker: torch.tensor([]) for marker in markers}
    found = inspect(write_original(tmp_path / "saved.safetensors", extra=extra))
    assert found.noise_schedule == expected
    assert all(marker in found.describe() for marker in markers)
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)


# Only headers


def test_safetensors_weights_are_not_read(tmp_path):
    """A header for 1 TB of weights with nothing but a hole behind it."""
    end = 2**40
    entry = {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, end]}
    header = json.dumps({"big": entry}).encode()
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + end)
        except OSError:
            pytest.skip("this file system has no files with holes of this size")
    assert read_header(path) == {"big": ((2**19, 2**19), torch.float32)}


def test_zip_weights_are_not_read(tmp_path, monkeypatch):
    """Tensors on the meta device have no data: torch maps the file and reads its index alone."""
    seen = []
    load = torch.load

    def spy(*args, **settings):
        seen.append(settings)
        loaded = load(*args, **settings)
        assert all(tensor.is_meta for tensor in loaded.values())
        return loaded

    torch.save({"a": torch.ones(512, 512)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", spy)
    assert read_header(tmp_path / "a.pth") == {"a": ((512, 512), torch.float32)}
    assert len(seen) == 1
    assert seen[0]["mmap"] is True and seen[0]["weights_only"] is True


# Which variant


@pytest.mark.parametrize(
    ("patches", "variant", "sample_size", "scale"),
    [(256, "256", 32, 0.5), (1024, "512", 64, 1), (4096, "1024", 128, 2), (16384, "2K", 256, 4)],
)
def test_variant_from_pos_embed(tmp_path, write_original, patches, variant, sample_size, scale):
    found = inspect(write_original(tmp_path / "PixArt-Sigma-XL-2-1024-MS.pth", pos_embed=patches))
    assert (found.variant, found.variant_source) == (variant, "pos_embed")
    assert (found.config.sample_size, found.config.interpolation_scale) == (sample_size, scale)


def test_variant_from_file_name(tmp_path, write_original):
    found = inspect(write_original(tmp_path / "pixartSigma_2kFp16.pth"))
    assert (found.variant, found.variant_source, found.variant_notice) == ("2K", "file name", "")


def test_a_guess_is_said_to_be_one(tmp_path, write_original):
    found = inspect(write_original(tmp_path / "sigma.pth"))
    assert (found.variant, found.variant_source) == ("1024", "default")
    assert "Nothing says" in found.variant_notice and "sigma.pth" in found.variant_notice
    assert "1024" in found.variant_notice


def test_variant_from_folder_name(tmp_path, transformer_folder):
    folder = tmp_path / "PixArt-Sigma-XL-2-512-MS"
    folder.mkdir()
    shutil.copy(transformer_folder / "diffusion_pytorch_model.safetensors", folder)
    assert inspect(folder).variant == "512"
    assert inspect(folder / "diffusion_pytorch_model.safetensors").variant == "512"


@pytest.mark.parametrize(
    ("variant", "sample_size", "scale"), [("256", 32, 0.5), ("512", 64, 1), ("2K", 256, 4)]
)
def test_scale_of_a_config_without_one(tmp_path, transformer_folder, variant, sample_size, scale):
    folder = with_config(
        transformer_folder, tmp_path / "1024", remove=["interpolation_scale"], sample_size=sample_size
    )
    found = inspect(folder)
    assert (found.variant, found.variant_source) == (variant, "config")
    assert found.config.interpolation_scale == scale


def test_explicit_scale_wins_over_the_table(tmp_path, transformer_folder):
    folder = with_config(transformer_folder, tmp_path / "a", sample_size=32, interpolation_scale=1.5)
    assert inspect(folder).config.interpolation_scale == 1.5


def test_user_wins_over_config_and_pos_embed(tmp_path, transformer_folder, write_original):
    for path in (transformer_folder, write_original(tmp_path / "a-512.pth", pos_embed=4096)):
        found = inspect(path, variant="256")
        assert (found.variant, found.variant_source) == ("256", "user")
        assert (found.config.sample_size, found.config.interpolation_scale) == (32, 0.5)


def test_unknown_variant(transformer_folder):
    with pytest.raises(CheckpointError, match="'4K'.*2K"):
        inspect(transformer_folder, variant="4K")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample_size": 48}, "sample_size 48"),
        ({"interpolation_scale": 0}, "interpolation_scale 0"),
        ({"interpolation_scale": "2"}, "interpolation_scale '2'"),
        ({"num_layers": 28}, "num_layers 28"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"num_attention_heads": 4}, "4 heads of 72"),
        ({"caption_channels": 4096}, "caption_channels 4096"),
        ({"norm_type": "layer_norm"}, "norm_type 'layer_norm'"),
    ],
)
def test_config_that_contradicts_the_weights(tmp_path, transformer_folder, changes, words):
    folder = with_config(transformer_folder, tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=words):
        inspect(folder)


def test_heads_from_config_then_width(tmp_path, transformer_folder, diffusers_file):
    folder = with_config(transformer_folder, tmp_path / "a", num_attention_heads=4, attention_head_dim=36)
    assert inspect(folder).config.num_attention_heads == 4
    assert inspect(diffusers_file).config.attention_head_dim == 72


def test_heads_that_the_width_does_not_tell(tmp_path):
    """The demo's width of 192 is 6 heads of 32, and would be 3 of 64."""
    file = shutil.copy(
        DEMO / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "demo.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"how many heads .* config\.json"):
        inspect(file)
    shutil.copy(DEMO / "transformer" / "config.json", tmp_path)
    assert inspect(tmp_path).config.num_attention_heads == 6


def test_what_was_saved_with_the_weights(tmp_path):
    saved = inspect(DEMO / "transformer")
    assert saved.latent_format == "demo"
    weights = load_transformer_state_dict(saved)
    save_file(weights | {FACTS: facts_tensor(saved.facts)}, tmp_path / "any.safetensors")
    found = inspect(tmp_path / "any.safetensors")
    assert (found.config, found.latent_format) == (saved.config, "demo")
    assert (found.variant, found.variant_source) == ("256", "config")
    assert_same(load_transformer_state_dict(found), weights)
    torn = {FACTS: torch.frombuffer(bytearray(b"{"), dtype=torch.uint8)}
    save_file(weights | torn, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match="says of itself"):
        inspect(tmp_path / "torn.safetensors")


# KV weights and qk-norm


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_kv_weights(tmp_path, write_original, trained_state_dict, ratio, layers):
    found = inspect(write_original(tmp_path / "a.pth", kv_layers=layers, kv_ratio=ratio))
    assert found.config.kv_compression == KVWeights(ratio, layers)
    assert_same(load_transformer_state_dict(found), trained_state_dict(layers, ratio))


def test_kv_weights_and_qk_norm_in_diffusers_keys(tmp_path, trained_state_dict):
    trained = trained_state_dict((0,), 2, qk_norm=True)
    save_file(trained, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert (found.config.qk_norm, found.config.kv_compression) == (True, KVWeights(2, (0,)))
    assert_same(load_transformer_state_dict(found), trained)


@pytest.mark.parametrize("converter", [False, True])
def test_qk_norm(tmp_path, write_original, trained_state_dict, converter):
    trained = trained_state_dict(qk_norm=True)
    if converter:  # diffusers' script keeps the authors' names for these alone
        renamed = {key.replace("attn1.norm_q", "attn1.q_norm"): tensor for key, tensor in trained.items()}
        renamed = {key.replace("attn1.norm_k", "attn1.k_norm"): tensor for key, tensor in renamed.items()}
        path = tmp_path / "a.safetensors"
        save_file(renamed, path)
    else:
        path = write_original(tmp_path / "a.pth", qk_norm=True)
    found = inspect(path)
    assert found.config.qk_norm
    assert_same(load_transformer_state_dict(found), trained)


def test_authors_names_and_back(trained_state_dict, to_original):
    trained = trained_state_dict((0,), 2, qk_norm=True)
    names = to_original_keys(trained)
    assert names.keys() == to_original(trained).keys()
    assert all(to_diffusers_keys(name) == parts for name, parts in names.items())
    del trained["transformer_blocks.0.attn1.to_k.weight"]  # what lacks a part is kept as it is
    assert "transformer_blocks.0.attn1.to_q.weight" in to_original_keys(trained)


@pytest.mark.parametrize("name", ["sr.weight", "sr.bias", "norm.weight", "norm.bias"])
def test_half_of_the_kv_weights(tmp_path, trained_state_dict, name):
    trained = trained_state_dict((0, 1))
    key = f"transformer_blocks.1.attn1.{name}"
    del trained[key]
    save_file(trained, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks the weight {key}"):
        inspect(tmp_path / "a.safetensors")


def test_different_ratios(tmp_path, trained_state_dict):
    mixed = trained_state_dict((0,), 2) | {
        key: tensor for key, tensor in trained_state_dict((1,), 4).items() if ".1.attn1." in key
    }
    save_file(mixed, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="layer 0: 2, layer 1: 4"):
        inspect(tmp_path / "a.safetensors")


# Keys


@pytest.mark.parametrize(
    "key",
    ["t_block.1.weight", "blocks.1.attn.qkv.bias", "final_layer.scale_shift_table", "blocks.0.mlp.fc2.bias"],
)
def test_missing_key_is_named(tmp_path, to_original, diffusers_state_dict, key):
    weights = to_original(diffusers_state_dict)
    del weights[key]
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="lacks the weight"):
        inspect(tmp_path / "a.pth")


def test_missing_block_is_named(tmp_path, diffusers_state_dict):
    kept = {key: t for key, t in diffusers_state_dict.items() if not key.startswith("transformer_blocks.0.")}
    save_file(kept, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the weight transformer_blocks\.0\."):
        inspect(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["blocks.0.attn.extra.weight", "surprise", "blocks.1.attn.qkv.lokr"])
def test_left_over_key_is_named(tmp_path, write_original, key):
    path = write_original(tmp_path / "a.pth", extra={key: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=key):
        inspect(path)


def test_left_over_diffusers_key_and_prefix(tmp_path, diffusers_state_dict):
    for key in (
        "transformer_blocks.0.attn1.to_q.weight.scale",
        "transformer_blocks.9.scale_shift_table",
        "ema.x",
    ):
        save_file(diffusers_state_dict | {key: torch.zeros(3)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="has the weight|lacks the weight"):
            inspect(tmp_path / "a.safetensors")


def test_wrong_shape_is_named(tmp_path, diffusers_state_dict):
    key = "transformer_blocks.1.ff.net.0.proj.bias"
    save_file(diffusers_state_dict | {key: torch.zeros(7)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"{key} is \(7,\)"):
        inspect(tmp_path / "a.safetensors")


def test_file_changed_after_inspection(tmp_path, write_original):
    path = write_original(tmp_path / "a.pth")
    found = inspect(path)
    write_original(path, kv_layers=(1,))
    with pytest.raises(CheckpointError, match=r"attn1\.norm\.bias"):
        load_transformer_state_dict(found)


# Other models


@pytest.mark.parametrize("key", ["csize_embedder.mlp.0.weight", "ar_embedder.mlp.2.bias"])
def test_alpha_by_original_key(tmp_path, write_original, key):
    path = write_original(tmp_path / "a.pth", extra={key: torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=f"PixArt-alpha.*{key}"):
        inspect(path)


def test_a_null_caption_of_alphas_length_is_no_alpha(tmp_path, write_original, diffusers_state_dict):
    """ComfyUI writes 120 rows for any PixArt."""
    extra = {"y_embedder.y_embedding": torch.zeros(120, 64)}
    found = inspect(write_original(tmp_path / "a.pth", extra=extra))
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)


def test_what_is_computed_anew_in_diffusers_keys(tmp_path, diffusers_state_dict):
    extra = {
        "caption_projection.y_embedding": torch.zeros(120, 64),
        "pos_embed.pos_embed": torch.zeros(1, 4, 144),
    }
    save_file(diffusers_state_dict | extra, tmp_path / "a.safetensors")
    assert_same(load_transformer_state_dict(inspect(tmp_path / "a.safetensors")), diffusers_state_dict)


def test_alpha_by_diffusers_key(tmp_path, diffusers_state_dict):
    key = "adaln_single.emb.resolution_embedder.linear_1.weight"
    save_file(diffusers_state_dict | {key: torch.zeros(4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="PixArt-alpha.*resolution_embedder"):
        inspect(tmp_path / "a.safetensors")


def test_alpha_by_config(tmp_path, transformer_folder):
    folder = with_config(transformer_folder, tmp_path / "a", use_additional_conditions=True)
    with pytest.raises(CheckpointError, match="PixArt-alpha.*use_additional_conditions"):
        inspect(folder)


def test_alpha_by_pipeline(tmp_path, pipeline_folder):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "PixArtAlphaPipeline"}))
    assert inspect(folder).kind == "pipeline"  # early Sigma folders carry that class
    vae = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(vae | {"scaling_factor": 0.18215}))
    with pytest.raises(CheckpointError, match="PixArt-alpha.*0.18215"):
        inspect(folder)


@pytest.mark.parametrize(
    ("component", "words"), [("text_encoder", "is a T5 text encoder"), ("vae", "is a VAE")]
)
def test_component_given_as_transformer(tmp_path, pipeline_folder, component, words):
    folder = pipeline_folder / component
    file = next(folder.glob("*.safetensors"))
    for path in (folder, file, shutil.copy(file, tmp_path / "transformer.safetensors")):
        with pytest.raises(CheckpointError, match=words):
            inspect(path)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.diffusion_model.label_emb.0.0.weight", "is SDXL"),
        ("add_embedding.linear_1.weight", "is SDXL"),
        ("model.diffusion_model.input_blocks.0.0.weight", "is Stable Diffusion"),
        ("double_blocks.0.img_attn.qkv.weight", "is Flux"),
        ("transformer_blocks.0.attn1.to_q.lora_A.weight", "is a LoRA"),
        ("controlnet_blocks.0.before_proj.weight", "is a ControlNet"),
        ("something.else", "first weight is something.else"),
    ],
)
def test_other_model(tmp_path, key, words):
    save_file({key: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=words):
        inspect(tmp_path / "a.safetensors")


# Files that are none


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "is GGUF without any weights"),
    ],
)
def test_file_that_is_no_model(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    for read in (check_file, inspect, read_state_dict, read_header):
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / name)


def test_noise_is_no_model(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"just a note")
    with pytest.raises(CheckpointError, match="neither safetensors, GGUF nor"):
        check_file(tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_bytes(b"just a note")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        check_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [3, 8, 100, -1])
def test_truncated_safetensors(tmp_path, diffusers_file, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(diffusers_file.read_bytes()[:length])
    for read in (check_file, inspect, read_state_dict):
        with pytest.raises(CheckpointError, match="is cut off"):
            read(path)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_truncated_pth(tmp_path, write_original, share):
    whole = write_original(tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "a.pth"
    path.write_bytes(whole[: int(len(whole) * share)])
    for read in (check_file, inspect, read_state_dict):
        with pytest.raises(CheckpointError, match="is cut off"):
            read(path)


@pytest.mark.filterwarnings("ignore:.*before 1")
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_truncated_legacy_pickle(tmp_path, share):
    torch.save({"a": torch.ones(100)}, tmp_path / "whole.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(tmp_path / "a.pth")


def test_damaged_safetensors_header(tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="header"):
        check_file(tmp_path / "a.safetensors")
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="can not be read"):
        read_header(tmp_path / "a.safetensors")


def test_zip_without_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(CheckpointError, match="zip archive"):
        check_file(tmp_path / "a.pth")


class RunsCode:
    """Creates `marker` when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:.*before 1", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "new"])
def test_pickle_with_code_is_refused(tmp_path, form):
    marker, path = tmp_path / "ran", tmp_path / "a.pth"
    content = {"state_dict": {"x": torch.ones(2)}, "args": RunsCode(marker)}
    if form in ("bare", "new"):
        path.write_bytes(pickle.dumps(RunsCode(marker), protocol=2 if form == "bare" else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for read in (inspect, read_header, read_state_dict):
        with pytest.raises(
            CheckpointError, match=r"was refused: it holds \w+\.mkdir" if form != "new" else "read safely"
        ):
            read(path)
        assert not marker.exists()
    pickle.loads(pickle.dumps(RunsCode(marker)))
    assert marker.exists()  # so the file would have run it


def test_pickle_of_something_else(tmp_path):
    for content in ([1, 2], {"a": 3}, {}, {1: torch.ones(1)}, {"state_dict": {"a": "b"}}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="holds a"):
            read_state_dict(tmp_path / "a.pth")


def test_missing_path(tmp_path):
    for read in (check_file, inspect, read_state_dict):
        with pytest.raises(CheckpointError, match=r"There is no file .*gone\.safetensors"):
            read(tmp_path / "gone.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="link to a file that is gone"):
        inspect(tmp_path / "link.safetensors")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
@pytest.mark.parametrize("target", ["file", "folder"])
def test_no_permission(tmp_path, write_original, target):
    path = write_original(tmp_path / "a.pth")
    closed = path if target == "file" else tmp_path
    mode = closed.stat().st_mode
    user = os.geteuid()
    closed.chmod(0)
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        for read in (check_file, inspect, read_state_dict):
            with pytest.raises(CheckpointError, match="(?i)permission"):
                read(path)
        if target == "folder":
            with pytest.raises(CheckpointError, match="(?i)permission|can not be read"):
                inspect(tmp_path)
    finally:
        os.seteuid(user)
        closed.chmod(mode)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no model in it, only nothing"):
        inspect(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(CheckpointError, match="no model in it, only README.md"):
        inspect(tmp_path)


def test_pipeline_without_transformer(tmp_path, pipeline_folder):
    folder = tmp_path / "pixart_sigma_sdxlvae_T5_diffusers"
    shutil.copytree(pipeline_folder, folder, ignore=shutil.ignore_patterns("transformer"))
    with pytest.raises(CheckpointError, match="has no transformer, only tokenizer, text_encoder, vae"):
        inspect(folder)


def test_a_folder_of_components_without_a_model_index(tmp_path, pipeline_folder):
    shutil.copytree(pipeline_folder / "transformer", tmp_path / "only" / "transformer")
    found = inspect(tmp_path / "only")
    assert found.kind == "pipeline" and list(found.components) == ["transformer"]
    shutil.copytree(pipeline_folder / "vae", tmp_path / "vae only" / "vae")
    with pytest.raises(CheckpointError, match="has no transformer, only vae"):
        inspect(tmp_path / "vae only")


def test_folder_with_a_choice(tmp_path, diffusers_state_dict):
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="several weight files .one.safetensors, two.safetensors"):
        inspect(tmp_path)


def test_broken_config(tmp_path, transformer_folder):
    folder = with_config(transformer_folder, tmp_path / "a")
    for text in ("{", "[]", "<html>"):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config.json"):
            inspect(folder)


# Variants, shards and Hugging Face's cache


@pytest.mark.parametrize("library", ["diffusers", "transformers", "diffusers, pickles"])
def test_variants_as_the_libraries_write_them(tmp_path, tiny_transformer, pipeline_folder, library):
    """The plain files where they are too, else the only variant, whole or in shards."""
    model, kind = tiny_transformer, {"safe_serialization": False} if "pickles" in library else {}
    if library == "transformers":
        model = T5EncoderModel.from_pretrained(pipeline_folder / "text_encoder")
    expected = set(model.state_dict())
    model.save_pretrained(tmp_path / "whole", variant="fp16", **kind)
    model.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="400KB", **kind)
    assert [file.name.split(".")[1] for file in find_weight_files(tmp_path / "whole")] == ["fp16"]
    shards = find_weight_files(tmp_path / "shards")
    assert len(shards) > 1 and all(".fp16-0" in shard.name for shard in shards)
    for folder in ("whole", "shards"):
        assert expected - {"encoder.embed_tokens.weight"} <= set(read_header(tmp_path / folder))
    with pytest.raises(
        CheckpointError, match=f"one of {len(shards)} parts of a model. Choose its folder, .*shards"
    ):
        read_state_dict(shards[0])

    model.save_pretrained(tmp_path / "whole", variant="bf16", **kind)
    with pytest.raises(CheckpointError, match=r"several variants \(bf16, fp16\): choose one of its files"):
        read_header(tmp_path / "whole")
    model.save_pretrained(tmp_path / "whole", **kind)
    assert [file.name.count(".") for file in find_weight_files(tmp_path / "whole")] == [1]


def test_the_older_spelling_of_a_variants_shards(tmp_path, sharded_folder, diffusers_state_dict):
    shutil.copytree(sharded_folder, tmp_path / "a")
    index = tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json"
    index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
        index.read_text().replace(".safetensors", ".fp16.safetensors")
    )
    index.unlink()
    for shard in (tmp_path / "a").glob("*.safetensors"):
        shard.rename(shard.with_name(shard.name.replace(".safetensors", ".fp16.safetensors")))
    assert_same(load_transformer_state_dict(inspect(tmp_path / "a")), diffusers_state_dict)


def cached(folder: Path, target: Path, snapshots=("abc",), main: str | None = "abc") -> Path:
    """A folder as huggingface_hub keeps a repository: links in snapshots, and which of them is main."""
    shutil.copytree(folder, target / "blobs")
    for snapshot in snapshots:
        for file in (path for path in (target / "blobs").rglob("*") if path.is_file()):
            link = target / "snapshots" / snapshot / file.relative_to(target / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    if main is not None:
        (target / "refs").mkdir()
        (target / "refs" / "main").write_text(main)
    return target


def test_hugging_faces_cache(tmp_path, pipeline_folder, diffusers_state_dict):
    one = cached(pipeline_folder, tmp_path / "models--owner--one", main=None)
    two = cached(pipeline_folder, tmp_path / "models--owner--two", ("abc", "def"), "def\n")
    shutil.rmtree(two / "snapshots" / "abc" / "transformer")
    for path in (one, two, one / "snapshots" / "abc"):
        found = inspect(path)
        assert found.kind == "pipeline" and found.variant_source == "config"
        assert_same(load_transformer_state_dict(found), diffusers_state_dict)
    assert Components.find(two).names() == dict.fromkeys(("transformer", "text_encoder", "vae"), "two")
    alone = cached(pipeline_folder / "transformer", tmp_path / "models--owner--alone")
    assert_same(read_state_dict(alone), diffusers_state_dict)

    for main in ("../../../etc", "gone"):
        (two / "refs" / "main").write_text(main)
        with pytest.raises(CheckpointError, match="with 2 snapshots, and refs/main names none of them"):
            inspect(two)
    shutil.rmtree(one / "snapshots" / "abc")
    with pytest.raises(CheckpointError, match="with no snapshot"):
        inspect(one)


def test_what_a_folder_lacks_is_named_at_once(tmp_path, pipeline_folder, transformer_folder, diffusers_file):
    shutil.copytree(pipeline_folder / "transformer", tmp_path / "mine" / "transformer")
    both = (
        "no text_encoder and no vae: name the file or folder with --text-encoder and --vae, or give a whole"
    )
    for folder, words in (
        (tmp_path / "mine", f"mine holds transformer, with {both}"),
        (transformer_folder, f"tiny is a transformer alone, with {both}"),
        (diffusers_file, f"tiny_diffusers.safetensors is a transformer alone, with {both}"),
        (pipeline_folder / "vae", "is a VAE, not a PixArt-Sigma transformer"),
        (tmp_path / "gone", "There is no file or folder .*gone"),
    ):
        with pytest.raises(CheckpointError, match=words):
            Components.find(folder)
    shutil.copytree(pipeline_folder / "vae", tmp_path / "others" / "vae")
    with pytest.raises(
        CheckpointError, match="others holds vae, with no transformer and no text_encoder: .*--transformer"
    ):
        Components.find(tmp_path / "others")
    found = Components.find(
        tmp_path / "others", transformer=diffusers_file, text_encoder=pipeline_folder / "text_encoder"
    )
    assert found.vae == tmp_path / "others" / "vae"
    assert (
        Components.find(transformer_folder, vae=pipeline_folder, needs_text_encoder=False).text_encoder
        is None
    )


def test_a_checkpoint_of_several_models_is_a_pipeline(tmp_path, pipeline_folder, diffusers_state_dict):
    vae = load_file(pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors")
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in diffusers_state_dict.items()}
    path = tmp_path / "whole.safetensors"
    save_file(whole | {f"vae.{key}": tensor for key, tensor in vae.items()}, path)
    found = Components.find(path, needs_text_encoder=False)
    assert found.vae == path and found.checkpoint.path == path and len(found.fingerprints()) == 2
    with pytest.raises(
        CheckpointError, match="holds transformer, vae, with no text_encoder: .*--text-encoder"
    ):
        Components.find(path)


def test_a_transformer_by_itself_brings_its_noise_schedule_or_takes_the_folders(
    tmp_path, pipeline_folder, diffusers_file
):
    for name, spacing in (("base", "trailing"), ("other", "leading")):
        shutil.copytree(pipeline_folder, tmp_path / name)
        with_scheduler(tmp_path / name, timestep_spacing=spacing)
    for transformer, spacing in (
        (None, "trailing"),
        (tmp_path / "other", "leading"),
        (tmp_path / "other" / "transformer", "leading"),
        (diffusers_file, "trailing"),
    ):
        found = Components.find(tmp_path / "base", transformer=transformer).checkpoint.noise_schedule
        assert found.timestep_spacing == spacing
    given = Components.find(tmp_path / "base", noise_schedule=PUBLISHED).checkpoint
    assert given.noise_schedule == PUBLISHED


# Shards


def test_missing_shard(tmp_path, sharded_folder):
    folder = tmp_path / "a"
    shutil.copytree(sharded_folder, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    for read in (inspect, read_state_dict):
        with pytest.raises(CheckpointError, match=f"shard .*{shard.name} is missing"):
            read(folder)


def test_truncated_shard(tmp_path, sharded_folder):
    folder = tmp_path / "a"
    shutil.copytree(sharded_folder, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{shard.name} is cut off"):
        inspect(folder)


def test_shard_without_its_key(tmp_path, sharded_folder):
    folder = tmp_path / "a"
    shutil.copytree(sharded_folder, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(shard)
    key = sorted(weights)[0]
    save_file({name: tensor.clone() for name, tensor in weights.items() if name != key}, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} lacks {key}"):
        inspect(folder)


def test_shards_without_an_index(tmp_path, sharded_folder):
    folder = tmp_path / "a"
    shutil.copytree(sharded_folder, folder, ignore=shutil.ignore_patterns("*.index.json"))
    with pytest.raises(CheckpointError, match="no index"):
        inspect(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "notes.txt"]
)
def test_index_may_not_point_elsewhere(tmp_path, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="not a weight file beside it"):
        read_state_dict(folder)


def test_other_components_are_read(pipeline_folder):
    """The loaders of the text encoder and of the VAE use the same reader."""
    assert "shared.weight" in read_state_dict(pipeline_folder / "text_encoder")
    assert "decoder.conv_in.weight" in read_header(pipeline_folder / "vae")


def test_errors_are_the_users(tmp_path):
    assert issubclass(CheckpointError, SigmaError)
    with pytest.raises(CheckpointError, match="is a folder"):
        check_file(tmp_path)


def test_a_training_runs_folder_of_simpletuner(tmp_path, transformer_folder, diffusers_state_dict):
    """Averages and the optimiser lie beside the weights; the averages load by their own folder."""
    run = tmp_path / "checkpoint-500"
    for name in ("transformer", "transformer_ema"):
        shutil.copytree(transformer_folder, run / name)
    save_file({"a": torch.zeros(2)}, run / "optimizer.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_state.json"):
        (run / name).write_bytes(b"{}")
    for path in (run, run / "transformer", run / "transformer_ema"):
        assert_same(load_transformer_state_dict(inspect(path)), diffusers_state_dict)


def test_the_authors_training_file_with_averages_and_optimiser(tmp_path, to_original, diffusers_state_dict):
    weights = to_original(diffusers_state_dict)
    run = {
        "state_dict": weights,
        "state_dict_ema": {name: weight + 1 for name, weight in weights.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "step": 7}}, "param_groups": [{"lr": 2e-5}]},
        "scheduler": {"last_epoch": 7},
        "epoch": 3,
        "step": 500,
    }
    torch.save(run, tmp_path / "epoch_3_step_500.pth")
    found = inspect(tmp_path / "epoch_3_step_500.pth")
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)
    assert (found.variant, found.variant_source) == ("1024", "default")  # 500 counts steps


def test_onetrainers_positions_are_neither_used_nor_believed(tmp_path, write_original, diffusers_state_dict):
    path = write_original(tmp_path / "mine_512.safetensors", pos_embed=4096)
    weights = load_file(path)
    del weights["y_embedder.y_embedding"]  # which it leaves out
    weights["pos_embed"] = torch.ones(1, 4096, 144)
    save_file(weights, path, metadata=ONETRAINER)
    found = inspect(path)
    assert (found.variant, found.variant_source) == ("512", "file name")
    assert_same(load_transformer_state_dict(found), diffusers_state_dict)
    unnamed = path.rename(tmp_path / "mine.safetensors")
    assert "1024 is assumed" in inspect(unnamed).variant_notice
    assert inspect(unnamed, "256").config.interpolation_scale == 0.5
