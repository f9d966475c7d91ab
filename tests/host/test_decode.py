"""The decode node on the host's own VAE object: in strips as whole, stopped, and with other decoders."""

DECODE = """
import torch
import comfy.model_management as management
import comfy.sd
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.taesd.taesd import TAESD
from pack.nodes.decode import VAEDecode
from pack.nodes.host.vae import decode, load_vae
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.vae.memory import least_budget, whole_decode_bytes
from pack.pixart_sigma.vae.layers import read_decoder

def raises(kind, message, act):
    try:
        act()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was raised instead of {message}")

with torch.inference_mode():
    vae = load_vae(DEMO)
    latents = torch.randn(2, 4, 24, 17, generator=torch.Generator().manual_seed(0)) * 5
    theirs = vae.decode(latents)
    decoder = read_decoder(vae.first_stage_model)
    least = least_budget(decoder, 24, 17, 4)
    choices = ("whole", None), ("auto", None), ("strips", None), ("strips", least), ("auto", least)
    for how, budget in choices:
        ours = decode(vae, latents, how, budget)
        assert ours.shape == theirs.shape == (2, 192, 136, 3)
        assert (ours - theirs).abs().max() < 1e-4, (how, budget)
    assert least < whole_decode_bytes(decoder, 24, 17, 4) / 3
    raises(SigmaError, "Give it more", lambda: decode(vae, latents, "strips", 1000.0))

    # the node
    (node,) = VAEDecode.execute({"samples": latents}, vae, "strips", 120, 96, "keep", 0.02).result
    (whole,) = VAEDecode.execute({"samples": latents}, vae, "off", 120, 96, "keep").result
    assert node.shape == (2, 96, 120, 3) and (node - whole).abs().max() < 1e-4

    # an interrupt between two strips
    management.interrupt_current_processing(True)
    raises(management.InterruptProcessingException, "", lambda: decode(vae, latents, "strips"))
    management.interrupt_current_processing(False)
    assert (decode(vae, latents, "strips") - theirs).abs().max() < 1e-4

    # the SDXL VAE's shape as the host builds it, random weights
    shape = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 64,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }
    torch.manual_seed(0)
    made = AutoencoderKL(ddconfig=shape, embed_dim=4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.03 if parameter.ndim > 1 else 0.3)
    sdxl = comfy.sd.VAE(sd=made.state_dict(), config={"params": {"ddconfig": shape, "embed_dim": 4}})
    theirs = sdxl.decode(latents)
    assert theirs.std() > 0.05
    assert (decode(sdxl, latents, "strips", 2e7) - theirs).abs().max() < 1e-4

    # a preview decoder, which is built differently
    made = TAESD()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    preview = comfy.sd.VAE(sd=made.state_dict())
    assert read_decoder(preview.first_stage_model) is None
    (picture,) = VAEDecode.execute({"samples": latents}, preview, "auto", 0, 0, "keep").result
    assert picture.std() > 0 and (picture - preview.decode(latents)).abs().max() < 1e-5
    raises(SigmaError, "can not be decoded in strips", lambda: decode(preview, latents, "strips"))
print("DECODED")
"""


def test_strips_equal_the_hosts_own_decode(run_in_host):
    assert "DECODED" in run_in_host(DECODE)
