"""Two precisions of T5 compared in the real host, with the built-in demo model, on the CPU."""

NODE = """
import gc, os, weakref
from pathlib import Path
import torch
import comfy.model_management as management
from pack.nodes.host import folders
from pack.nodes.host.text_encoder import SigmaTextModel
from pack.nodes.host.transformer import load_model
from pack.nodes.host.vae import load_vae
import pack.nodes.precision_comparison
from pack.nodes.precision_comparison import CompareT5Precisions
from pack.pixart_sigma import DEMO, TextEncoder
from pack.pixart_sigma.errors import SigmaError
from pack.pixart_sigma.pipeline import SigmaPipeline
from pack.pixart_sigma.studies.precision import compare_t5
from pack.pixart_sigma.text.encoder import quantize_t5

folder = Path(os.environ["ARGUMENT_0"])
PROMPTS = "a red circle on a blue background\\n\\n  a large yellow star  \\n"
LINES = ("a red circle on a blue background", "a large yellow star")

def compare(reference="fp32", precision="nf4", prompts=PROMPTS, text_encoder=folders.DEMO_CHOICE,
            device="auto", **connected):
    picture, table = CompareT5Precisions.execute(
        text_encoder, reference, precision, prompts, 3, 4, 4.5, device, **connected).args
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.dtype == torch.float32 and 0 <= picture.min() < picture.max() <= 1
    return picture[0], table

def raises(kind, message, act):
    try:
        act()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was raised instead of {message}")

def encoders():
    gc.collect()
    return [weights for weights in loaded if any(weight() is not None for weight in weights)]

loaded, load = [], TextEncoder.load
def watched(*given, **named):
    assert not encoders(), "two encoders in memory"
    encoder = load(*given, **named)
    weights = encoder.model.parameters() if isinstance(encoder.model, torch.nn.Module) else []
    loaded.append([weakref.ref(part) for part in (encoder.model, *weights)])
    return encoder
TextEncoder.load = watched

with torch.inference_mode():
    CompareT5Precisions.GET_NODE_INFO_V1()

    # the words alone: the engine's own figures, from one encoder at a time
    picture, table = compare()
    assert len(loaded) == 2 and not encoders() and management.current_loaded_models == []
    pipeline = SigmaPipeline.from_path("demo", device="cpu")
    assert table == compare_t5(pipeline, LINES, ("fp32", "nf4"), pictures=False).table(), table
    assert "PSNR" not in table and picture.shape[0] < 400
    loaded.clear()
    compare(device="stream", precision="int8")
    assert not encoders()
    print("words", flush=True)

    # with pictures: those that the engine draws, at the size of the latents
    model, vae = load_model(DEMO), load_vae(DEMO)
    latent = {"samples": torch.zeros(2, 4, 16, 24)}
    loaded.clear()
    picture, table = compare(model=model, vae=vae, latent_image=latent)
    assert not loaded, "the prompts are known"
    assert not any(isinstance(entry.real_model(), SigmaTextModel)
                   for entry in management.current_loaded_models)
    assert table.splitlines()[1].split()[-1] == "PSNR" and table.count("dB") == 5, table
    height, width = picture.shape[:2]
    assert width > 3 * 256 and height > 2 * 170
    # two pictures of 256 x 171 and their difference: blue, blue, nearly black
    row = picture[150]
    blue = (row[:, 2] > row[:, 0] + 0.4).nonzero().flatten()
    assert blue.min() < 30 and 256 + 30 < blue.max() < 20 + 2 * 256 + 20, (blue.min(), blue.max())
    assert row[20 + 2 * (256 + 12) + 5 : -25].max() < 0.3
    picture, _ = compare(model=model, vae=vae)
    assert picture.shape[0] > 2 * 256, "the model's own size"
    print("pictures", flush=True)

    # mistakes are known before anything is loaded
    loaded.clear()
    raises(SigmaError, "two different ones", lambda: compare("int8", "int8"))
    raises(SigmaError, "no prompt", lambda: compare(prompts=" \\n "))
    raises(SigmaError, "a MODEL but no VAE", lambda: compare(model=model))
    raises(SigmaError, "a VAE but no MODEL", lambda: compare(vae=vae))
    raises(SigmaError, "can not be streamed", lambda: compare(device="stream"))
    raises(ValueError, "no model '../x'", lambda: compare(text_encoder="../x"))
    TextEncoder.load = load
    quantize_t5(DEMO, folder / "t5")
    TextEncoder.load = watched
    pack.nodes.precision_comparison.find = lambda kind, choice: folder / "t5"
    raises(SigmaError, "saved in int8", lambda: compare("bf16", "int8"))
    pack.nodes.precision_comparison.find = folders.find
    assert not loaded
    print("errors", flush=True)

    # an interrupt while the second encoder loads, between the prompts, and in the sampler
    def interrupted(act):
        try:
            act()
        except management.InterruptProcessingException:
            assert not encoders()
            assert not any(isinstance(entry.real_model(), SigmaTextModel)
                           for entry in management.current_loaded_models)
        else:
            raise AssertionError("the interrupt was swallowed")

    def interrupt_at(number):
        def stopping(*given, **named):
            if len(loaded) + 1 == number:
                management.interrupt_current_processing(True)
            return watched(*given, **named)
        return stopping

    for number in (1, 2):
        loaded.clear()
        TextEncoder.load = interrupt_at(number)
        interrupted(lambda: compare(prompts=f"a small green circle {number}"))
        assert len(loaded) == number - 1
    TextEncoder.load = watched
    encode_ids = TextEncoder.encode_ids
    def stopping(self, *given):
        management.interrupt_current_processing(True)
        return encode_ids(self, *given)
    TextEncoder.encode_ids = stopping
    interrupted(lambda: compare(prompts="a pink star\\na gray star"))
    TextEncoder.encode_ids = encode_ids
    def on_sampled(*_, **__):
        management.interrupt_current_processing(True)
    stopped = model.clone()
    stopped.set_model_unet_function_wrapper(
        lambda call, given: (on_sampled(), call(given["input"], given["timestep"], **given["c"]))[1])
    interrupted(lambda: compare(model=stopped, vae=vae, latent_image=latent))
    management.interrupt_current_processing(False)
    compare(prompts="a pink star\\na gray star")
    print("interrupts", flush=True)
"""


def test_the_node_compares_and_frees_each_encoder(run_in_host, tmp_path):
    assert run_in_host(NODE, tmp_path).split()[-1] == "interrupts"
