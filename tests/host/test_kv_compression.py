"""KV compression of MODELs in the real host, from our loader and from the host's own."""

from host_common import COMMON

NODE = (
    COMMON
    + """
import comfy.sd
import pack.nodes.sampling
from pack.nodes.kv_compression import KVCompression
from pack.nodes.sampling import Sampler
# The host's own PixArt knows one width, and positions of 1024-class sizes: 1440 x 96 pixels are one.
SIZE = (180, 12)

def compress(model, setting):
    return KVCompression.execute(model, setting).args[0]

def sigma_sampler(model, setting, steps=2, cfg=4.5):
    latent = {"samples": torch.zeros(1, 4, *SIZE)}
    settings = dict(seed=0, steps=steps, cfg=cfg, sampler_name="dpmpp_2m", schedule="normal", denoise=1.0)
    made = Sampler.execute(model, *conds, latent, kv_compression=setting, after_use="keep", **settings)
    return made.args[0]["samples"]

with torch.inference_mode():
    path = folder / "wide_1024.safetensors"
    weights = transformer(16, 2, 4096).state_dict()
    # as random layers come, all tokens attend to all alike, and so to their means
    sharp = {name: 5 * weights[name] for name in weights if "attn1.to_q" in name or "attn1.to_k" in name}
    save_file(weights | sharp, path)
    ours, native = load_model(path), comfy.sd.load_diffusion_model(str(path))
    conds = conditioning(20, 4096), conditioning(20, 4096)
    dense = ksampler(ours, *conds, SIZE)

    # the node gives KSampler what our sampler has as a setting; ours and the host's agree
    for setting in ("mean:2:all", "mean:4:1", "uniform:2:0", "mean:2:all:0-50%", "mean:4:0+mean:2:1:50-100%"):
        expected = sigma_sampler(ours, setting)
        assert difference(expected, dense) > 1e-3, setting
        compressed = compress(ours, setting), compress(native, setting)
        for model in compressed:
            assert difference(ksampler(model, *conds, SIZE), expected) < 1e-4, (setting, type(model.model))
    assert difference(sigma_sampler(native, "mean:2:all"), sigma_sampler(ours, "mean:2:all")) < 1e-4
    print("settings", flush=True)

    # clones keep to their own setting, whatever ran before; so does the model they come from
    quick = {"steps": 1, "cfg": 1.0}
    dense = ksampler(ours, *conds, SIZE, **quick)
    for model in (native, ours):
        two, four = compress(model, "mean:2:all"), compress(model, "mean:4:all")
        first, second = ksampler(two, *conds, SIZE, **quick), ksampler(four, *conds, SIZE, **quick)
        assert difference(first, second) > 1e-3
        assert difference(ksampler(model, *conds, SIZE, **quick), dense) < 1e-4
        assert difference(ksampler(two, *conds, SIZE, **quick), first) == 0
        assert difference(ksampler(compress(four, "mean:2:all"), *conds, SIZE, **quick), first) == 0
        assert difference(ksampler(compress(four, "off"), *conds, SIZE, **quick), dense) < 1e-4
        assert difference(ksampler(compress(model, "auto"), *conds, SIZE, **quick), dense) < 1e-4
        # auto in our sampler leaves what the node has set
        assert difference(sigma_sampler(two, "auto", **quick), first) < 1e-4
        assert difference(sigma_sampler(two, "off", **quick), dense) < 1e-4
    print("clones", flush=True)

    # with a LoRA on it, and with attention patches
    down, up = normal(4, 1152) / 10, normal(3456, 4) / 10
    name = "lora_unet_blocks_0_attn_qkv"
    lora = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    patched = [comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0] for model in (ours, native)]
    compressed = [compress(model, "mean:2:all") for model in patched]
    ours_too, theirs_too = (ksampler(model, *conds, SIZE, **quick) for model in compressed)
    plain = sigma_sampler(ours, "mean:2:all", **quick)
    assert difference(ours_too, theirs_too) < 1e-4, difference(ours_too, theirs_too)
    assert difference(ours_too, plain) > 1e-3, difference(ours_too, plain)
    doubled = compress(ours, "mean:2:all")
    doubled.set_model_attn1_patch(lambda q, k, v, options: (q, k * 2, v))
    assert difference(ksampler(doubled, *conds, SIZE, **quick), plain) > 1e-3
    print("composes", flush=True)

    # what cannot work is known at the node
    raises("drop trained KV weights", lambda: compress(native, "conv:2:all"))
    raises("needs trained weights", lambda: compress(ours, "conv:2:all"))
    for model in (ours, native):
        raises("ratio must be 2, 3 or 4", lambda: compress(model, "mean:9:all"))
        raises("layers 0 to 1", lambda: compress(model, "mean:2:14-27"))
    alpha = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=1152, sample_size=128, caption_channels=4096, use_additional_conditions=True,
    )
    save_file(alpha.state_dict(), folder / "alpha.safetensors")
    other = comfy.sd.load_diffusion_model(str(folder / "alpha.safetensors"))
    raises("KV compression is for PixArt-Sigma", lambda: compress(other, "mean:2:all"))
    raises("KV compression is for PixArt-Sigma", lambda: sigma_sampler(other, "mean:2:all"))
    print("errors", flush=True)
"""
)

CALIBRATION = """
import os
import shutil
import torch
from pathlib import Path
import comfy.model_management
from pack.nodes.host.kv_compression import KV_COMPRESSION, set_kv_compression
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.host.transformer import load_model
from pack.nodes.kv_compression import CalibrateKVCompression
from pack.nodes.sampling import Sampler
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.transformer.kv_calibration import Calibration, calibration_path
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.transformer.kv_rules import parse, spell

folder = Path(shutil.copytree(DEMO, Path(os.environ["ARGUMENT_0"]) / "demo"))
settings = dict(error_percent=8.0, seed=3, steps=4, cfg=4.5)

def calibrate(model, prompts="a red circle\\n\\na blue star", save=True):
    latent = {"samples": torch.zeros(1, 4, 16, 24)}
    return CalibrateKVCompression.execute(model, clip, latent, prompts, save=save, **settings).args

def rules_for(model, *size):
    return asked(set_kv_compression(model, "auto"), *size)

def asked(model, *size):
    return model.model_options["transformer_options"][KV_COMPRESSION](*size)

with torch.inference_mode():
    model, clip = load_model(folder), load_clip(folder, "fp32", "auto")
    layers = model.model.diffusion_model.sigma_config.num_layers
    path = calibration_path(model.model.checkpoint_path)
    before = set_kv_compression(model, "auto")
    assert asked(before, 2048, 2048) == rules_for(model, 2048, 2048) == parse("mean:2:deep", layers)
    setting, plot = calibrate(model, save=False)
    assert not path.exists() and folder in path.parents or folder == path.parent
    assert plot.ndim == 4 and plot.shape[-1] == 3 and plot.std() > 0.05
    assert calibrate(model)[0] == setting
    found = Calibration.read(path)
    assert spell(found.rules) == setting != "off" and found.prompts == ("a red circle", "a blue star")
    assert (found.width, found.height, found.steps) == (192, 128, 4) and 0 < found.error <= 0.08
    assert asked(before, 2048, 2048) == rules_for(model, 2048, 2048) == found.rules
    assert rules_for(model, 256, 256) == ()
    assert KV_COMPRESSION not in model.model_options["transformer_options"] and not model.wrappers

    # the engine measures the same
    from pack.pixart_sigma.studies.calibration import calibrate as by_the_engine
    from pack.pixart_sigma.transformer.loading import load_transformer
    from pack.nodes.text import encode
    import comfy.sample
    zeros = torch.zeros(1, 4, 16, 24)
    runs = [
        (comfy.sample.prepare_noise(zeros, 3 + k), *(encode(clip, said, False)[0][0] for said in (text, "")))
        for k, text in enumerate(("a red circle", "a blue star"))
    ]
    again = by_the_engine(load_transformer(folder), runs, ("", ""), budget=0.08, steps=4)
    assert again.rules == found.rules and abs(again.error - found.error) < 1e-3, (again, found)

    for wrong, message in ((" \\n ", "no prompt"),):
        try:
            calibrate(model, wrong)
        except SigmaError as error:
            assert message in str(error)
        else:
            raise AssertionError(message)
    path.write_text("{")
    try:
        rules_for(model, 2048, 2048)
    except SigmaError as error:
        assert "is not a calibration" in str(error)
    else:
        raise AssertionError("a broken calibration was used")
    comfy.model_management.interrupt_current_processing()
    try:
        calibrate(model)
    except comfy.model_management.InterruptProcessingException:
        print("interrupted")
"""


def test_any_sampler_compresses_by_the_node(run_in_host, tmp_path):
    assert run_in_host(NODE, tmp_path).split()[-1] == "errors"


def test_calibration_finds_a_setting_that_auto_uses(run_in_host, tmp_path):
    assert run_in_host(CALIBRATION, tmp_path).split()[-1] == "interrupted"
