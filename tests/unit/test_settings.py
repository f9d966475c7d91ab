"""Settings and ways: checked once, whole, when they are made, without torch."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pixart_sigma.errors import SettingError, SigmaError
from pixart_sigma.settings import Settings, Ways

NAN = float("nan")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt": None}, "prompt is None"),
        ({"prompt": ["a", "b"]}, "give one text"),
        ({"width": 15}, "width is 15; give 16 to 8192 pixels"),
        ({"height": 512.5}, "height is 512.5; give a whole number"),
        ({"binning": 1}, "binning is 1"),
        ({"count": 0}, "count is 0"),
        ({"count": True}, "count is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "from 0 to 2"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance_scale": NAN}, "guidance_scale is nan"),
        ({"scheduler": "magic"}, "scheduler is 'magic'; choose one of dpmpp_2m"),
        ({"scheduler": ["euler"]}, "scheduler is"),
        ({"timesteps": [1, 2]}, "timesteps is"),
        ({"sigmas": [1.0, 0.0]}, "the scheduler dpmpp_2m takes none; use euler"),
        ({"eta": 0.5}, "eta is 0.5; the scheduler dpmpp_2m has none"),
        ({"eta": NAN, "scheduler": "ddim"}, "eta is nan"),
        ({"strength": 0}, "strength is 0"),
        ({"strength": 0.4, "steps": 2}, "strength is 0.4; of 2 steps it leaves none"),
        ({"kv_compression": 2}, "kv_compression is 2"),
        ({"recipe": "fast"}, "recipe is 'fast'; choose one-step"),
        ({"recipe": "lcm-4", "steps": 4}, "steps is 4; the recipe lcm-4 decides the steps"),
        ({"recipe": "lcm-4", "scheduler": "lcm"}, "scheduler is lcm; the recipe lcm-4 decides"),
        ({"recipe": "lcm-4", "timesteps": (999, 5)}, "timesteps is .* the recipe lcm-4 decides"),
        (
            {"recipe": "lcm-4", "guidance_scale": 4.5},
            "guidance_scale is 4.5; the recipe lcm-4 is",
        ),
        ({"recipe": "lcm-4", "spacing": "trailing"}, "spacing is trailing; the recipe lcm-4 decides"),
        ({"recipe": "lcm-4", "speed": "auto"}, "speed is auto; the recipe lcm-4 has too few"),
        ({"recipe": "lcm-4", "speed": "forecast:1:1"}, "the recipe lcm-4 has too few steps to forecast"),
        ({"recipe": "lcm-4", "strength": 0.2}, "strength is 0.2; of 4 steps it leaves none, so raise it"),
        ({"clean_caption": "yes"}, "clean_caption is 'yes'"),
        (
            {"nag_scale": 5.0},
            "nag_scale is 5.0; it takes the place of guidance, which is 4.5; set guidance to 1",
        ),
        ({"nag_scale": 1, "guidance_scale": 1}, "nag_scale is 1; give a number above 1"),
        ({"nag_scale": NAN, "guidance_scale": 1}, "nag_scale is nan"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0; give a whole number of tokens"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_at_once(given, message):
    with pytest.raises(SettingError, match=message):
        Settings(**given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, bf16"),
        ({"t5_precision": "int7"}, "t5_precision is 'int7'; choose one of int8"),
        ({"t5_device": "gpu"}, "t5_device is 'gpu'; choose one of auto, cpu, stream"),
        ({"transformer_device": "cpu"}, "choose one of auto, stream"),
        ({"decode": "strip"}, "decode is 'strip'; choose one of auto, whole, strips, tiles"),
        ({"decode_budget": 0}, "decode_budget is 0"),
        ({"budget": NAN}, "budget is nan"),
        ({"budget": 1e9, "decode": "whole"}, "plans the decode too"),
        ({"release": "drop"}, "release is 'drop'; choose one of keep, offload, free"),
        ({"guidance_in_turn": None}, "guidance_in_turn is None"),
    ],
    ids=str,
)
def test_a_wrong_way_is_named_at_once(given, message):
    with pytest.raises(SettingError, match=message):
        Ways(**given)


def test_an_error_can_have_the_name_of_an_option():
    with pytest.raises(SigmaError) as caught:
        Settings(guidance_scale=NAN)
    assert caught.value.called("--guidance").startswith("--guidance is nan; give")


def test_settings_travel_as_json():
    settings = Settings(
        "a fox", seed=2**63, scheduler="euler", sigmas=[9.0, 1.0, 0.0], kv_compression="mean:2:all"
    )
    again = Settings.from_dict(json.loads(json.dumps(settings.as_dict())))
    assert again == settings and again.sigmas == (9.0, 1.0, 0.0)
    few = Settings(recipe=" X0:400:sigma").complete(512)
    assert Settings.from_dict(json.loads(json.dumps(few.as_dict()))) == few and few.recipe == "x0:400:sigma"
    assert (few.guidance_scale, few.schedule_length) == (1.0, 1)
    ways = Ways(t5_precision="nf4", decode="strips", decode_budget=2e9)
    assert Ways.from_dict(json.loads(json.dumps(ways.as_dict())) | {"of_a_later_version": 1}) == ways
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1


def test_what_is_left_open_is_completed_for_a_checkpoint():
    complete = Settings(width=300, scheduler="one_step").complete(1024)
    assert (complete.width, complete.height, complete.guidance_scale) == (300, 1024, 1.0)
    assert Settings(width=1024, height=1024).made_size(256) == (256, 256)
    assert Settings(width=1000, height=500, binning=False).made_size(256) == (1000, 504)


def test_they_are_checked_without_torch():
    code = "import sys; from pixart_sigma.settings import Settings, Ways; Settings(steps=3), Ways(); "
    code += "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
