"""Two precisions of T5 compared in the real host, with the built-in demo model, on the CPU."""

import gc
import shutil
import weakref

import comfy.model_management as management
import pack.nodes.precision_comparison
import pytest
import torch
from pack.nodes.host import embeddings, folders
from pack.nodes.host.text_encoder import SigmaTextModel
from pack.nodes.host.transformer import load_model
from pack.nodes.host.vae import load_vae
from pack.nodes.precision_comparison import CompareT5Precisions
from pack.pixart_sigma import DEMO, TextEncoder
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.pipeline import SigmaPipeline
from pack.pixart_sigma.settings import Ways
from pack.pixart_sigma.studies.precision import compare_t5
from pack.pixart_sigma.text.quantize import quantize_t5

PROMPTS = "a red circle on a blue background\n\n  a large yellow star  \n"
LINES = ("a red circle on a blue background", "a large yellow star")
LATENT = {"samples": torch.zeros(2, 4, 16, 24)}


class Loads:
    """TextEncoder.load, which fails while another encoder is in memory, and the weights of all it loaded."""

    def __init__(self, load):
        self._load, self.weights, self.interrupt_at = load, [], None

    def __len__(self):
        return len(self.weights)

    def __call__(self, *given, **named):
        assert not self.in_memory(), "two encoders in memory"
        if len(self) + 1 == self.interrupt_at:
            management.interrupt_current_processing(True)
        encoder = self._load(*given, **named)
        weights = encoder.model.parameters() if isinstance(encoder.model, torch.nn.Module) else []
        self.weights.append([weakref.ref(part) for part in (encoder.model, *weights)])
        return encoder

    def in_memory(self) -> list:
        gc.collect()
        return [weights for weights in self.weights if any(weight() is not None for weight in weights)]


@pytest.fixture
def loads(monkeypatch):
    shutil.rmtree(embeddings._cache_folder(), ignore_errors=True)  # prompts that are known load nothing
    loads = Loads(TextEncoder.load)
    monkeypatch.setattr(TextEncoder, "load", loads)
    return loads


@pytest.fixture
def model():
    return load_model(DEMO)


@pytest.fixture
def vae():
    return load_vae(DEMO)


def compare(
    reference="fp32",
    precision="nf4",
    prompts=PROMPTS,
    text_encoder=folders.DEMO_CHOICE,
    device="auto",
    **connected,
):
    """The node's picture and table, of 4 steps."""
    picture, table = CompareT5Precisions.execute(
        text_encoder, reference, precision, prompts, device, seed=3, steps=4, cfg=4.5, **connected
    ).args
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.dtype == torch.float32 and 0 <= picture.min() < picture.max() <= 1
    return picture[0], table


def no_encoder_is_held() -> bool:
    return not any(
        isinstance(entry.real_model(), SigmaTextModel) for entry in management.current_loaded_models
    )


def test_the_node_has_a_description_that_the_host_can_read():
    assert CompareT5Precisions.GET_NODE_INFO_V1()


def test_the_words_alone_have_the_engines_own_figures(loads):
    picture, table = compare()
    assert len(loads) == 2 and not loads.in_memory() and management.current_loaded_models == []
    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu"))
    assert table == compare_t5(pipeline, LINES, ("fp32", "nf4"), pictures=False).table()
    assert "PSNR" not in table and picture.shape[0] < 400


def test_a_streamed_encoder_is_freed_too(loads):
    compare(device="stream", precision="int8")
    assert loads and not loads.in_memory()


def test_the_pictures_are_those_that_the_engine_draws(loads, model, vae):
    """At the size of the latents, or at the model's own."""
    compare()
    loads.weights.clear()
    picture, table = compare(model=model, vae=vae, latent_image=LATENT)
    assert not loads, "the prompts are known"
    assert no_encoder_is_held()
    assert table.splitlines()[1].split()[-1] == "PSNR" and table.count("dB") == 5
    height, width = picture.shape[:2]
    assert width > 3 * 256 and height > 2 * 170
    # two pictures of 256 x 171 and their difference: blue, blue, nearly black
    row = picture[150]
    blue = (row[:, 2] > row[:, 0] + 0.4).nonzero().flatten()
    assert blue.min() < 30 and 256 + 30 < blue.max() < 20 + 2 * 256 + 20
    assert row[20 + 2 * (256 + 12) + 5 : -25].max() < 0.3
    picture, _ = compare(model=model, vae=vae)
    assert picture.shape[0] > 2 * 256, "the model's own size"


def test_mistakes_are_known_before_anything_is_loaded(loads, model, vae):
    for error, message, mistake in (
        (SigmaError, "two different ones", {"reference": "int8", "precision": "int8"}),
        (SigmaError, "no prompt", {"prompts": " \n "}),
        (SigmaError, "a MODEL but no VAE", {"model": model}),
        (SigmaError, "a VAE but no MODEL", {"vae": vae}),
        (SigmaError, "can not be streamed", {"device": "stream"}),
        (ValueError, "no model '../x'", {"text_encoder": "../x"}),
    ):
        with pytest.raises(error, match=message):
            compare(**mistake)
    assert not loads


def test_a_folder_that_was_saved_in_8_bit_is_refused(tmp_path, monkeypatch):
    quantize_t5(DEMO, tmp_path / "t5")
    loads = Loads(TextEncoder.load)
    monkeypatch.setattr(TextEncoder, "load", loads)
    monkeypatch.setattr(pack.nodes.precision_comparison, "find", lambda kind, choice: tmp_path / "t5")
    with pytest.raises(SigmaError, match="saved in int8"):
        compare("bf16", "int8")
    assert not loads


def interrupted(loads, **given):
    with pytest.raises(management.InterruptProcessingException):
        compare(**given)
    assert not loads.in_memory() and no_encoder_is_held()


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupt_while_an_encoder_loads_leaves_none(loads, number):
    loads.interrupt_at = number
    interrupted(loads, prompts=f"a small green circle {number}")
    assert len(loads) == number - 1


def test_an_interrupt_between_the_prompts_leaves_no_encoder(loads, monkeypatch):
    encode_ids = TextEncoder.encode_ids

    def interrupt_and_encode(self, *given):
        management.interrupt_current_processing(True)
        return encode_ids(self, *given)

    prompts = "a pink star\na gray star"
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode_ids", interrupt_and_encode)
        interrupted(loads, prompts=prompts)
    compare(prompts=prompts)


def test_an_interrupt_in_the_sampler_leaves_no_encoder(loads, model, vae):
    def interrupt_and_call(call, given):
        management.interrupt_current_processing(True)
        return call(given["input"], given["timestep"], **given["c"])

    stopped = model.clone()
    stopped.set_model_unet_function_wrapper(interrupt_and_call)
    interrupted(loads, model=stopped, vae=vae, latent_image=LATENT)
    management.interrupt_current_processing(False)
    compare(prompts="a pink star")
