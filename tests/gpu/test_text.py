"""T5 on the device, of the real width: precisions against bf16, and streamed against resident."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gpu_device import settled_bytes
from safetensors.torch import save_file

from pixart_sigma import DEMO
from pixart_sigma.memory.stages import Stages
from pixart_sigma.text import streaming
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.needs import T5_XXL, EncoderShapes
from pixart_sigma.text.quantize import quantize_t5
from pixart_sigma.text.weights import expected_shapes

SMALL = {"d_model": 128, "d_ff": 256, "d_kv": 16, "num_heads": 8, "vocab_size": 128}
PROMPT = "a red square to the left of a blue star " * 8
# Of random weights, which bear less than trained ones: on a CPU at the small width nf4 has 0.94, fp4 0.91.
LEAST_COSINE = {"int8": 0.995, "nf4": 0.9, "fp4": 0.85}


@pytest.fixture(scope="module")
def folder(on_gpu, tmp_path_factory) -> Path:
    """An encoder of a few blocks in bf16, with weights of the size that a trained one has."""
    from transformers import T5Config

    sizes = T5_XXL | {"num_layers": 3, "tie_word_embeddings": False} | ({} if on_gpu else SMALL)
    config, weights = T5Config(**sizes), {}
    torch.manual_seed(0)
    for key, shape in expected_shapes(config).items():
        if "layer_norm" in key:
            weights[key] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        # T5 has 1 / sqrt(d_kv) in its queries.
        spread = (shape[-1] * (config.d_kv if ".q." in key else 1)) ** -0.5
        weights[key] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=spread)
    folder = tmp_path_factory.mktemp("t5") / "text_encoder"
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def int8_folder(folder, tmp_path_factory) -> Path:
    written = tmp_path_factory.mktemp("int8") / "t5"
    quantize_t5(folder, written, "int8")
    return written


@torch.no_grad()
def embeds(folder, device, precision="bf16", **settings) -> torch.Tensor:
    return (
        TextEncoder.load(folder, precision=precision, device=device, **settings).encode(PROMPT).prompt_embeds
    )


@pytest.mark.parametrize("precision", LEAST_COSINE)
def test_a_quantised_encoder_is_near_bf16(device, folder, precision):
    found, expected = (embeds(folder, device, name)[0].double() for name in (precision, "bf16"))
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert cosine.min() > LEAST_COSINE[precision]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("waits", ["in pinned RAM", "in the mapped file"])
def test_streamed_is_resident_bit_for_bit(device, on_gpu, folder, int8_folder, monkeypatch, waits, precision):
    if waits == "in the mapped file":
        monkeypatch.setattr(streaming, "SPARE_RAM", 10**15)
    source = int8_folder if precision == "int8" else folder
    before = settled_bytes(device)
    encoder = TextEncoder.load(source, precision=precision, device=device, stream=True)
    assert encoder.model.is_mapped == (not on_gpu or waits == "in the mapped file")
    found = [encoder.encode(prompt).prompt_embeds for prompt in (PROMPT, "a star", PROMPT)]
    assert torch.equal(found[0], found[2])
    if on_gpu:  # between two calls nothing is there but what they gave
        assert settled_bytes(device) - before <= sum(one.nbytes + 512 for one in found)
    assert torch.equal(found[0], embeds(source, device, precision))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_between_two_blocks_leaves_nothing(device, folder, error):
    encoder = TextEncoder.load(folder, precision="bf16", device=device, stream=True)
    before = settled_bytes(device)

    def stop(done, total):
        if done == 2:
            raise error

    with pytest.raises(error):
        encoder.encode_ids([5, 6, 1], progress=stop)
    assert settled_bytes(device) == before


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16"])
def test_after_offload_it_encodes_as_before(device, on_gpu, folder, precision):
    if not on_gpu and precision == "nf4":
        pytest.skip("bitsandbytes packs 4-bit weights anew where a CPU runs them")
    stages = Stages(device, "offload")
    before, found = settled_bytes(device), []
    for _ in range(2):
        found.append(
            stages.run(
                "T5",
                lambda: TextEncoder.load(folder, precision=precision, device=device),
                lambda encoder: encoder.encode(PROMPT).prompt_embeds.cpu(),
            )
        )
        if on_gpu:
            assert settled_bytes(device) == before
    assert torch.equal(*found)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_weights_take_the_bytes_that_were_predicted(device, on_gpu, folder, precision):
    """At rest, and at the peak of loading and of a prompt."""
    before = settled_bytes(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    encoder = TextEncoder.load(folder, precision=precision, device=device)
    needs = EncoderShapes.read(folder).needs(precision, "auto")
    assert abs(encoder.nbytes / needs.weights - 1) < 0.02
    if on_gpu:
        # Of three blocks a weight that is being quantised is much: 0.2 GB.
        assert abs((settled_bytes(device) - before) / needs.weights - 1) < 0.03
        assert torch.cuda.max_memory_allocated(device) - before < 1.1 * needs.weights + 0.3e9
