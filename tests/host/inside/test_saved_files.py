"""What the host's nodes save of our MODEL and VAE is read by our loaders and by the host's, the same."""

import json

import comfy.sd
import comfy.text_encoders.pixart_t5
import comfy.utils
import gguf
import gguf.quants
import pytest
import torch
from comfy.ldm.pixart.pixartms import PixArtMS
from comfy_extras.nodes_model_merging import CheckpointSave, CLIPSave, ModelSave, VAESave
from comfy_kitchen.backends.eager.quantization import (
    dequantize_int8_convrot_weight,
    quantize_int8_convrot_weight,
)
from diffusers import AutoencoderKL
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.host.transformer import DemoLatents, load_model
from pack.nodes.host.vae import load_vae
from pack.pixart_sigma import DEMO, DEMO_KV
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.files.weight_files import read_state_dict
from pack.pixart_sigma.transformer.checkpoint import inspect
from pack.pixart_sigma.transformer.converting import convert
from pack.pixart_sigma.transformer.keys import to_original_keys
from pack.pixart_sigma.vae.loading import SDXL_VAE
from random_models import conditioning, difference, ksampler, normal, transformer
from safetensors.torch import load_file, save_file

SIZE = (24, 16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A transformer of the published width in the authors' names, q, k and v fused."""
    weights = transformer(16, 1, 4096).state_dict()
    fused = {
        name: torch.cat([weights[part] for part in parts])
        for name, parts in to_original_keys(weights).items()
    }
    assert "blocks.0.attn.qkv.weight" in fused and "final_layer.scale_shift_table" in fused
    path = tmp_path_factory.mktemp("models") / "wide_1024.safetensors"
    save_file(fused, path)
    return path


@pytest.fixture(scope="module")
def sdxl_vae(tmp_path_factory):
    """The shape of SDXL's VAE with random weights, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "vae"
    AutoencoderKL(**SDXL_VAE, sample_size=512, scaling_factor=0.13025).half().save_pretrained(folder)
    return folder


def save(node, folder, *models):
    """The file that a save node of the host writes."""
    node.output_dir = str(folder)
    node.save(*models, "saved_1024")
    return next(folder.glob("saved*.safetensors"))


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("folder", [DEMO / "transformer", DEMO_KV])
def test_a_demo_keeps_what_its_shapes_do_not_tell(tmp_path, folder):
    """Its 192 channels are 6 heads of 32, and would be 3 of 64."""
    ours = load_model(folder)
    file = save(ModelSave(), tmp_path, ours)
    again = load_model(file)
    assert inspect(file).config == inspect(folder).config
    assert isinstance(again.model.latent_format, DemoLatents)
    assert_same_weights(ours.model.diffusion_model, again.model.diffusion_model)


def test_a_lora_is_saved_with_the_model(tmp_path):
    ours = load_model(DEMO / "transformer")
    lora = {
        "lora_unet_blocks_0_attn_qkv.lora_down.weight": normal(4, 192, seed=1) / 5,
        "lora_unet_blocks_0_attn_qkv.lora_up.weight": normal(576, 4, seed=2) / 5,
        "lora_unet_blocks_1_mlp_fc1.lora_down.weight": normal(4, 192, seed=3) / 5,
        "lora_unet_blocks_1_mlp_fc1.lora_up.weight": normal(768, 4, seed=4) / 5,
    }
    patched = comfy.sd.load_lora_for_models(ours, None, lora, 1.0, 0)[0]
    # Patched as it is loaded, or by the host while it is written, where memory does not hold it.
    loaded = save(ModelSave(), tmp_path, patched)
    patched.detach()
    comfy.utils.save_torch_file(patched.state_dict_for_saving(), tmp_path / "unloaded.safetensors")
    prompts = conditioning(20, 128, seed=1), conditioning(20, 128, seed=2)
    expected, plain = ksampler(patched, *prompts, SIZE), ksampler(ours, *prompts, SIZE)
    assert difference(plain, expected) > 1e-2
    for file in (loaded, tmp_path / "unloaded.safetensors"):
        assert difference(ksampler(load_model(file), *prompts, SIZE), expected) < 1e-4


def test_a_model_goes_round_by_our_loader_and_by_the_hosts(tmp_path, wide):
    ours, native = load_model(wide), comfy.sd.load_diffusion_model(str(wide))
    for number, model in enumerate((ours, native)):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = save(ModelSave(), folder, model)
        weights = read_state_dict(file)
        assert not any(tensor.numel() == 0 for tensor in weights.values()), "placeholders were written"
        assert_same_weights(load_model(file).model.diffusion_model, ours.model.diffusion_model)
        theirs = comfy.sd.load_diffusion_model(str(file)).model.diffusion_model.state_dict()
        for name, tensor in native.model.diffusion_model.state_dict().items():
            if name != "y_embedder.y_embedding":  # the null caption of training, which is random there
                assert torch.equal(theirs[name], tensor), name


def small_clip():
    """The host's T5 for PixArt with the demo's weights."""

    class Target:
        params: dict = {}
        clip = comfy.text_encoders.pixart_t5.PixArtT5XXL
        tokenizer = comfy.text_encoders.pixart_t5.PixArtTokenizer

    config = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 128}
    weights = {key: value.float() for key, value in read_state_dict(DEMO / "text_encoder").items()}
    options = {"t5xxl_model_config": config, "dtype": torch.float32}
    return comfy.sd.CLIP(Target, state_dict=[weights], model_options=options), weights


def test_a_checkpoint_of_all_three_is_read_part_by_part(tmp_path, wide, sdxl_vae):
    model, vae = load_model(wide), load_vae(sdxl_vae)
    clip, encoder = small_clip()
    file = save(CheckpointSave(), tmp_path, model, clip, vae)
    assert_same_weights(load_model(file).model.diffusion_model, model.model.diffusion_model)
    assert_same_weights(load_vae(file).first_stage_model, vae.first_stage_model)
    found = read_state_dict(file, part="text_encoder")
    for name, tensor in encoder.items():
        assert torch.equal(found[name], tensor), name
    theirs = comfy.sd.load_checkpoint_guess_config(str(file), output_clip=False)
    assert theirs[0].model.model_config.unet_config["image_model"] == "pixart_sigma"
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(theirs[0].model.diffusion_model.state_dict()[name], read_state_dict(wide)[name])
    assert_same_weights(theirs[2].first_stage_model, vae.first_stage_model)


def test_a_vae_goes_round(tmp_path, sdxl_vae):
    for number, folder in enumerate((DEMO / "vae", sdxl_vae)):
        (tmp_path / str(number)).mkdir()
        vae = load_vae(folder)
        file = save(VAESave(), tmp_path / str(number), vae)
        assert_same_weights(load_vae(file).first_stage_model, vae.first_stage_model)
    theirs = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))  # the host builds that shape only
    assert_same_weights(theirs.first_stage_model, vae.first_stage_model)


def test_a_clip_of_the_host_goes_round(tmp_path):
    clip, encoder = small_clip()
    found = read_state_dict(save(CLIPSave(), tmp_path, clip), part="text_encoder")
    for name, tensor in encoder.items():
        assert torch.equal(found[name], tensor), name


def test_our_clip_says_that_it_can_not_be_saved(tmp_path):
    clip = load_clip(DEMO, "fp32", "auto")
    model, vae = load_model(DEMO / "transformer"), load_vae(DEMO / "vae")
    for node, models in ((CLIPSave(), (clip,)), (CheckpointSave(), (model, clip, vae))):
        with pytest.raises(SigmaError, match="can not be saved from a workflow"):
            save(node, tmp_path, *models)
    assert not list(tmp_path.iterdir())


def quantised_int8(wide):
    """The tensors of a file as ComfyUI's own converters write them: int8 by row, rotated in groups of 64."""
    tensors = {}
    facts = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}).encode()
    for name, weight in load_file(wide).items():
        if weight.ndim != 2 or not name.startswith("blocks.") or not name.endswith(".weight"):
            tensors[name] = weight
            continue
        layer = name.removesuffix(".weight")
        tensors[name], tensors[layer + ".weight_scale"] = quantize_int8_convrot_weight(weight, 64)
        tensors[layer + ".comfy_quant"] = torch.tensor(list(facts), dtype=torch.uint8)
    return tensors


def test_a_quantised_file_is_dequantised_when_it_loads(wide, tmp_path, caplog):
    """By the numbers of comfy-kitchen; the host's own loader reads the same file."""
    tensors = quantised_int8(wide)
    save_file(tensors, tmp_path / "int8_1024.safetensors")
    with caplog.at_level("INFO"):
        ours = load_model(tmp_path / "int8_1024.safetensors", dtype="fp32")
    assert "int8_1024.safetensors is quantised (" in caplog.text and "(convrot 64)" in caplog.text
    assert "GB in float32" in caplog.text
    scale = tensors["blocks.0.attn.qkv.weight_scale"]
    qkv = dequantize_int8_convrot_weight(tensors["blocks.0.attn.qkv.weight"], scale, 64)
    weights = ours.model.diffusion_model.state_dict()
    parts = [weights[f"transformer_blocks.0.attn1.to_{letter}.weight"] for letter in "qkv"]
    assert torch.equal(torch.cat(parts), qkv)
    text = [conditioning(7, 4096, seed) for seed in (1, 2)]
    exact = ksampler(load_model(wide, dtype="fp32"), *text, SIZE)
    off = difference(ksampler(ours, *text, SIZE), exact)
    assert 0 < off < 0.05
    host = comfy.sd.load_diffusion_model(str(tmp_path / "int8_1024.safetensors")).model.diffusion_model
    theirs = host.blocks[0].attn.qkv.weight.dequantize()
    assert torch.equal(theirs, qkv.to(theirs.dtype))


# How far the host's own network is from the engine's on the dequantised weights. It rounds what goes into an
# int8 layer to int8 too.
HOSTS_TOLERANCE = {"int8": 2e-3, "fp8": 1e-5, "bf16": 1e-5}


@pytest.mark.parametrize("to", HOSTS_TOLERANCE)
def test_what_convert_writes_loads_in_the_hosts_own_loader(wide, tmp_path, to):
    file = tmp_path / "converted.safetensors"
    convert(inspect(wide, "512"), to, file)
    options = {"dtype": torch.float32} if to == "bf16" else {}  # else it computes in bf16
    models = (
        comfy.sd.load_diffusion_model(str(file), options),
        load_model(file, dtype="fp32"),
        load_model(wide, "512", dtype="fp32"),
    )
    assert type(models[0].model.diffusion_model) is PixArtMS
    # Few tokens: on a CPU an int8 product takes long. The host's positions are those of 512 at this size.
    given = normal(1, 4, 64, 2, seed=1), torch.tensor([500.0]), normal(1, 7, 4096, seed=2)
    native, ours, original = (model.model.diffusion_model(*given) for model in models)
    assert difference(native, ours) < HOSTS_TOLERANCE[to]
    assert 1e-4 < difference(ours, original) < 0.1
    assert inspect(file).variant == "512"


def test_a_gguf_file_in_a_folder_is_dequantised_when_it_loads(wide, tmp_path):
    folder = tmp_path / "sigma-1024"
    folder.mkdir()
    writer, kind = gguf.GGUFWriter(folder / "sigma.gguf", "pixart"), gguf.GGMLQuantizationType.Q8_0
    expected = {}
    for name, weight in load_file(wide).items():
        if weight.ndim == 2 and name.endswith(".weight"):
            stored = gguf.quants.quantize(weight.numpy(), kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind))
        else:
            writer.add_tensor(name, weight.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    weights = load_model(folder, dtype="bf16").model.diffusion_model.state_dict()
    found = weights["transformer_blocks.0.ff.net.2.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected["blocks.0.mlp.fc2.weight"].bfloat16())
