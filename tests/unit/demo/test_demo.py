"""The demo model that is in the pack: its form, and that it draws what it is asked for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from pixart_sigma import DEMO, DEMO_KV, DEMO_PHASED
from pixart_sigma.inspection import find_recipe
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.config import KVWeights
from pixart_sigma.transformer.kv_rules import AUTO_PIXELS, resolve

sys.path.insert(0, str(Path(__file__).parents[3] / "tools" / "demo"))
from judge import look  # noqa: E402


def config(component: str) -> dict:
    return json.loads((DEMO / component / "config.json").read_text())


def test_it_is_a_whole_pipeline_in_the_published_layout():
    assert set(inspect(DEMO).components) == {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"}


@pytest.mark.parametrize("folder", [DEMO, DEMO_KV])
def test_it_is_small_and_stored_in_half_precision(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12_000_000
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}


def test_its_shapes_suit_comfyui_and_bitsandbytes():
    vae, t5, transformer = config("vae"), config("text_encoder"), config("transformer")
    assert len(vae["block_out_channels"]) == 4 and vae["norm_num_groups"] == 32
    assert all(width % 32 == 0 for width in vae["block_out_channels"])
    assert vae["scaling_factor"] == 0.13025
    for width in (t5["d_model"], t5["d_ff"], t5["num_heads"] * t5["d_kv"], transformer["caption_channels"]):
        assert width % 64 == 0
    assert transformer["num_attention_heads"] * transformer["attention_head_dim"] % 64 == 0
    assert transformer["out_channels"] == 8 and transformer["norm_type"] == "ada_norm_single"


@pytest.fixture(scope="module")
def demo():
    return SigmaPipeline.from_path("demo", Ways(device="cpu", release="keep"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt, ground, color, shape, position",
    [
        ("a red circle on a blue background", "blue", "red", "circle", "center"),
        ("a yellow square on a purple background", "purple", "yellow", "square", "center"),
        ("a large green triangle", "white", "green", "triangle", "center"),
        ("a white star on a black background", "black", "white", "star", "center"),
    ],
)
def test_it_draws_what_it_is_asked_for(demo, prompt, ground, color, shape, position):
    picture = demo.generate(Settings(prompt, seed=0)).images[0]
    assert picture.size == (256, 256)
    seen_ground, seen = look(np.asarray(picture))
    assert seen_ground == ground
    assert [(one.color, one.shape, one.position) for one in seen[:1]] == [(color, shape, position)]


@pytest.mark.slow
def test_it_places_two_objects(demo):
    prompt = "a pink square to the left of a cyan circle on a brown background"
    ground, seen = look(np.asarray(demo.generate(Settings(prompt, seed=0)).images[0]))
    first, second = sorted(seen[:2], key=lambda one: one.x)
    assert (ground, first.color, second.color) == ("brown", "pink", "cyan")
    assert first.shape == "square"


@pytest.mark.slow
def test_the_one_trained_with_kv_compression_needs_no_setting():
    trained = inspect(DEMO_KV).config
    assert trained.kv_compression == KVWeights(2, (2, 3, 4))
    assert 256 * 256 < AUTO_PIXELS  # where weights that were not trained so are left as they are
    (rule,) = resolve("auto", trained, 256, 256)
    assert (rule.operator, rule.ratio, rule.layers) == ("conv", 2, (2, 3, 4))

    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu", release="keep"), transformer="demo-kv")
    for prompt, ground, color, shape in (
        ("a large yellow triangle on a purple background", "purple", "yellow", "triangle"),
        ("a red circle on a blue background", "blue", "red", "circle"),
    ):
        seen_ground, seen = look(np.asarray(pipeline.generate(Settings(prompt, seed=0)).images[0]))
        assert (seen_ground, [(one.color, one.shape) for one in seen]) == (ground, [(color, shape)])


@pytest.mark.slow
def test_the_one_for_four_steps_says_so_and_draws_in_them():
    assert DEMO_PHASED.stat().st_size < 4_000_000
    recipe = find_recipe(DEMO_PHASED)
    assert recipe == "phased-4" and not find_recipe(DEMO)
    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu", release="keep"), transformer="demo-phased")
    for prompt, ground, color, shape in (
        ("a large yellow triangle on a purple background", "purple", "yellow", "triangle"),
        ("a red circle on a blue background", "blue", "red", "circle"),
        ("a white star on a black background", "black", "white", "star"),
    ):
        picture = pipeline.generate(Settings(prompt, seed=0, recipe=recipe)).images[0]
        seen_ground, seen = look(np.asarray(picture))
        assert (seen_ground, [(one.color, one.shape) for one in seen]) == (ground, [(color, shape)])
