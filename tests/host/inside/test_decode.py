"""The decode node on the host's own VAE object: in strips as whole, stopped, and with other decoders."""

import comfy.model_management as management
import comfy.sd
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.nested_tensor import NestedTensor
from comfy.taesd.taesd import TAESD
from pack.nodes.decode import VAEDecode
from pack.nodes.host.vae import decode, load_vae
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.vae.layers import read_decoder
from pack.pixart_sigma.vae.memory import least_budget, whole_decode_bytes

import nodes as host_nodes

LATENTS = torch.randn(2, 4, 24, 17, generator=torch.Generator().manual_seed(0)) * 5


@pytest.fixture(scope="module")
def vae():
    return load_vae(DEMO)


@pytest.fixture(scope="module")
def theirs(vae):
    """The host's own decode."""
    return vae.decode(LATENTS)


def test_strips_equal_the_hosts_own_decode(vae, theirs):
    decoder = read_decoder(vae.first_stage_model)
    least = least_budget(decoder, 24, 17, 4)
    choices = ("whole", None), ("auto", None), ("strips", None), ("strips", least), ("auto", least)
    for how, budget in choices:
        ours = decode(vae, LATENTS, how, budget)
        assert ours.shape == theirs.shape == (2, 192, 136, 3)
        assert (ours - theirs).abs().max() < 1e-4, (how, budget)
    assert least < whole_decode_bytes(decoder, 24, 17, 4) / 3
    with pytest.raises(SigmaError, match="Give it more"):
        decode(vae, LATENTS, "strips", 1000.0)


def test_the_node_crops_to_what_was_asked_for(vae):
    (strips,) = VAEDecode.execute({"samples": LATENTS}, vae, "strips", 120, 96, "keep", 0.02).result
    (whole,) = VAEDecode.execute({"samples": LATENTS}, vae, "off", 120, 96, "keep").result
    assert strips.shape == (2, 96, 120, 3) and (strips - whole).abs().max() < 1e-4


def test_an_interrupt_between_two_strips_leaves_the_vae_well(vae, theirs):
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        decode(vae, LATENTS, "strips")
    management.interrupt_current_processing(False)
    assert (decode(vae, LATENTS, "strips") - theirs).abs().max() < 1e-4


def test_strips_equal_the_decode_of_the_sdxl_vae_as_the_host_builds_it():
    """Its shape, with random weights."""
    shape = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 64,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    made = AutoencoderKL(ddconfig=shape, embed_dim=4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.03 if parameter.ndim > 1 else 0.3)
    sdxl = comfy.sd.VAE(sd=made.state_dict(), config={"params": {"ddconfig": shape, "embed_dim": 4}})
    theirs = sdxl.decode(LATENTS)
    assert theirs.std() > 0.05
    assert (decode(sdxl, LATENTS, "strips", 2e7) - theirs).abs().max() < 1e-4


def test_a_preview_decoder_which_is_built_differently():
    torch.manual_seed(0)
    made = TAESD()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    preview = comfy.sd.VAE(sd=made.state_dict())
    assert read_decoder(preview.first_stage_model) is None
    (picture,) = VAEDecode.execute({"samples": LATENTS}, preview, "auto", 0, 0, "keep").result
    assert picture.std() > 0 and (picture - preview.decode(LATENTS)).abs().max() < 1e-5
    with pytest.raises(SigmaError, match="can not be decoded in strips"):
        decode(preview, LATENTS, "strips")


def test_what_the_vae_can_not_work_on_is_explained(vae):
    """By the host's own nodes too."""
    wrong = torch.zeros(1, 16, 8, 8), torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 4, 64)
    for latents in (*wrong, NestedTensor([wrong[0], wrong[2]])):
        for decode_by in (
            lambda latent: host_nodes.VAEDecode().decode(vae, latent),
            lambda latent: host_nodes.VAEDecodeTiled().decode(vae, latent, 512),
            lambda latent: VAEDecode.execute(latent, vae, "auto", 0, 0, "keep"),
        ):
            with pytest.raises(SigmaError, match="The latents are .*another kind of model"):
                decode_by({"samples": latents})
    for shape in ((1, 64, 64, 1), (1, 3, 64, 64, 3), (64, 64, 3), (1, 64, 4, 3)):
        for node, settings in ((host_nodes.VAEEncode(), ()), (host_nodes.VAEEncodeTiled(), (512, 64))):
            with pytest.raises(SigmaError, match="The pictures are"):
                node.encode(vae, torch.zeros(shape), *settings)
    (frame,) = host_nodes.VAEDecode().decode(vae, {"samples": LATENTS[:1, :, None]})
    assert (frame - vae.decode(LATENTS[:1])).abs().max() < 1e-5
    (encoded,) = host_nodes.VAEEncode().encode(vae, torch.cat([frame, frame[..., :1]], dim=-1))
    assert encoded["samples"].shape == (1, 4, 24, 17)
