"""KV compression of MODELs in the real host, from our loader and from the host's own."""

import comfy.sd
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from pack.nodes.host.transformer import load_model
from pack.nodes.kv_compression import PRESETS, KVCompression
from pack.nodes.sampling import Sampler
from pack.nodes.size import AspectRatioBucket
from pack.pixart_sigma.errors import SigmaError
from random_models import conditioning, difference, ksampler, normal, transformer
from safetensors.torch import save_file

# The host's own PixArt knows one width, and positions of 1024-class sizes: 1440 x 96 pixels are one.
SIZE = (180, 12)
CONDITIONING = conditioning(20, 4096, seed=1), conditioning(20, 4096, seed=2)
QUICK = {"steps": 1, "cfg": 1.0}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide_1024.safetensors"
    weights = transformer(16, 2, 4096).state_dict()
    # as random layers come, all tokens attend to all alike, and so to their means
    sharp = {name: 5 * weights[name] for name in weights if "attn1.to_q" in name or "attn1.to_k" in name}
    save_file(weights | sharp, path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    return load_model(file)


@pytest.fixture(scope="module")
def native(file):
    return comfy.sd.load_diffusion_model(str(file))


def compress(model, setting):
    return KVCompression.execute(model, setting).args[0]


def sample(model, **settings):
    return ksampler(model, *CONDITIONING, SIZE, **settings)


def sigma_sampler(model, setting, steps=2, cfg=4.5, positive=CONDITIONING[0]):
    made = Sampler.execute(
        model,
        positive,
        CONDITIONING[1],
        {"samples": torch.zeros(1, 4, *SIZE)},
        seed=0,
        steps=steps,
        cfg=cfg,
        sampler_name="dpmpp_2m",
        schedule="normal",
        denoise=1.0,
        kv_compression=setting,
        after_use="keep",
    )
    return made.args[0]["samples"]


def test_the_node_gives_ksampler_what_our_sampler_has_as_a_setting(ours, native):
    dense = sample(ours)
    for setting in ("mean:2:all", "mean:4:1", "uniform:2:0", "mean:2:all:0-50%", "mean:4:0+mean:2:1:50-100%"):
        expected = sigma_sampler(ours, setting)
        assert difference(expected, dense) > 1e-3, setting
        for model in (compress(ours, setting), compress(native, setting)):
            assert difference(sample(model), expected) < 1e-4, (setting, type(model.model))


def test_our_sampler_compresses_the_hosts_own_model_alike(ours, native):
    assert difference(sigma_sampler(native, "mean:2:all"), sigma_sampler(ours, "mean:2:all")) < 1e-4


def test_clones_keep_to_their_own_setting_whatever_ran_before(ours, native):
    dense = sample(ours, **QUICK)
    for model in (native, ours):
        two, four = compress(model, "mean:2:all"), compress(model, "mean:4:all")
        first, second = sample(two, **QUICK), sample(four, **QUICK)
        assert difference(first, second) > 1e-3
        assert difference(sample(model, **QUICK), dense) < 1e-4, "the model they come from"
        assert difference(sample(two, **QUICK), first) == 0
        assert difference(sample(compress(four, "mean:2:all"), **QUICK), first) == 0
        assert difference(sample(compress(four, "off"), **QUICK), dense) < 1e-4
        assert difference(sample(compress(model, "auto"), **QUICK), dense) < 1e-4
        # auto in our sampler leaves what the node has set
        assert difference(sigma_sampler(two, "auto", **QUICK), first) < 1e-4
        assert difference(sigma_sampler(two, "off", **QUICK), dense) < 1e-4


def test_it_composes_with_a_lora(ours, native):
    name = "lora_unet_blocks_0_attn_qkv"
    lora = {
        f"{name}.lora_down.weight": normal(4, 1152, seed=3) / 10,
        f"{name}.lora_up.weight": normal(3456, 4, seed=4) / 10,
    }
    patched = [comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0] for model in (ours, native)]
    result, theirs = (sample(compress(model, "mean:2:all"), **QUICK) for model in patched)
    assert difference(result, theirs) < 1e-4
    assert difference(result, sigma_sampler(ours, "mean:2:all", **QUICK)) > 1e-3


def test_it_composes_with_an_attention_patch(ours):
    doubled = compress(ours, "mean:2:all")
    doubled.set_model_attn1_patch(lambda q, k, v, options: (q, k * 2, v))
    plain = sigma_sampler(ours, "mean:2:all", **QUICK)
    assert difference(sample(doubled, **QUICK), plain) > 1e-3


def test_what_can_not_work_is_known_at_the_node(ours, native):
    for model, setting, message in (
        (native, "conv:2:all", "drop trained KV weights"),
        (ours, "conv:2:all", "needs trained weights"),
        (ours, "mean:9:all", "ratio must be 2, 3 or 4"),
        (native, "mean:9:all", "ratio must be 2, 3 or 4"),
        (ours, "mean:2:14-27", "layers 0 to 1"),
        (native, "mean:2:14-27", "layers 0 to 1"),
    ):
        with pytest.raises(SigmaError, match=message):
            compress(model, setting)


def test_the_presets_are_short_for_what_custom_can_say(ours):
    def compressed(choice, custom=""):
        return sample(KVCompression.execute(ours, choice, custom).args[0], **QUICK)

    assert KVCompression.define_schema().inputs[1].as_dict()["options"] == [*PRESETS, "custom"]
    dense = sample(ours, **QUICK)
    for choice, custom in (("deep half", "mean:2:deep"), ("all", "mean:2:0-1")):
        made = compressed(choice)
        assert difference(made, dense) > 1e-3, choice
        assert difference(compressed("custom", f" {custom} "), made) == 0
        assert difference(compressed(custom), made) == 0, "a workflow from before the list"
    assert difference(compressed("off", "mean:2:all"), dense) == 0, "the text is for custom only"
    with pytest.raises(SigmaError, match="custom_kv_compression is empty"):
        compressed("custom", " ")


def test_the_buckets_base_is_the_models_own(ours, native, tmp_path):
    def base(model):
        return AspectRatioBucket.execute("auto", "1:1", "landscape", 0, 0, 1, model=model).args[1]

    assert base(ours) == 1024
    with pytest.raises(SigmaError, match="no model is connected"):
        base(None)
    with pytest.raises(SigmaError, match="does not say which size"):
        base(native)
    # The host knows the size of a file that holds the positions.
    weights = native.model.diffusion_model.state_dict()
    with_positions = {}
    for size in (512, 768):
        path = tmp_path / f"{size}.safetensors"
        save_file(weights | {"pos_embed": torch.zeros(1, (size // 16) ** 2, 1152)}, path)
        with_positions[size] = comfy.sd.load_diffusion_model(str(path))
    assert base(with_positions[512]) == 512
    with pytest.raises(SigmaError, match="made for 768 pixels"):
        base(with_positions[768])


def test_a_model_that_is_not_sigma_is_refused(tmp_path):
    alpha = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=1152,
        sample_size=128,
        caption_channels=4096,
        use_additional_conditions=True,
    )
    save_file(alpha.state_dict(), tmp_path / "alpha.safetensors")
    other = comfy.sd.load_diffusion_model(str(tmp_path / "alpha.safetensors"))
    for act in (compress, sigma_sampler):
        with pytest.raises(SigmaError, match="KV compression is for PixArt-Sigma"):
            act(other, "mean:2:all")


def test_a_prompt_that_is_not_for_the_hosts_own_model_is_explained(native):
    wrong = conditioning(5, 64, seed=3)
    for run in (
        lambda: sigma_sampler(native, "off", positive=wrong),
        lambda: ksampler(compress(native, "mean:2:all"), wrong, CONDITIONING[1], SIZE, **QUICK),
    ):
        with pytest.raises(SigmaError, match="is 64 wide, and this transformer reads 4096"):
            run()
