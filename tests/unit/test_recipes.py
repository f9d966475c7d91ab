"""Recipes of few-step weights: their spellings, and which files they are for. Without torch."""

import pytest
from diffusers import LCMScheduler, TCDScheduler

from pixart_sigma.errors import SettingError
from pixart_sigma.noise_schedule import PUBLISHED, NoiseSchedule
from pixart_sigma.recipes import (
    ORIGIN_STEPS,
    RECIPE_NAMES,
    FewStepRecipe,
    check_recipe,
    parse_recipe,
    suggest_recipe,
)


@pytest.mark.parametrize(
    "spelling, recipe",
    [
        ("one-step", FewStepRecipe((400,), "x0")),
        ("Phased-4 ", FewStepRecipe((999, 749, 500, 250), "ddim")),
        ("phased-2", FewStepRecipe((999, 500), "ddim")),
        ("four-step", FewStepRecipe((899, 674, 449, 224), "ddim")),
        ("lcm-8", FewStepRecipe((999, 879, 759, 639, 499, 379, 259, 139), "lcm")),
        ("tcd-1", FewStepRecipe((999,), "tcd")),
        ("ddim:999,749, 500,250", FewStepRecipe((999, 749, 500, 250), "ddim")),
        ("x0:440:sigma", FewStepRecipe((440,), "x0", "sigma")),
        ("tcd:999,0:unit", FewStepRecipe((999, 0), "tcd")),
    ],
)
def test_a_recipe_by_its_name_or_spelled_out(spelling, recipe):
    assert parse_recipe(spelling) == recipe


def test_every_name_that_lists_offer_is_one():
    assert len({parse_recipe(name) for name in RECIPE_NAMES}) == len(RECIPE_NAMES) >= 8


@pytest.mark.parametrize("update, kind", [("lcm", LCMScheduler), ("tcd", TCDScheduler)])
def test_consistency_timesteps_are_those_of_diffusers(update, kind):
    for count in range(1, ORIGIN_STEPS + 1):
        scheduler = kind()
        scheduler.set_timesteps(count)
        assert parse_recipe(f"{update}-{count}").timesteps == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    "spelling, message",
    [
        (
            "fast",
            "recipe is 'fast'; choose one-step, phased-4, .* lcm-N or tcd-N with N from 1 to 50",
        ),
        ("lcm-0", "recipe is 'lcm-0'; choose"),
        ("lcm-51", "recipe is 'lcm-51'; choose"),
        ("", "recipe is ''; choose"),
        (4, "recipe is 4; choose"),
        ("x0:400:sigma:1", "choose"),
        ("ddim:250,500", r"its timesteps \[250, 500\]: give whole numbers from 999 to 0, descending"),
        ("ddim:1000", r"its timesteps \[1000\]"),
        ("ddim:", "its timesteps '': give whole numbers such as 999"),
        ("x0:4.5", "its timesteps '4.5'"),
        ("euler:999", "its update 'euler': choose one of x0, ddim, lcm, tcd"),
        ("x0:400:noise", "its start 'noise': choose one of unit, sigma"),
    ],
)
def test_a_wrong_recipe_is_explained(spelling, message):
    with pytest.raises(SettingError, match=message):
        parse_recipe(spelling)


def test_a_noise_schedule_that_it_cannot_run_is_named():
    flow = NoiseSchedule(prediction_type="flow_prediction")
    with pytest.raises(SettingError, match="one-step; the checkpoint has prediction_type flow_prediction"):
        check_recipe("one-step", flow)
    zero = NoiseSchedule(rescale_betas_zero_snr=True)
    with pytest.raises(SettingError, match="lcm-4; the checkpoint has zero terminal SNR with epsilon"):
        check_recipe("lcm-4", zero)
    for runs in (PUBLISHED, zero, NoiseSchedule(prediction_type="v_prediction")):
        assert check_recipe("one-step", runs) == parse_recipe("one-step")
    assert check_recipe(
        "lcm-4", NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ) == parse_recipe("lcm-4")


def test_a_picture_to_start_from_leaves_the_last_timesteps():
    recipe = parse_recipe("phased-4")
    assert recipe.last(1) == recipe.timesteps and recipe.last(0.6) == (500, 250) and recipe.last(0.1) == ()


@pytest.mark.parametrize(
    "names, recipe",
    [
        (["pixart-sigma-nitro.safetensors"], "one-step"),
        (["PixArt-Alpha-DMD-XL-2-512x512", "transformer"], "one-step"),
        (["pixart-sigma-inkwash-4step-lora", "adapter_model.safetensors"], "phased-4"),
        (["pixart-sigma-inkwash-2step-lora"], "phased-2"),
        (["my_LCM.pth"], "lcm-4"),
        (["PixArt-Sigma-XL-2-1024-MS.pth"], ""),
        (["pixart-sigma-inkwash-teacher-lora"], ""),
        (["admdata.safetensors"], ""),
    ],
    ids=str,
)
def test_what_files_are_called_suggests_a_recipe(names, recipe):
    assert suggest_recipe(names) == recipe
