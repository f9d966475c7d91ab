import gc
import weakref

import pytest
import torch
from PIL import Image

from pixart_sigma.aspect_ratio import crop_back
from pixart_sigma.errors import SigmaError
from pixart_sigma.files.pictures import as_picture
from pixart_sigma.memory.stages import Stages
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.planner import plan
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text.embeddings import encode as embed
from pixart_sigma.transformer.stage import TransformerStage
from pixart_sigma.vae.coding import encode
from pixart_sigma.vae.loading import load_vae
from pixart_sigma.vae.stage import decode

STEPS = 3


@pytest.fixture
def folder(small_pipeline_folder):
    return small_pipeline_folder


def pipeline(folder, **settings) -> SigmaPipeline:
    return SigmaPipeline.from_path(folder, Ways(**{"device": "cpu", "t5_precision": "fp32"} | settings))


@pytest.mark.parametrize(
    "size, guidance_scale, negative, length",
    [
        ((256, 256), 4.5, "", 300),
        ((300, 170), 4.5, "blurry, cropped", 300),
        ((256, 256), 1.0, "", 300),
        ((256, 256), 4.5, "blurry, cropped", 5),  # both prompts are longer
    ],
)
def test_pictures_equal_the_reference_pipeline(folder, size, guidance_scale, negative, length):
    from diffusers import PixArtSigmaPipeline

    width, height = size
    reference = PixArtSigmaPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "A knight in silver armor",
        negative_prompt=negative,
        width=width,
        height=height,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(7),
        clean_caption=False,
        max_sequence_length=length,
        output_type="pil",
    ).images[0]
    result = pipeline(folder).generate(
        Settings(
            "A knight in silver armor",
            negative,
            width=width,
            height=height,
            steps=STEPS,
            guidance_scale=guidance_scale,
            seed=7,
            max_sequence_length=length,
        )
    )
    assert result.images[0].size == size and bool(result.truncated) == (length == 5)
    ours, theirs = (
        torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in (result.images[0], expected)
    )
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert theirs.float().std() > 5


def test_each_stage_is_measured_and_gone_after_it(folder):
    made = pipeline(folder, measure=True)
    made.generate(Settings("a boat", width=256, height=256, steps=1))
    costs = made.stages.costs
    assert list(costs) == ["text encoder", "transformer", "VAE decode"]
    for cost in costs.values():
        assert cost.weights > 0 and cost.peak >= cost.before + cost.weights * 0.99
    # The pictures, latents and embeddings stay; no weights do.
    left = costs["VAE decode"].after - costs["text encoder"].before
    assert left < 3 * 256 * 256 * 4 + 50_000 < costs["VAE decode"].weights


@pytest.mark.parametrize("release", ["keep", "free"])
def test_release_decides_what_the_next_run_loads(folder, release, monkeypatch):
    made = pipeline(folder, release=release)
    loads = []
    original = TransformerStage.load

    def load(self, place):
        loads.append(1)
        return original(self, place)

    monkeypatch.setattr(TransformerStage, "load", load)
    first = made.generate(Settings("a boat", steps=1, width=256, height=256))
    second = made.generate(Settings("a boat", steps=1, width=256, height=256))
    assert len(loads) == {"keep": 1, "free": 2}[release]
    assert torch.equal(first.latents, second.latents)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_the_middle_leaves_no_weight(folder, error, monkeypatch):
    weights = []
    original = Stages.run

    def run(self, name, load, use, **settings):
        def watched():
            model = load()
            module = model if isinstance(model, torch.nn.Module) else model.model
            weights.extend(weakref.ref(parameter) for parameter in module.parameters())
            return model

        return original(self, name, watched, use, **settings)

    monkeypatch.setattr(Stages, "run", run)

    def stop(step):
        raise error("in the middle")

    with pytest.raises(error) as kept:
        pipeline(folder).generate(Settings("a boat", steps=2, width=256, height=256), callback=stop)
    gc.collect()
    assert kept.value is not None and len(weights) > 20
    assert not [weight for weight in weights if weight() is not None]


def test_picture_k_depends_on_the_seed_not_on_the_count(folder):
    made = pipeline(folder, release="keep")
    one = made.generate(Settings("a boat", steps=1, width=256, height=256, seed=3))
    three = made.generate(Settings("a boat", steps=1, width=256, height=256, seed=3, count=3))
    assert len(three.images) == 3
    assert torch.allclose(one.latents[0], three.latents[0], atol=1e-5)
    assert not torch.allclose(three.latents[0], three.latents[1], atol=0.1)


def test_a_callback_stops_the_run(folder):
    seen = []

    def stop_at_second(step):
        seen.append(step.index)
        return step.index < 1

    pipeline(folder).generate(Settings("a boat", steps=4, width=256, height=256), callback=stop_at_second)
    assert seen == [0, 1]


def test_img2img_with_little_strength_stays_near_the_picture(folder):
    made = pipeline(folder, release="keep")
    image = torch.rand(3, 96, 128)
    little = made.generate(Settings("a boat", strength=0.1, steps=20, width=256, height=192), image=image)
    much = made.generate(Settings("a boat", strength=1.0, steps=2, width=256, height=192), image=image)
    assert little.images[0].size == (256, 192)
    assert not torch.allclose(little.latents, much.latents, atol=0.1)


def test_a_pillow_image_is_the_tensor_of_its_pixels(folder):
    made = pipeline(folder, release="keep")
    tensor = (torch.rand(3, 96, 128) * 255).byte().float() / 255
    picture = Image.fromarray((tensor * 255).round().byte().permute(1, 2, 0).numpy())
    settings = Settings("a boat", strength=0.5, steps=2, width=256, height=192)
    mask = Image.new("L", (64, 48), 255)  # white everywhere is as none
    results = [
        made.generate(settings, image=tensor),
        made.generate(settings, image=picture),
        made.generate(settings, image=picture, mask=mask),
    ]
    assert all(torch.equal(result.latents, results[0].latents) for result in results)
    assert len({result.metadata.image_sha256 for result in results}) == 1
    assert [bool(result.metadata.mask_sha256) for result in results] == [False, False, True]


def test_a_mask_keeps_the_picture_as_the_vae_renders_it_and_paints_the_rest():
    demo = SigmaPipeline.from_path("demo", Ways(device="cpu", release="keep"))
    picture = Image.new("RGB", (128, 128), "blue")
    picture.paste("yellow", (80, 40, 112, 72))
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (0, 0, 128, 256))  # the left half
    settings = Settings("a red circle on a green background", steps=6, count=2)
    result = demo.generate(settings, image=picture, mask=mask)
    scaled = crop_back(as_picture(picture)[None], 256, 256)
    vae = demo.vae.load()
    latents = encode(vae, scaled)
    assert torch.equal(result.latents[..., 16:], latents.expand(2, -1, -1, -1)[..., 16:])
    assert (result.latents[..., :16] - latents[..., :16]).abs().mean() > 0.3
    rendered = decode(vae, latents)[0].clamp(0, 1)
    for image in map(as_picture, result.images):
        difference = (image - rendered).abs()
        # The decoder looks at the whole picture, so that what is kept changes a little in tone.
        assert difference[..., 144:].mean() < 0.05 < 0.2 < difference[..., :112].mean()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"settings": "a boat"}, "settings is a str; give Settings"),
        ({"ways": {"decode": "strips"}}, "ways is a dict; give Ways"),
        ({"embeddings": "prompt.safetensors"}, "embeddings is a str; give PromptEmbeddings"),
        ({"image": "photo.png"}, "image is a str; give a Pillow image"),
        ({"image": torch.zeros(1, 3, 64, 64)}, r"give image\[0\]"),
        ({"image": torch.zeros(64, 64, 3)}, r"image.permute\(2, 0, 1\)"),
        ({"image": torch.full((3, 64, 64), 255.0)}, "give image / 255"),
        ({"mask": torch.ones(1, 64, 64)}, "give the picture too"),
        ({"image": torch.zeros(3, 64, 64), "mask": torch.zeros(1, 64, 64)}, "black everywhere"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_loaded(folder, arguments, message, monkeypatch):
    monkeypatch.setattr(Stages, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(SigmaError, match=message):
        pipeline(folder).generate(**{"settings": Settings("")} | arguments)


@pytest.mark.parametrize(
    "tensor, message",
    [
        ([0.5], "this is a list"),
        (torch.zeros(2, 8, 8), r"these are \(2, 8, 8\)"),
        (torch.zeros(1, 5, 8, 8), r"these are \(1, 5, 8, 8\)"),
        (torch.zeros(1, 4, 8, 0), r"these are \(1, 4, 8, 0\)"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.int64), "these are torch.int64"),
        (torch.full((1, 4, 8, 8), float("nan")), "these hold NaN or infinity"),
    ],
)
def test_tensors_that_the_vae_cannot_take_are_named(folder, tensor, message):
    vae = load_vae(folder / "vae")
    with pytest.raises(SigmaError, match=f"The VAE decodes latents .*{message}"):
        decode(vae, tensor)
    if isinstance(tensor, torch.Tensor) and tensor.shape[1] == 4:
        tensor = tensor[:, :3]
    with pytest.raises(SigmaError, match=f"The VAE encodes pictures .*{message.replace('1, 4', '1, 3')}"):
        encode(vae, tensor)


def test_pictures_of_another_range_and_budgets_that_are_none_are_named(folder):
    vae = load_vae(folder / "vae")
    with pytest.raises(SigmaError, match="black at 0 and white at 1; these are from 255 to 255"):
        encode(vae, torch.full((1, 3, 64, 64), 255.0))
    with pytest.raises(SigmaError, match="budget is '2GB'"):
        decode(vae, torch.zeros(1, 4, 8, 8), budget="2GB")


def test_what_is_not_settings_nor_ways_is_named(folder):
    with pytest.raises(SigmaError, match="ways is a str; give Ways"):
        SigmaPipeline.from_path(folder, "cpu")
    for arguments, words in ((("x", Ways()), "settings is a str"), ((Settings(), "x"), "ways is a str")):
        with pytest.raises(SigmaError, match=words):
            plan(*arguments)
    with pytest.raises(SigmaError, match="settings is a str"):
        embed(None, "a boat")


def test_prompts_of_every_kind_make_a_picture(folder):
    made = pipeline(folder, release="keep")
    for prompt in ("", "雪の中の狐 🦊", "word " * 10_000):
        result = made.generate(Settings(prompt, steps=1, width=256, height=256))
        assert result.images[0].size == (256, 256)
    assert result.truncated.endswith("word word")


def test_a_transformer_alone_says_what_is_missing(folder):
    with pytest.raises(SigmaError, match="text_encoder.*--text-encoder"):
        pipeline(folder / "transformer")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"width": 0}, "width is 0"),
        ({"height": -64}, "height is -64"),
        ({"width": 9000}, "9000"),
        ({"steps": 0}, "0"),
        ({"guidance_scale": float("nan")}, "nan"),
        ({"count": 0}, "count is 0"),
        ({"scheduler": "magic"}, "magic"),
        ({"kv_compression": "mean:7:all"}, "7"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 0.5}, "no picture to start from"),
        ({"eta": 0.5}, "eta is 0.5"),
        ({"seed": 2**70}, "seed is"),
        ({"seed": "x"}, "seed is x"),
        ({"kv_compression": "conv:2:all"}, "trained weights"),
        ({"scheduler": "lcm", "steps": 999}, "999"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(folder, settings, message, monkeypatch):
    def loads(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Stages, "run", loads)
    with pytest.raises(SigmaError, match=message):
        pipeline(folder).generate(Settings("a boat", **settings))


@pytest.mark.parametrize(
    "ways, message",
    [
        ({"decode": "strip"}, "decode is 'strip'"),
        ({"decode_budget": -1}, "decode_budget is -1"),
        ({"release": "keep"}, "the pipeline has 'free' for all its runs"),
        ({"device": "cpu", "budget": 1e5}, "too small for the"),
    ],
)
def test_a_wrong_way_is_named_before_anything_is_loaded(folder, ways, message, monkeypatch):
    monkeypatch.setattr(Stages, "run", lambda *_, **__: 1 / 0)
    made = pipeline(folder)
    with pytest.raises(SigmaError, match=message):
        made.generate(Settings("a boat"), Ways(**{"device": "cpu", "t5_precision": "fp32"} | ways))


def test_a_missing_vae_is_named_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Stages, "run", lambda *_, **__: 1 / 0)
    made = SigmaPipeline.from_path(folder, Ways(device="cpu"), vae=tmp_path / "vae.safetensors")
    with pytest.raises(SigmaError, match="There is no file .*vae.safetensors"):
        made.generate(Settings("a boat"))
