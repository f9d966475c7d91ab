import gc
import json
import math
import weakref

import pytest
import torch
from PIL import Image

from pixart_sigma import DEMO
from pixart_sigma.cli import commands as cli
from pixart_sigma.errors import SigmaError
from pixart_sigma.memory.stages import Stages
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.studies.precision import compare_t5
from pixart_sigma.studies.precision_figures import END, PromptComparison, compare_prompt, peak_signal_to_noise
from pixart_sigma.studies.precision_picture import AMPLIFIED, amplified_difference, draw
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.quantize import quantize_t5

PROMPTS = ("A small red house", "the old sailor looks at the grey sea")
QUICK = {"width": 64, "height": 96, "steps": 1}


@pytest.fixture
def pipeline(small_pipeline_folder) -> SigmaPipeline:
    return SigmaPipeline.from_path(small_pipeline_folder, Ways(device="cpu"))


@pytest.fixture(scope="module")
def compared(small_pipeline_folder):
    """Both precisions and pictures of the tiny pipeline, by a run of its own."""
    pipeline = SigmaPipeline.from_path(small_pipeline_folder, Ways(device="cpu"))
    return compare_t5(pipeline, PROMPTS, ("fp32", "nf4"), Settings(seed=3, **QUICK))


def embeds(*rows) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float32)


def test_the_figures_are_those_of_the_formulas():
    reference = embeds((3, 4), (1, 0), (0, 2))
    other = embeds((4, 3), (2, 0), (0, 2))
    result = compare_prompt("ab c", ["▁a", "b", END], reference, other)
    assert result.cosines == pytest.approx((24 / 25, 1, 1))
    assert result.cosine == pytest.approx((24 / 25 + 2) / 3)
    assert result.least == ("ab", pytest.approx(24 / 25))
    # |reference|² = 25 + 1 + 4, |difference|² = 2 + 1
    assert result.snr == pytest.approx(10 * math.log10(30 / 3))
    assert result.psnr is None and "psnr_db" not in result.as_dict()


def test_tokens_are_joined_to_words():
    result = PromptComparison("x", ("▁", "7", ":", "▁sea", "s", END), (0.9, 0.8, 1.0, 1.0, 0.7, 0.95), 1.0)
    assert result.words() == [("7:", 0.8), ("seas", 0.7), ("(end)", 0.95)]
    assert result.least == ("seas", 0.7)


def test_equal_embeddings_have_cosine_1_and_no_noise():
    same = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    red = Image.new("RGB", (4, 4), "red")
    result = compare_prompt("a", ["▁a"] * 4 + [END], same, same.clone(), (red, red.copy()))
    assert result.cosines == pytest.approx([1.0] * 5, abs=1e-12)
    assert result.snr == result.psnr == math.inf
    read = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert read["snr_db"] is None and read["psnr_db"] is None


def test_the_pictures_ratio_and_their_difference():
    black, grey = Image.new("RGB", (8, 4)), Image.new("RGB", (8, 4))
    grey.paste((20, 20, 20), (0, 0, 4, 4))
    grey.paste((100, 0, 0), (0, 0, 1, 1))
    mean_square = (15 * 3 * 20**2 + 100**2) / (8 * 4 * 3)
    assert peak_signal_to_noise(black, grey) == pytest.approx(10 * math.log10(255**2 / mean_square))
    difference = amplified_difference(grey, black)
    assert difference.getpixel((2, 2)) == (20 * AMPLIFIED,) * 3
    assert difference.getpixel((0, 0)) == (255, 0, 0) and difference.getpixel((6, 2)) == (0, 0, 0)


def test_a_comparison_is_of_what_each_precision_encodes_and_draws(small_pipeline_folder, compared):
    encoded, drawn = {}, {}
    for precision in ("fp32", "nf4"):
        encoder = TextEncoder.load(small_pipeline_folder, precision=precision)
        encoded[precision] = [encoder.encode(prompt).prompt_embeds.float() for prompt in PROMPTS]
        alone = SigmaPipeline.from_path(small_pipeline_folder, Ways(device="cpu", t5_precision=precision))
        drawn[precision] = alone.generate(Settings(PROMPTS[1], seed=3, **QUICK)).images[0]
    for prompt, one, other in zip(compared.prompts, encoded["fp32"], encoded["nf4"], strict=True):
        assert len(prompt.tokens) == one.shape[1] and prompt.tokens[-1] == END
        assert "".join(prompt.tokens[:-1]).replace("▁", " ").strip() == prompt.prompt.lower()
        noise = float((one - other).square().sum())
        assert prompt.snr == pytest.approx(10 * math.log10(float(one.square().sum()) / noise), abs=1e-3)
        cosines = torch.nn.functional.cosine_similarity(one[0], other[0], dim=-1)
        assert prompt.cosines == pytest.approx(cosines.tolist(), abs=1e-5)
        assert 5 < prompt.snr < 40
    for picture, precision in zip(compared.pictures[1], ("fp32", "nf4"), strict=True):
        assert picture.size == (64, 96) and picture.tobytes() == drawn[precision].tobytes()
    assert compared.prompts[1].psnr == peak_signal_to_noise(*drawn.values())
    assert compared.settings == {"width": 64, "height": 96, "steps": 1, "guidance_scale": 4.5, "seed": 3}
    large, small = compared.nbytes
    assert 0 < small < large / 2


def test_it_is_told_as_text_as_json_and_as_a_picture(compared):
    table = compared.table()
    assert "nf4" in table and "fp32" in table and "PSNR" in table
    assert all(line.startswith(prompt) for line, prompt in zip(table.splitlines()[2:], PROMPTS, strict=True))
    told = json.loads(json.dumps(compared.as_dict(), allow_nan=False))
    assert told["precisions"] == ["fp32", "nf4"] and told["prompts"][0]["psnr_db"] > 0
    word, cosine = compared.prompts[0].least
    assert told["prompts"][0]["least_word"] == word and word in table
    assert min(pair[1] for pair in told["prompts"][0]["tokens"]) == cosine

    with_pictures = draw(compared)
    assert with_pictures.width > 3 * 64 and with_pictures.height > 2 * 256
    colors = {color for _, color in with_pictures.getcolors(1 << 20)}
    shown = {color for pair in compared.pictures for one in pair for _, color in one.getcolors(1 << 20)}
    assert len(colors & shown) > len(shown) / 2


def test_a_long_prompt_and_no_pictures_are_drawn_too(pipeline):
    long = "a bowl of fresh fruit " * 100
    result = compare_t5(pipeline, (long,), ("fp32", "bf16"), pictures=False)
    assert len(result.prompts[0].tokens) == 300 and result.prompts[0].truncated.endswith("fruit")
    assert result.pictures == () and result.settings == {} and "PSNR" not in result.table()
    assert draw(result).height < 400
    assert all(len(line) < 160 for line in result.table().splitlines())


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to the weights of each model that is loaded: [(stage, references, alive before)]."""
    models = []
    run = Stages.run

    def watched_run(self, name, load, use, **settings):
        def watched_load():
            gc.collect()
            alive = [stage for stage, weights, _ in models if any(weight() is not None for weight in weights)]
            model = load()
            module = model if isinstance(model, torch.nn.Module) else model.model
            models.append((name, [weakref.ref(weight) for weight in module.parameters()], alive))
            return model

        return run(self, name, watched_load, use, **settings)

    monkeypatch.setattr(Stages, "run", watched_run)
    return models


@pytest.mark.parametrize("release", ["keep", "free"])
def test_one_model_is_in_memory_at_a_time(small_pipeline_folder, loaded, release):
    pipeline = SigmaPipeline.from_path(small_pipeline_folder, Ways(device="cpu", release=release))
    compare_t5(pipeline, PROMPTS[:1], ("fp32", "int8"), Settings(**QUICK))
    names = [name for name, _, _ in loaded]
    assert names == ["text encoder"] * 2 + ["transformer", "VAE decode"] * 2
    assert all(alive == [] for _, _, alive in loaded)
    gc.collect()
    assert not any(weight() is not None for _, weights, _ in loaded for weight in weights)


@pytest.mark.parametrize("stage", ["T5 in int8", "picture"])
def test_an_interrupt_leaves_no_weight(pipeline, loaded, stage):
    def stop(step):
        raise KeyboardInterrupt

    def on_stage(name):
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        settings = Settings(**QUICK)
        compare_t5(pipeline, PROMPTS, ("fp32", "int8"), settings, on_stage=on_stage, callback=stop)
    gc.collect()
    assert kept.value is not None and len(loaded) == {"T5 in int8": 1, "picture": 3}[stage]
    assert not any(weight() is not None for _, weights, _ in loaded for weight in weights)


@pytest.mark.parametrize(
    "prompts, precisions, settings, message",
    [
        ((), ("fp32", "int8"), {}, "no prompt"),
        (PROMPTS, ("int8", "int8"), {}, "'int8' and 'int8'; give two different"),
        (PROMPTS, ("fp32",), {}, "two different"),
        (PROMPTS, ("fp32", "int3"), {}, "'int3'"),
        (PROMPTS, ("fp32", "int8"), {"steps": 0}, "0"),
        (PROMPTS, ("fp32", "int8"), {"width": 9000}, "9000"),
        (PROMPTS, ("fp32", "int8"), {"height": 0}, "height is 0"),
    ],
)
def test_a_mistake_is_known_before_anything_is_loaded(
    pipeline, loaded, prompts, precisions, settings, message
):
    with pytest.raises(SigmaError, match=message):
        compare_t5(pipeline, prompts, precisions, Settings(**settings))
    assert loaded == []


def test_an_encoder_that_cannot_be_compared_is_named(small_pipeline_folder, loaded, tmp_path):
    quantize_t5(small_pipeline_folder, tmp_path / "t5")
    ways = Ways(device="cpu")
    quantized = SigmaPipeline.from_path(small_pipeline_folder, ways, text_encoder=tmp_path / "t5")
    with pytest.raises(SigmaError, match="saved in int8, so it can not be loaded in bf16"):
        compare_t5(quantized, PROMPTS, ("bf16", "int8"))
    other = SigmaPipeline.from_path(small_pipeline_folder, Ways(device="cpu"), text_encoder=DEMO)
    with pytest.raises(SigmaError, match="128 wide, and the transformer reads 64"):
        compare_t5(other, PROMPTS, ("bf16", "int8"))
    streamed = SigmaPipeline.from_path(small_pipeline_folder, Ways(device="cpu", t5_device="stream"))
    with pytest.raises(SigmaError, match="can not be streamed"):
        compare_t5(streamed, PROMPTS, ("bf16", "nf4"))
    assert loaded == []
    assert compare_t5(other, PROMPTS, ("bf16", "int8"), pictures=False).worst.snr > 20


@pytest.fixture
def compare(small_pipeline_folder, tmp_path, capsys):
    """Runs `pixart-sigma compare-t5` on the tiny pipeline -> (status, stdout, stderr)."""

    def run(*options, model=small_pipeline_folder):
        status = cli.main(
            ["compare-t5", "--model", str(model), "--device", "cpu", "--steps", "1", "--size", "64x64"]
            + ["--out", str(tmp_path / "comparison.png"), *map(str, options)]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_in_the_terminal(compare, tmp_path):
    status, out, err = compare("a boat", "a stone bridge", "--precisions", "fp32,nf4")
    assert status == 0, err
    assert "a stone bridge" in out and "PSNR" in out and out.strip().endswith("comparison.png")
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 700
    status, out, _ = compare("--json", "--no-pictures", "boat " * 400)
    told = json.loads(out)
    assert status == 0 and told["precisions"] == ["bf16", "int8"] and len(told["prompts"]) == 1
    assert len(told["prompts"][0]["tokens"]) == 300


def test_the_demo_is_compared_by_prompts_that_it_knows(compare, monkeypatch):
    _, out, _ = compare("--no-pictures", model="demo")
    assert "a red square on a blue background" in out
    _, out, _ = compare("--no-pictures")
    assert "fisherman" in out


def test_words_that_were_cut_are_reported(compare):
    status, _, err = compare("--no-pictures", "boat " * 400)
    assert status == 0 and "cut" in err and err.strip().endswith("boat boat")


def test_prompts_seen_before_need_no_t5(compare, cache_home, monkeypatch):
    first = compare("a boat")
    monkeypatch.setattr("pixart_sigma.text.encoder.TextEncoder.load", lambda *_, **__: 1 / 0)
    assert compare("a boat")[:2] == first[:2]
    with pytest.raises(ZeroDivisionError):
        compare("a boat", "--no-embedding-cache")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--precisions", "int8"), ["--precisions", "two different"]),
        (("--precisions", "int8,int8"), ["--precisions", "two different"]),
        (("--precisions", "bf16,int9"), ["int9", "nf4"]),
        (("--precisions", "bf16,nf4", "--t5-device", "stream"), ["nf4", "streamed"]),
        (("--steps", "0"), ["--steps is 0"]),
        (("--guidance", "nan"), ["--guidance is nan"]),
        (("--seed", "-1"), ["--seed is -1"]),
        (("--size", "big"), ["'big'"]),
        (("--model", "/nowhere"), ["/nowhere"]),
        (("--out", "/nowhere/comparison.png"), ["/nowhere"]),
        (("--t5-precision", "int8"), ["--t5-precision"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(compare, tmp_path, options, words):
    status, _, err = compare(*options)
    assert status == 2 and "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("pixart-sigma: ") and all(word in line for word in words), line
    assert not list(tmp_path.glob("*.png"))


def test_an_interrupt_writes_nothing(compare, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pixart_sigma.runs.denoise", interrupt)
    assert compare("a boat")[0] == 130
    assert not list(tmp_path.iterdir())
