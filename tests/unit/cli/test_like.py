"""A picture says how it was made, and `generate --like` makes it again."""

import json
import shutil

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_sigma import DEMO
from pixart_sigma.cli.commands import main
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.files.picture_files import KEY
from pixart_sigma.noise_schedule import NoiseSchedule


@pytest.fixture
def generate(tmp_path, capsys):
    """Runs `pixart-sigma generate` with the demo -> (status, the picture's bytes or None, stderr)."""

    def run(*options, out="picture.png"):
        path = tmp_path / out
        path.unlink(missing_ok=True)
        status = main(["generate", *map(str, options), "--out", str(path)])
        made = path.read_bytes() if path.exists() else None
        return status, made, capsys.readouterr().err

    return run


FAST = ("--steps", 2, "--size", "64x64", "--no-binning")


@pytest.mark.parametrize(
    "options",
    [
        ("a red circle", *FAST, "--seed", 7, "--negative", "blue", "--guidance", 3),
        ("a red circle", "--steps", 2, "--size", "96x64", "--scheduler", "euler_ancestral"),
        ("a red circle", *FAST, "--timesteps", "999,500,100", "--kv-compression", "auto"),
        ("a red circle", *FAST, "--kv-compression", "mean:2:deep:20-80%", "--transformer", "demo-kv"),
        (
            "a red circle",
            "--size",
            "64x64",
            "--no-binning",
            "--recipe",
            "lcm-2",
            "--transformer",
            "demo-phased",
        ),
        ("a red circle", "--steps", 2, "--budget", "100MB"),
        ("a red circle", *FAST, "--t5-precision", "bf16", "--decode", "tiles", "--clean-caption"),
        ("a red circle on a blue square", *FAST, "--max-sequence-length", 3),
        ("a red circle", "--size", "64x64", "--recipe", "tcd-2", "--seed", 7),
        ("a red circle", *FAST, "--negative", "a small circle", "--guidance", 1, "--nag", 5),
    ],
    ids=lambda options: " ".join(map(str, options[1:])),
)
def test_like_makes_the_same_file(generate, tmp_path, options):
    status, first, err = generate(*options)
    assert status == 0, err
    (tmp_path / "picture.png").rename(tmp_path / "kept.png")
    status, again, err = generate("--like", tmp_path / "kept.png")
    assert status == 0, err
    assert again == first


def test_each_option_beside_it_changes_that_one_thing(generate, tmp_path):
    _, first, _ = generate("a red circle", *FAST, "--seed", 7)
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    for options, field, value in (
        (("--seed", 8), "seed", 8),
        (("a blue square",), "prompt", "a blue square"),
        (("--guidance", 1), "guidance_scale", 1),
        (("--scheduler", "ddim"), "scheduler", "ddim"),
    ):
        status, other, err = generate("--like", kept, *options)
        assert status == 0 and other != first, err
        before, after = (Metadata.read(path).settings.as_dict() for path in (kept, tmp_path / "picture.png"))
        assert after == before | {field: value}
    status, _, _ = generate("--like", kept, "--decode", "strips", "--seed", 7)
    assert status == 0 and Metadata.read(tmp_path / "picture.png").ways.decode == "strips"


def test_a_recipe_and_steps_take_each_others_place(generate, tmp_path):
    _, first, _ = generate("a red circle", *FAST, "--scheduler", "ddim", "--guidance", 3)
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    status, _, err = generate("--like", kept, "--recipe", "x0:400:sigma")
    made = Metadata.read(tmp_path / "picture.png").settings
    assert status == 0 and (made.recipe, made.guidance_scale) == ("x0:400:sigma", 1), err
    (tmp_path / "picture.png").rename(kept)
    status, _, err = generate("--like", kept, "--steps", 2)
    made = Metadata.read(tmp_path / "picture.png").settings
    assert status == 0 and (made.recipe, made.steps) == (None, 2), err
    status, made, err = generate("--like", kept, "--guidance", 3)
    assert status == 2 and made is None and "--guidance is 3.0; the recipe x0:400:sigma is for" in err


def test_steps_take_the_place_of_a_pictures_own_timesteps(generate, tmp_path):
    _, first, _ = generate("a red circle", *FAST, "--timesteps", "999,500")
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    status, other, err = generate("--like", kept, "--steps", 3)
    assert status == 0 and other != first, err
    made = Metadata.read(tmp_path / "picture.png").settings
    assert made.steps == 3 and made.timesteps is None
    assert generate("--like", kept, "--timesteps", "999,500")[1] == first


def test_guidance_takes_the_place_of_a_pictures_attention_guidance(generate, tmp_path):
    unguided = ("a red circle", *FAST, "--negative", "a small circle", "--guidance", 1)
    status, plain, err = generate(*unguided)
    assert status == 0 and "the negative prompt is not used; --nag 5 lets it act" in err.lower()
    status, first, err = generate(*unguided, "--nag", 5)
    assert status == 0 and first != plain and "negative prompt" not in err
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    assert Metadata.read(kept).settings.nag_scale == 5
    status, _, err = generate("--like", kept, "--guidance", 3)
    assert status == 0 and Metadata.read(tmp_path / "picture.png").settings.nag_scale is None, err
    status, _, err = generate("a red circle", *FAST, "--nag", 5)
    assert status == 2 and "--nag is 5.0; it takes the place of guidance" in err


def test_a_picture_from_a_picture_needs_that_picture(generate, tmp_path):
    source, other = tmp_path / "source.png", tmp_path / "other.png"
    Image.new("RGB", (80, 50), "red").save(source)
    Image.new("RGB", (80, 50), "blue").save(other)
    status, first, err = generate("a red circle", *FAST, "--steps", 4, "--image", source, "--strength", 0.5)
    assert status == 0, err
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    assert str(source).encode() not in first  # where people keep their pictures is theirs
    status, _, err = generate("--like", kept)
    assert status == 2 and "give that with --image" in err
    status, again, _ = generate("--like", kept, "--image", source)
    assert status == 0 and again == first
    status, again, err = generate("--like", kept, "--image", other)
    assert status == 0 and again != first and "another picture" in err


def test_a_picture_from_encoded_prompts(generate, tmp_path):
    file = tmp_path / "prompt.safetensors"
    assert main(["encode", "a red circle", "--out", str(file)]) == 0
    status, first, _ = generate("--embeddings", file, *FAST)
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    assert generate("--like", kept)[:2] == (0, first)
    assert generate("--like", kept, "--embeddings", file)[:2] == (0, first)


def test_embeddings_of_an_unknown_encoder_are_asked_for(generate, tmp_path):
    from pixart_sigma import PromptEmbeddings

    known = PromptEmbeddings.load(DEMO / "prompt_embeddings.safetensors")
    PromptEmbeddings(known.positive, known.negative).save(tmp_path / "nameless.safetensors")
    _, first, _ = generate("--embeddings", tmp_path / "nameless.safetensors", *FAST)
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    status, _, err = generate("--like", kept)
    assert status == 2 and "--embeddings" in err
    assert generate("--like", kept, "--embeddings", tmp_path / "nameless.safetensors")[:2] == (0, first)


def test_another_model_is_named_and_used_only_where_it_is_asked_for(generate, tmp_path):
    _, first, _ = generate("a red circle", *FAST)
    kept = tmp_path / "kept.png"
    content = json.loads(Image.open(tmp_path / "picture.png").text[KEY])
    content["models"]["transformer"] = {"name": "my-finetune", "fingerprint": "0" * 64}
    text = PngInfo()
    text.add_text(KEY, json.dumps(content))
    Image.open(tmp_path / "picture.png").save(kept, pnginfo=text)
    status, _, err = generate("--like", kept)
    assert status == 2 and "'my-finetune'" in err and "--transformer" in err
    shutil.copytree(DEMO, tmp_path / "mine")
    status, again, err = generate("--like", kept, "--transformer", tmp_path / "mine")
    assert status == 0 and "another one than" in err


def test_a_tokenizer_from_elsewhere_is_named(generate, tmp_path):
    """It decides the embeddings, so it is kept with the picture and asked for."""
    shutil.copytree(DEMO / "text_encoder", tmp_path / "alone" / "t5")
    shutil.copytree(DEMO / "tokenizer", tmp_path / "mine" / "tokenizer")
    settings = tmp_path / "mine" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    bare = ("--text-encoder", tmp_path / "alone" / "t5", "--tokenizer", tmp_path / "mine")
    status, first, err = generate("a red circle", *FAST, *bare, out="kept.png")
    assert status == 0, err
    kept = tmp_path / "kept.png"
    assert Metadata.read(kept).models["tokenizer"].name == "mine/tokenizer"
    status, _, err = generate("--like", kept)
    assert status == 2 and "another text encoder, 't5' with the tokenizer 'mine/tokenizer'" in err
    assert "--text-encoder and --tokenizer" in err
    assert generate("--like", kept, *bare)[1] == first


def test_what_a_transformer_was_taken_for_is_kept(generate, tmp_path):
    """A folder that does not say may be of 1024 or of 2K, and the picture depends on it."""
    shutil.copytree(DEMO / "transformer", tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    for name in ("sample_size", "interpolation_scale"):
        config.pop(name)
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    model = ("--transformer", tmp_path / "mine")
    _, assumed, _ = generate("a red circle", *FAST, *model)
    status, first, err = generate("a red circle", *FAST, *model, "--variant", "256")
    assert status == 0 and first != assumed, err
    kept = tmp_path / "kept.png"
    kept.write_bytes(first)
    assert generate("--like", kept, *model)[:2] == (0, first)
    assert generate("--like", kept, *model, "--variant", "1024")[1] != first


def test_the_noise_schedule_that_it_was_made_with_is_kept(generate, tmp_path):
    """Also where an earlier version took the published one for every checkpoint."""
    shutil.copytree(DEMO, tmp_path / "mine")
    config = tmp_path / "mine" / "scheduler" / "scheduler_config.json"
    published = config.read_text()
    config.write_text(json.dumps(json.loads(published) | {"beta_schedule": "scaled_linear"}))
    model = ("--model", tmp_path / "mine", "--t5-precision", "fp32")
    status, first, err = generate("a red circle", *FAST, *model, out="kept.png")
    assert status == 0, err
    made = Metadata.read(tmp_path / "kept.png")
    assert made.noise_schedule == NoiseSchedule(beta_schedule="scaled_linear")
    assert generate("--like", tmp_path / "kept.png", *model)[:2] == (0, first)

    content = json.loads(made.as_json())
    del content["noise_schedule"]
    text = PngInfo()
    text.add_text(KEY, json.dumps(content))
    Image.open(tmp_path / "kept.png").save(tmp_path / "before.png", pnginfo=text)
    status, before, err = generate("--like", tmp_path / "before.png", *model)
    assert status == 0 and before != first
    assert "before.png was made with epsilon, linear betas" in err and "scaled_linear" in err
    config.write_text(published)
    assert generate("a red circle", *FAST, *model)[:2] == (0, before)
    status, again, err = generate("--like", tmp_path / "kept.png", *model)
    assert (status, again) == (0, first) and "was made with epsilon, scaled_linear" in err


def test_a_picture_of_before_is_read_and_others_are_named(generate, tmp_path):
    def write(name, said):
        text = PngInfo()
        if said is not None:
            text.add_text(KEY, said)
        Image.new("RGB", (16, 16)).save(tmp_path / name, pnginfo=text)
        return tmp_path / name

    old = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 2, "seed": 3, "t5_precision": "fp32"}
    status, _, err = generate("--like", write("old.png", json.dumps(old)), "--no-binning")
    assert status == 0, err
    settings = Metadata.read(tmp_path / "picture.png").settings
    assert (settings.prompt, settings.seed, settings.binning) == ("a red circle", 3, False)

    hostile = old | {"kv_compression": "/etc/secrets.json"}
    for file, words in (
        (write("none.png", None), "does not say how it was made"),
        (write("list.png", "[1]"), "in a way that can be read"),
        (write("noise.png", json.dumps(old | {"noise_schedule": {"beta_end": 9}})), "beta_end is 9"),
        (write("wrong.png", json.dumps(old | {"steps": "many"})), "steps is many"),
        (write("hostile.png", json.dumps(hostile)), "not trusted"),
        (tmp_path / "gone.png", "gone.png"),
        (DEMO / "README.md", "not a picture"),
    ):
        status, made, err = generate("--like", file)
        assert (status, made) == (2, None) and words in err, err


def test_the_metadata_says_all_that_decides_the_picture(generate, tmp_path):
    generate("a red circle", *FAST, "--kv-compression", "auto")
    made = Metadata.read(tmp_path / "picture.png")
    assert made.settings.kv_compression == "off"  # what auto came to, which a calibration may change later
    assert made.settings.guidance_scale == 4.5 and made.settings.width == 64
    assert made.ways.decode == "whole" and made.ways.dtype == "fp32" and made.ways.device == "cpu"
    assert set(made.models) == {"transformer", "text_encoder", "vae"}
    assert all(len(model.fingerprint) == 64 and model.name == "demo" for model in made.models.values())
    assert made.versions["torch"] == torch.__version__.partition("+")[0]
