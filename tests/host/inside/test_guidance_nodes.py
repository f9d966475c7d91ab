"""Each of the host's guidance nodes acts on our MODEL or says why not, and perturbed attention is that of
diffusers' pipeline. On the CPU."""

import re
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy_extras.nodes_post_processing  # noqa: F401 - nodes_latent cannot be imported before it
import pytest
import torch
from comfy_extras import (
    nodes_apg,
    nodes_attention_multiply,
    nodes_cfg,
    nodes_custom_sampler,
    nodes_differential_diffusion,
    nodes_eps,
    nodes_freelunch,
    nodes_fresca,
    nodes_hypertile,
    nodes_latent,
    nodes_lt,
    nodes_lumina2,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_nag,
    nodes_pag,
    nodes_perpneg,
    nodes_rope,
    nodes_sag,
    nodes_sd3,
    nodes_slg,
    nodes_tcfg,
    nodes_tomesd,
    nodes_video_model,
)
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPAGPipeline
from pack.nodes.host.kv_compression import set_kv_compression
from pack.nodes.host.sampling import reference_sigmas
from pack.nodes.host.speed import set_speed
from pack.nodes.host.transformer import load_model
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.prompt_embeds import pad_embeds
from pack.pixart_sigma.sampling.denoise import denoise
from pack.pixart_sigma.settings import Settings
from pack.pixart_sigma.transformer.hooks import Hooks
from pack.pixart_sigma.transformer.network import SigmaTransformer
from random_models import conditioning, difference, transformer
from safetensors.torch import save_file

POSITIVE, NEGATIVE, EMPTY = (conditioning(length, 64, seed=length) for length in (9, 5, 1))
SIZE = (24, 16)
STEPS = 4
LAYERS = 5  # of which the third is in the middle


@pytest.fixture(scope="module")
def theirs():
    return transformer(2, LAYERS, 64)


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny_1024.safetensors"
    save_file(theirs.state_dict(), path)
    return load_model(path)


def sample(model, size=SIZE, cfg=4.5, steps=STEPS, **settings):
    """Latents (1, 4, *size) by the host's sampling and the reference pipeline's schedule."""
    latents = torch.zeros(1, 4, *size)
    return comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latents, 0),
        cfg,
        comfy.samplers.sampler_object("dpmpp_2m"),
        reference_sigmas(model, steps),
        POSITIVE,
        NEGATIVE,
        latents,
        disable_pbar=True,
        **settings,
    )


def custom_sample(model, guider):
    sampler = comfy.samplers.sampler_object("dpmpp_2m")
    noise = nodes_custom_sampler.RandomNoise.execute(0).args[0]
    latent = {"samples": torch.zeros(1, 4, *SIZE)}
    sigmas = reference_sigmas(model, STEPS)
    return nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0][
        "samples"
    ]


def patched(node, **settings):
    """A run of the MODEL as the node returns it."""

    def run(model):
        execute = getattr(node, "execute", None) or node().patch
        made = execute(model=model, **settings)
        return sample(getattr(made, "args", made)[0])

    return run


def guided(node, **settings):
    def run(model):
        return custom_sample(model, node.execute(model, **settings).args[0])

    return run


def sharpening(model):
    operation = nodes_latent.LatentOperationSharpen.execute(1, 1.0, 0.5).args[0]
    return sample(nodes_latent.LatentApplyOperationCFG.execute(model, operation).args[0])


def painting(model):
    """A mask between black and white, which the node turns into another one for each step."""
    gradient = torch.linspace(0, 1, SIZE[1]).expand(1, 1, *SIZE)
    changed = nodes_differential_diffusion.DifferentialDiffusion.execute(model, 1.0).args[0]
    given = sample(model, noise_mask=gradient)
    assert difference(sample(changed, noise_mask=gradient), given) > 1e-3
    return sample(changed, noise_mask=gradient)


def with_two_models(model):
    """The negative prompt by a MODEL of other weights."""
    again = load_model(model.model.checkpoint_path)
    other = nodes_attention_multiply.UNetSelfAttentionMultiply.execute(again, **MULTIPLIED).args[0]
    return guided(
        nodes_custom_sampler.DualModelGuider,
        positive=POSITIVE,
        cfg=4.5,
        model_negative=other,
        negative=NEGATIVE,
    )(model)


MULTIPLIED = {"q": 1.0, "k": 1.0, "v": 1.0, "out": 1.2}
TEMPORAL = dict.fromkeys(("self_structural", "self_temporal", "cross_structural", "cross_temporal"), 1.2)
STG = {"scale": 3.0, "blocks": str(LAYERS // 2), "start_percent": 0.0, "end_percent": 1.0}
ACT = {
    "APG": patched(nodes_apg.APG, eta=1.0, norm_threshold=5.0, momentum=0.0),
    "CFGNorm": patched(nodes_cfg.CFGNorm, strength=1.0),
    "CFGOverride": patched(nodes_custom_sampler.CFGOverride, cfg=2.0, start_percent=0.0, end_percent=1.0),
    "CFGZeroStar": patched(nodes_cfg.CFGZeroStar),
    "DifferentialDiffusion": painting,
    "DualCFGGuider": guided(
        nodes_custom_sampler.DualCFGGuider,
        cond1=POSITIVE,
        cond2=EMPTY,
        negative=NEGATIVE,
        cfg_conds=3.0,
        cfg_cond2_negative=2.0,
        style="regular",
    ),
    "DualModelGuider": with_two_models,
    "Epsilon Scaling": patched(nodes_eps.EpsilonScaling, scaling_factor=1.05),
    "FreSca": patched(nodes_fresca.FreSca, scale_low=1.0, scale_high=1.25, freq_cutoff=4),
    "LatentApplyOperationCFG": sharpening,
    "LTXVSpatioTemporalGuidance": patched(nodes_lt.LTXVSpatioTemporalGuidance, **STG),
    "Mahiro": patched(nodes_mahiro.Mahiro),
    "NAGuidance": patched(nodes_nag.NAGuidance, nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    "PerpNeg": patched(nodes_perpneg.PerpNeg, empty_conditioning=EMPTY, neg_scale=1.0),
    "PerpNegGuider": guided(
        nodes_perpneg.PerpNegGuider,
        positive=POSITIVE,
        negative=NEGATIVE,
        empty_conditioning=EMPTY,
        cfg=4.5,
        neg_scale=1.0,
    ),
    "PerturbedAttentionGuidance": patched(nodes_pag.PerturbedAttentionGuidance, scale=3.0),
    "RenormCFG": patched(nodes_lumina2.RenormCFG, cfg_trunc=100, renorm_cfg=1.0),
    "RescaleCFG": patched(nodes_model_advanced.RescaleCFG, multiplier=0.7),
    "SkipLayerGuidanceDiT": patched(
        nodes_slg.SkipLayerGuidanceDiT,
        scale=3.0,
        start_percent=0.0,
        end_percent=1.0,
        double_layers="2",
        single_layers="7, 8, 9",
    ),
    "SkipLayerGuidanceDiTSimple": patched(
        nodes_slg.SkipLayerGuidanceDiTSimple,
        start_percent=0.0,
        end_percent=1.0,
        double_layers="2",
        single_layers="7, 8, 9",
    ),
    "SkipLayerGuidanceSD3": patched(
        nodes_sd3.SkipLayerGuidanceSD3, layers="2", scale=3.0, start_percent=0.0, end_percent=1.0
    ),
    "TCFG": patched(nodes_tcfg.TCFG),
    "TemporalScoreRescaling": patched(nodes_eps.TemporalScoreRescaling, tsr_k=0.5, tsr_sigma=1.0),
    "TomePatchModel": patched(nodes_tomesd.TomePatchModel, ratio=0.8),
    "UNetCrossAttentionMultiply": patched(nodes_attention_multiply.UNetCrossAttentionMultiply, **MULTIPLIED),
    "UNetSelfAttentionMultiply": patched(nodes_attention_multiply.UNetSelfAttentionMultiply, **MULTIPLIED),
    "UNetTemporalAttentionMultiply": patched(
        nodes_attention_multiply.UNetTemporalAttentionMultiply, **TEMPORAL
    ),
    "VideoLinearCFGGuidance": patched(nodes_video_model.VideoLinearCFGGuidance, min_cfg=1.0),
    "VideoTriangleCFGGuidance": patched(nodes_video_model.VideoTriangleCFGGuidance, min_cfg=1.0),
}


@pytest.fixture(scope="module")
def plain(model):
    return sample(model)


@pytest.mark.parametrize("name", ACT)
def test_a_guidance_node_acts(model, plain, name):
    made = ACT[name](model)
    assert difference(made, plain) > 1e-3, name
    assert difference(sample(model), plain) == 0


REFUSED = {
    "FreeU": (patched(nodes_freelunch.FreeU, b1=1.1, b2=1.2, s1=0.9, s2=0.2), "model_channels"),
    "FreeU_V2": (patched(nodes_freelunch.FreeU_V2, b1=1.3, b2=1.4, s1=0.9, s2=0.2), "model_channels"),
    "HyperTile": (
        patched(nodes_hypertile.HyperTile, tile_size=32, swap_size=2, max_depth=0, scale_depth=False),
        "queries into 6 tiles and leaves the keys whole, as HyperTile does",
    ),
    "LTXVModalityGuidance": (
        patched(nodes_lt.LTXVModalityGuidance, modality_scale=3.0, start_percent=0.0, end_percent=1.0),
        "a2v_cross_attn of this MODEL, which PixArt-Sigma has not",
    ),
    "PatchModelAddDownscale": (
        patched(
            nodes_model_downscale.PatchModelAddDownscale,
            block_number=3,
            downscale_factor=2.0,
            start_percent=0.0,
            end_percent=1.0,
            downscale_after_skip=True,
            downscale_method="bicubic",
            upscale_method="bicubic",
        ),
        "input_block_patch_after_skip of this MODEL, which PixArt-Sigma has not",
    ),
    "ScaleROPE": (
        patched(nodes_rope.ScaleROPE, scale_x=1.5, shift_x=0, scale_y=1.5, shift_y=0, scale_t=1, shift_t=0),
        "rope_options of this MODEL, which PixArt-Sigma has not",
    ),
    "SelfAttentionGuidance": (
        patched(nodes_sag.SelfAttentionGuidance, scale=0.5, blur_sigma=2.0),
        r"attn1 at \('middle', 0, 0\) of this MODEL, and PixArt-Sigma has no such place",
    ),
    "SkipLayerGuidanceDiT of too many layers": (
        patched(
            nodes_slg.SkipLayerGuidanceDiT,
            scale=3.0,
            start_percent=0.0,
            end_percent=1.0,
            double_layers="7, 8, 9",
            single_layers="7, 8, 9",
        ),
        "block 7 of this MODEL, whose blocks are 0 to 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_guidance_node_that_cannot_act_says_why(model, name):
    run, why = REFUSED[name]
    with pytest.raises(SigmaError, match=why):
        run(model)


def test_the_page_about_them_lists_each_of_them():
    page = (Path(__file__).parents[3] / "docs" / "comfyui_nodes.md").read_text(encoding="utf-8")
    lists = re.split(r"^## ", page, flags=re.MULTILINE)[1:3]
    for text, nodes in zip(lists, (ACT, REFUSED), strict=True):
        rows = re.findall(r"^\| ([A-Z].*?) \|", text, re.MULTILINE)
        assert sorted(", ".join(rows).split(", ")) == sorted(name for name in nodes if " of " not in name)


@pytest.mark.parametrize("cfg", [4.5, 1.0])
@pytest.mark.parametrize("size", [SIZE, (12, 48), (32, 32)])
def test_perturbed_attention_is_that_of_diffusers(theirs, model, size, cfg):
    """Whole runs, of the block in the middle."""
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    pipeline = PixArtSigmaPAGPipeline(None, None, None, theirs, scheduler, f"blocks.{LAYERS // 2}")
    pipeline.set_progress_bar_config(disable=True)
    positive, negative = POSITIVE[0][0], NEGATIVE[0][0]
    expected = pipeline(
        prompt=None,
        negative_prompt=None,
        latents=comfy.sample.prepare_noise(torch.zeros(1, 4, *size), 0),
        num_inference_steps=10,
        guidance_scale=cfg,
        pag_scale=3.0,
        height=size[0] * 8,
        width=size[1] * 8,
        use_resolution_binning=False,
        output_type="latent",
        prompt_embeds=positive,
        prompt_attention_mask=torch.ones(1, 9),
        negative_prompt_embeds=torch.cat([negative, torch.zeros(1, 4, 64)], dim=1),
        negative_prompt_attention_mask=torch.arange(9)[None] < 5,
    ).images
    (perturbed,) = nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0).args
    made = sample(perturbed, size, cfg, steps=10) * 0.13025
    assert difference(made, expected) < 1e-4
    assert difference(sample(model, size, cfg, steps=10) * 0.13025, expected) > 1e-2


def test_spatio_temporal_guidance_is_perturbed_attention_in_blocks_of_ones_choice(model):
    (middle,) = nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0).args
    assert difference(ACT["LTXVSpatioTemporalGuidance"](model), sample(middle)) < 1e-5
    (deeper,) = nodes_lt.LTXVSpatioTemporalGuidance.execute(model, **(STG | {"blocks": "1, 4"})).args
    assert difference(sample(deeper), sample(middle)) > 1e-3


def test_perturbed_attention_acts_beside_kv_compression(model):
    """In the replaced attention nothing is compressed, since a node returns as many tokens as it gets."""
    compressed = set_kv_compression(model, "mean:2:all")
    (perturbed,) = nodes_pag.PerturbedAttentionGuidance.execute(compressed, 3.0).args
    assert difference(sample(perturbed), sample(compressed)) > 1e-3


def test_perturbed_attention_acts_beside_forecast_steps(model):
    """What is asked with perturbed attention is forecast from its own past, by both nodes alike."""
    forecast = set_speed(model, "forecast:1:1")
    (perturbed,) = nodes_pag.PerturbedAttentionGuidance.execute(forecast, 3.0).args
    (same,) = nodes_lt.LTXVSpatioTemporalGuidance.execute(forecast, **STG).args
    made = sample(perturbed, steps=10)
    assert difference(made, sample(same, steps=10)) < 1e-5
    assert difference(made, sample(forecast, steps=10)) > 1e-3


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_a_replaced_attention_is_asked_in_its_block(model, plain, kind):
    seen = []

    def attend(query, key, value, extra_options):
        seen.append(extra_options["block"])
        heads = extra_options["n_heads"]
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        mask = extra_options["attn_mask"]
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)

    watched = model.clone()
    watched.set_model_patch_replace(attend, kind, "double_block", 1)
    watched.set_model_patch_replace(attend, kind, "middle", 0)
    assert difference(sample(watched), plain) < 1e-4
    assert seen == [("double_block", 1), ("double_block", LAYERS // 2)] * STEPS


class ByHand(Hooks):
    """What the host's node for normalised attention guidance does to self-attention, with a batch of the
    prompt and the negative prompt: alpha 0.5, tau 1.5, scale 5."""

    def after_attention(self, name, tokens):
        if name == "attn2":
            return tokens
        positive, negative = tokens.chunk(2)
        guided = 5 * positive - 4 * negative
        growth = guided.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        guided = guided * growth.clamp(max=1.5) / growth
        return torch.cat([(guided + positive) / 2, negative])


def test_normalised_attention_guidance_is_that_by_hand(model):
    """The host's node, in a whole run without other guidance."""
    network = model.model.diffusion_model
    embeds, mask = pad_embeds([POSITIVE[0][0], NEGATIVE[0][0]])

    def predict(latents, timestep):
        both = torch.cat([latents] * 2)
        return SigmaTransformer.forward(network, both, timestep, embeds, mask, (), ByHand())[:1]

    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, *SIZE), 0)
    expected = denoise(predict, noise, Settings(steps=10))
    (guided,) = nodes_nag.NAGuidance.execute(model, 5.0, 0.5, 1.5).args
    made = sample(guided, cfg=1.0, steps=10) * 0.13025
    assert difference(made, expected) < 1e-4 < difference(sample(model, cfg=1.0, steps=10) * 0.13025, made)
