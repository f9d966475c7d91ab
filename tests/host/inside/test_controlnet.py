"""ControlNets of PixArt through the host's Apply ControlNet equal the engine's."""

from dataclasses import replace

import comfy.controlnet
import comfy.model_management
import comfy.sample
import comfy.sd
import folder_paths
import pytest
import torch
from pack.nodes.host.transformer import load_model
from pack.nodes.host.vae import load_vae
from pack.nodes.loaders import LoadControlNet
from pack.nodes.sampling import Sampler
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.prompt_embeds import Prompts
from pack.pixart_sigma.sampling.denoise import denoise
from pack.pixart_sigma.sampling.guidance import guide
from pack.pixart_sigma.settings import Settings
from pack.pixart_sigma.transformer.config import XL_2
from pack.pixart_sigma.transformer.controlnet import Control, ControlHooks
from pack.pixart_sigma.transformer.controlnet_file import build_controlnet, load_controlnet
from pack.pixart_sigma.transformer.loading import load_transformer
from random_models import conditioning, difference, ksampler, normal, split, transformer
from safetensors.torch import save_file

import nodes as host_nodes

SIZE = (12, 20)
WIDTH = 144
SEED = 7
SCALE = 0.13025
EMPTY = torch.zeros(1, 4, *SIZE)
PROMPT, NEGATIVE = conditioning(9, 64, seed=1), conditioning(3, 64, seed=2)
PICTURE = torch.rand(1, 8 * SIZE[0], 8 * SIZE[1], 3, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of a transformer and of a ControlNet, in a folder of their own."""
    folder = tmp_path_factory.mktemp("controlnet")
    save_file(transformer(2, 4, 64).state_dict(), folder / "tiny_1024.safetensors")
    config = replace(XL_2, num_layers=2, num_attention_heads=2, cross_attention_dim=WIDTH)
    shapes = build_controlnet(config).state_dict()
    weights = {
        name: 0.1 * normal(*weight.shape, seed=place) for place, (name, weight) in enumerate(shapes.items())
    }
    save_file(weights, folder / "edges.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(made):
    return load_model(made / "tiny_1024.safetensors", dtype="fp32")


@pytest.fixture(scope="module")
def vae():
    return load_vae(DEMO)


@pytest.fixture
def control_net(made, monkeypatch):
    """By the node, from models/controlnet."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "controlnet", ([str(made)], folder_paths.supported_pt_extensions)
    )
    folder_paths.filename_list_cache.clear()
    assert LoadControlNet.validate_inputs("edges.safetensors") is True
    assert "There is no model" in LoadControlNet.validate_inputs("other.safetensors")
    return LoadControlNet.execute("edges.safetensors").args[0]


def apply(control_net, vae, strength=1.0, start=0.0, end=1.0, prompts=(PROMPT, NEGATIVE), picture=PICTURE):
    return host_nodes.ControlNetApplyAdvanced().apply_controlnet(
        *prompts, control_net, picture, strength, start, end, vae=vae
    )


def sample(model, prompts, kv_compression="off", **custom):
    """Latents (1, 4, *SIZE) by Σ Sampler, as the reference pipeline makes them."""
    positive, negative = prompts
    settings = {"seed": SEED, "steps": 4, "cfg": 4.5, "sampler_name": "dpmpp_2m", "schedule": "reference"}
    made = Sampler.execute(
        model=model,
        positive=positive,
        negative=negative,
        latent_image={"samples": EMPTY},
        denoise=1.0,
        kv_compression=kv_compression,
        after_use="keep",
        **settings,
        **custom,
    )
    return made.args[0]["samples"]


def run_engine(made, vae, controls, kv_compression=None):
    """The engine's latents of the same run, in the host's scale; controls: (strength, first step, last)."""
    network = load_transformer(made / "tiny_1024.safetensors", variant="1024")
    controlnet = load_controlnet(made / "edges.safetensors")
    picture = vae.encode(PICTURE) * SCALE
    calls = []

    def controlled(latents, timestep, *arguments, **settings):
        step = len(calls)
        calls.append(step)
        acting = tuple(
            Control(controlnet, picture, strength)
            for strength, first, last in controls
            if first <= step <= last
        )
        return network(latents, timestep, *arguments, hooks=ControlHooks(acting), **settings)

    settings = Settings(steps=4, kv_compression=kv_compression)
    prompts = Prompts(PROMPT[0][0], None, NEGATIVE[0][0])
    noise = comfy.sample.prepare_noise(EMPTY, SEED)
    finished = denoise(guide(controlled, prompts, settings), noise, settings)
    assert len(calls) == 4
    return finished / SCALE


def test_it_is_the_engines(made, model, vae, control_net):
    result = sample(model, apply(control_net, vae))
    assert difference(result, run_engine(made, vae, [(1.0, 0, 3)])) < 1e-4
    plain = run_engine(made, vae, [])
    assert difference(result, plain) > 0.01
    assert difference(sample(model, (PROMPT, NEGATIVE)), plain) < 1e-4


def test_several_by_strength_and_share_of_the_run(made, model, vae, control_net):
    first = apply(control_net, vae, strength=0.6, end=0.4)
    both = apply(control_net, vae, strength=0.3, prompts=first)
    expected = run_engine(made, vae, [(0.6, 0, 1), (0.3, 0, 3)])
    assert difference(sample(model, both), expected) < 1e-4
    assert difference(sample(model, first), expected) > 1e-3


def test_with_kv_compression_and_pictures_of_other_sizes(made, model, vae, control_net):
    prompts = apply(control_net, vae)
    expected = run_engine(made, vae, [(1.0, 0, 3)], kv_compression="mean:2:1-2")
    assert (
        difference(
            sample(model, prompts, kv_compression="custom", custom_kv_compression="mean:2:1-2"), expected
        )
        < 1e-4
    )
    smaller = apply(control_net, vae, picture=PICTURE[:, :50, :70])  # scaled to the latents by the host
    assert difference(ksampler(model, *smaller, SIZE), ksampler(model, *prompts, SIZE)) > 1e-3


def test_it_is_loaded_beside_the_model_and_let_go(model, vae, control_net):
    ksampler(model, *apply(control_net, vae), SIZE)
    wrapped = control_net.control_model_wrapped
    held = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    assert wrapped in held
    comfy.model_management.unload_all_models()
    assert all(loaded.model is not wrapped for loaded in comfy.model_management.current_loaded_models)


def test_on_two_devices_each_has_its_own(model, vae, control_net, monkeypatch):
    """By the host's MultiGPU CFG Split, several ControlNets too."""
    prompts = apply(control_net, vae, strength=0.3, prompts=apply(control_net, vae, strength=0.6))
    expected, plain = ksampler(model, *prompts, SIZE), ksampler(model, PROMPT, NEGATIVE, SIZE)
    divided, copy = split(model, monkeypatch)
    assert difference(ksampler(divided, *prompts, SIZE), expected) < 1e-3 < difference(plain, expected) / 10
    (clone,) = prompts[0][0][1]["control"].multigpu_clones.values()
    assert clone.control_model_wrapped.load_device == copy.load_device
    assert clone.control_model.controlnet is not control_net.control_model.controlnet


def test_what_has_no_effect_is_said(made, model, vae, control_net):
    class Other(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, *_):
            return {"input": [x_noisy], "middle": [], "output": []}

        def copy(self):
            return Other()

    with pytest.raises(SigmaError, match="for another kind of model"):
        ksampler(model, *apply(Other(), vae), SIZE)
    with pytest.raises(ValueError, match="needs a VAE"):
        ksampler(model, *apply(control_net, None), SIZE)
    save_file(transformer(16, 1, 4096).state_dict(), made / "wide_1024.safetensors")
    hosts = comfy.sd.load_diffusion_model(str(made / "wide_1024.safetensors"))
    with pytest.raises(SigmaError, match="from Load Σ Transformer alone"):
        wide = conditioning(5, 4096, seed=3)
        ksampler(hosts, *apply(control_net, vae, prompts=(wide, wide)), SIZE)
    with pytest.raises(SigmaError, match="width 144 in 2 heads, and this one has width"):
        demo = load_model(DEMO, dtype="fp32")
        wide = conditioning(5, demo.model.diffusion_model.sigma_config.caption_channels, seed=3)
        ksampler(demo, *apply(control_net, vae, prompts=(wide, wide)), SIZE)
