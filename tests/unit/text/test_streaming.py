"""The streamed T5: equal to the resident one, in the memory of a block, whatever goes wrong."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_sigma.cli.commands import main
from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.memory.block_buffers import PinnedMemory
from pixart_sigma.memory.measure import live_bytes, peak_bytes
from pixart_sigma.memory.stages import Stages
from pixart_sigma.pipeline import SigmaPipeline
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text import streaming
from pixart_sigma.text.blocks import StoredBlocks
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.loading import describe_encoder
from pixart_sigma.text.quantize import quantize_t5
from pixart_sigma.text.streaming import StreamedT5
from pixart_sigma.text.weights import expected_shapes

BLOCKS = 4
LENGTHS = {1: [1], 20: [*range(3, 22), 1], 300: [*[7, 11, 13] * 99, 5, 6, 1]}
Q = "encoder.block.2.layer.0.SelfAttention.q"


def config_of(**changes):
    from transformers import T5Config

    shape = dict(d_model=64, d_kv=16, num_heads=4, d_ff=256, num_layers=BLOCKS, vocab_size=512)
    return T5Config(**(shape | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False) | changes))


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory) -> Path:
    """An fp32 encoder folder of four blocks, with numbers large enough to tell errors apart."""
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(config_of())
    for name, weight in model.named_parameters():
        if "layer_norm" not in name:
            scale = 16 if name.endswith(".q.weight") else 1  # T5 keeps 1/sqrt(d_kv) in q
            torch.nn.init.normal_(weight, std=(weight.shape[1] * scale) ** -0.5)
    folder = tmp_path_factory.mktemp("streamed") / "text_encoder"
    model.save_pretrained(folder)
    (folder / "spiece.model").write_bytes((tokenizer_folder / "spiece.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def sources(folder, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Files to stream from, with the precision to stream in."""
    root = tmp_path_factory.mktemp("sources")
    quantize_t5(folder, root / "int8")
    weights = load_file(folder / "model.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.float8_e4m3fn)):
        save_file({key: weight.to(dtype) for key, weight in weights.items()}, root / f"{name}.safetensors")
    (root / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    return {
        "int8 from int8": (root / "int8", "int8"),
        "int8 from fp16": (root / "fp16.safetensors", "int8"),
        "bf16 from bf16": (root / "bf16.safetensors", "bf16"),
        "bf16 from fp8": (root / "fp8.safetensors", "bf16"),
        "fp16 from fp32": (folder, "fp16"),
        "fp32 from fp32": (folder, "fp32"),
    }


@pytest.fixture(params=["one at a time", "through two buffers"])
def way(request, monkeypatch):
    """How blocks reach the device: as on the CPU, or as on a GPU but without CUDA's streams."""
    if request.param == "through two buffers":
        monkeypatch.setattr(StreamedT5, "_from_ram", StreamedT5._through_buffers)
    return request.param


SOURCES = ["int8 from int8", "int8 from fp16", "bf16 from bf16", "bf16 from fp8", "fp16 from fp32"]


@pytest.mark.parametrize("source", [*SOURCES, "fp32 from fp32"])
def test_it_equals_the_resident_encoder_bit_for_bit(sources, source, way):
    path, precision = sources[source]
    resident = TextEncoder.load(path, precision=precision)
    streamed = TextEncoder.load(path, precision=precision, stream=True)
    assert streamed.is_streamed and not resident.is_streamed and streamed.precision == precision
    if way == "through two buffers":
        _copy_to_aligned_memory(resident.model)
    for ids in LENGTHS.values():
        expected = resident.encode_ids(ids)
        result = streamed.encode_ids(ids)
        assert result.dtype == expected.dtype and torch.equal(result, expected)
    assert torch.equal(streamed.encode_ids(LENGTHS[20], -3), resident.encode_ids(LENGTHS[20], -3))
    prompt = "A small red fox 🦊 in the snow"
    assert torch.equal(streamed.encode(prompt).prompt_embeds, resident.encode(prompt).prompt_embeds)
    with pytest.raises(SigmaError, match="no layer -5"):
        streamed.encode_ids([1], -5)


def _copy_to_aligned_memory(model: torch.nn.Module) -> None:
    """As the buffers are: some CPUs round a product with one token otherwise where a file's weights lie."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.clone()


def test_progress_goes_block_by_block(folder, way):
    told = []
    encoder = TextEncoder.load(folder, precision="fp32", stream=True)
    encoder.encode_ids([1], progress=lambda *call: told.append(call))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    encoder.encode_ids([1], -3, progress=lambda *call: told.append(call))
    assert told[5:] == [(0, 2), (1, 2), (2, 2)]


# ---- several prompts that share the blocks


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Bytes of each block that is read."""
    nbytes, read = [], StoredBlocks.read

    def counted(self, index):
        nbytes.append(self.nbytes)
        return read(self, index)

    monkeypatch.setattr(StoredBlocks, "read", counted)
    return nbytes


MANY = [[*range(3, 62), 1], LENGTHS[1], LENGTHS[20], [5, 1], LENGTHS[20][::-1]]


@pytest.mark.parametrize("source", ["int8 from int8", "bf16 from fp8"])
def test_each_of_several_prompts_is_what_it_is_alone_and_blocks_are_read_once(sources, source, way, read):
    path, precision = sources[source]
    encoder = TextEncoder.load(path, precision=precision, stream=True)
    prompts = [*MANY, [7, torch.ones(64), 1]]
    expected = [encoder.encode_ids(ids, -2) for ids in prompts]
    alone, told = sum(read), []
    read.clear()
    found = dict(encoder.encode_each(prompts, -2, lambda *call: told.append(call)))
    assert sorted(found) == list(range(len(prompts)))
    assert all(torch.equal(found[index], one) for index, one in enumerate(expected))
    assert alone == len(prompts) * sum(read) == len(prompts) * (BLOCKS - 1) * read[0]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_more_than_may_wait_pass_in_groups(folder, read, monkeypatch):
    """In memory that does not grow with them; an interrupt comes through in the middle."""
    encoder = TextEncoder.load(folder, precision="fp32", stream=True)
    device, told = torch.device("cpu"), []

    def peak(prompts, progress=None):
        return peak_bytes(device, lambda: [None for _ in encoder.encode_each(prompts, progress=progress)])

    one = peak([LENGTHS[300]])
    monkeypatch.setattr(streaming, "MOST_WAITING", 2 * 300 * 64 * 4)
    read.clear()
    grown = peak([LENGTHS[300]] * 6, lambda *call: told.append(call)) - one
    assert 0 < grown <= streaming.MOST_WAITING + 300 * 8  # and a prompt's token ids
    assert len(read) == 3 * BLOCKS and told == [
        (number * BLOCKS + done, 3 * BLOCKS) for number in range(3) for done in range(BLOCKS + 1)
    ]

    def stop(done, total):
        if done == BLOCKS + 2:
            raise KeyboardInterrupt

    gc.collect()
    before = live_bytes(device)
    with pytest.raises(KeyboardInterrupt):
        list(encoder.encode_each([LENGTHS[300]] * 3, progress=stop))
    gc.collect()
    assert live_bytes(device) == before


def test_as_many_wait_as_fit_at_real_width(tmp_path):
    config = config_of(d_model=4096)
    weights = {
        key: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for key, shape in expected_shapes(config).items()
    }
    model = StreamedT5(config, weights, "bf16", torch.bfloat16, None)
    assert model.most_together([300] * 50) == 13 and model.most_together([20] * 50) == 50
    assert model.most_together([5000, 5000]) == 1


# ---- memory


@pytest.mark.parametrize(
    ("source", "blocks_alive"), [("int8 from int8", 0), ("bf16 from bf16", 0), ("bf16 from fp8", 1)]
)
def test_live_bytes_stay_within_a_block(sources, source, blocks_alive):
    """One block is converted at a time; one that the file holds as it is needed takes no memory at all."""
    path, precision = sources[source]
    stages = Stages("cpu", "keep", measure=True)
    load = lambda: TextEncoder.load(path, precision=precision, stream=True)  # noqa: E731
    stages.run("T5", load, lambda encoder: encoder.encode_ids([1]))
    weights = stages.costs["T5"].weights
    stages.run("T5", load, lambda encoder: encoder.encode_ids([1]).float().sum().item())
    cost = stages.costs["T5"]
    grown = cost.peak - cost.before
    converted = 64 * 256 * (4 + 2)  # the largest weight, from fp8 by way of fp32
    activations = 8_000  # of one token
    assert blocks_alive * weights * 0.9 < grown < blocks_alive * (weights + converted) + activations
    assert activations < weights / 4
    assert cost.after == cost.before


def test_two_buffers_are_the_window(sources, monkeypatch):
    path, precision = sources["int8 from int8"]
    encoder = TextEncoder.load(path, stream=True)
    assert describe_encoder(path, stream=True)[1] == encoder.nbytes == encoder.model.nbytes
    window = encoder.model.window_nbytes(torch.device("cuda"))
    block = 4 * 64 * 64 + 2 * 64 * 256 + 2 * 64 * 256 + 4 * (4 * 64 + 2 * 256) + 2 * 2 * 64  # wo in bf16
    assert 2 * block <= window - 2 * (64 + 4 * 32) <= 2 * block + 2 * 15 * 256  # each tensor is aligned
    monkeypatch.setattr(StreamedT5, "_from_ram", StreamedT5._through_buffers)
    encoder.encode_ids([1])  # allocates what waits in RAM
    before = live_bytes(torch.device("cpu"))
    grown = []
    encoder.encode_ids([1], progress=lambda *_: grown.append(live_bytes(torch.device("cpu")) - before))
    assert 0.99 * window < max(grown[:-1]) < window + 8_000
    assert grown[-1] < 1_000 and live_bytes(torch.device("cpu")) == before


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.6e9), ("bf16", 0.9e9)])
def test_the_window_at_real_size(tmp_path, precision, bound):
    config = config_of(d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24, vocab_size=32128)
    weights = {
        key: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for key, shape in expected_shapes(config).items()
    }
    (tmp_path / "t5.safetensors").touch()
    model = StreamedT5(config, weights, precision, torch.bfloat16, tmp_path / "t5.safetensors")
    assert bound * 0.75 < model.window_nbytes(torch.device("cuda")) < bound


RSS_ANON = """
import ctypes, gc, os, sys, threading, time
from pathlib import Path
import torch
from pixart_sigma import TextEncoder
import bitsandbytes

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def peak_while_encoding(folder):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not this call's
    before = anonymous()
    encoder = TextEncoder.load(folder, precision=folder.parent.name, stream=True)
    peak, done = [0], threading.Event()
    def look():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    looking = threading.Thread(target=look)
    looking.start()
    assert torch.isfinite(encoder.encode_ids([5] * 20)).all()
    done.set()
    looking.join()
    return max(peak[0], anonymous()) - before

torch.set_num_threads(1)
for precision in ("int8", "bf16"):
    for blocks in (1, 2, 5):  # the first warms up what is allocated once
        folder = Path(sys.argv[1]) / precision / str(blocks)
        print(precision, blocks, peak_while_encoding(folder), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="RssAnon is Linux's")
def test_anonymous_memory_does_not_grow_with_the_blocks(tmp_path, tokenizer_folder):
    """Blocks mapped from the file: three more in bf16 take 6 MB of their 290, which is less than any weight;
    in int8 less than one of them, as looking now and then catches or misses buffers of 33 MB."""
    root = Path(__file__).parents[3]
    try:
        for precision in ("int8", "bf16"):
            write_large_blocks(tmp_path / precision, tokenizer_folder, precision, (1, 2, 5))
        command = [sys.executable, "-c", RSS_ANON, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root, check=False)
    finally:
        for shard in tmp_path.rglob("*.safetensors"):  # pytest would keep them for three runs
            shard.unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    told = map(str.split, done.stdout.splitlines())
    peak = {(precision, int(blocks)): int(size) for precision, blocks, size in told}
    for precision, bound in (("int8", 59e6), ("bf16", 6e6)):
        assert peak[precision, 5] - peak[precision, 2] <= bound, peak


def write_large_blocks(root: Path, tokenizer_folder: Path, precision: str, counts: tuple[int, ...]):
    """A folder per count, whose blocks are shards that all folders share."""
    root.mkdir()
    config = config_of(d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=1)
    if precision == "int8":
        config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    block, others = {}, {}
    for key, (rows, *columns) in expected_shapes(config).items():
        into = block if ".block.0." in key and "relative" not in key else others
        if into is others or not columns:
            into[key] = torch.randn(rows, *columns, dtype=torch.bfloat16).abs() / 8
        elif precision == "int8" and ".wo." not in key:
            into[key] = torch.randint(-127, 128, (rows, *columns), dtype=torch.int8)
            into[key.replace("weight", "SCB")] = torch.full((rows,), 0.05)
        else:
            into[key] = torch.empty(rows, *columns, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
    shards = {"others.safetensors": others}
    for index in range(max(counts)):
        renamed = {key.replace(".block.0.", f".block.{index}."): weight for key, weight in block.items()}
        shards[f"block{index}.safetensors"] = renamed
    for name, weights in shards.items():
        save_file(weights, root / name)
    for count in counts:
        folder = root / str(count)
        folder.mkdir()
        config.num_layers = count
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        names = ["others.safetensors", *(f"block{index}.safetensors" for index in range(count))]
        weight_map = {key: name for name in names for key in shards[name]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for name in names:
            os.link(root / name, folder / name)
        (folder / "spiece.model").write_bytes((tokenizer_folder / "spiece.model").read_bytes())


# ---- pinned RAM, with a driver that only takes notes


@pytest.fixture
def pinned(monkeypatch) -> set[int]:
    """Addresses that are pinned; the RAM is large."""
    addresses = set()

    def register(address, nbytes, flags):
        addresses.add(address)
        return 0

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=addresses.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    return addresses


@pytest.mark.parametrize("source", ["int8 from int8", "int8 from fp16", "bf16 from bf16", "fp16 from fp32"])
def test_blocks_in_pinned_ram_are_the_files(sources, source, pinned, way):
    path, precision = sources[source]
    expected = TextEncoder.load(path, precision=precision).encode_ids(LENGTHS[20])
    encoder = TextEncoder.load(path, precision=precision, stream=True)
    told = []
    encoder.model.to("cuda", lambda *call: told.append(call))
    assert len(pinned) == BLOCKS and not encoder.model.is_mapped
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert encoder.device == torch.device("cuda")
    encoder.model.to("cpu")
    assert len(pinned) == BLOCKS, "offloading keeps the RAM"
    assert torch.equal(encoder.encode_ids(LENGTHS[20]), expected)
    del encoder
    gc.collect()
    assert not pinned


def test_short_ram_is_mapped_mode(folder, pinned, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    model = TextEncoder.load(folder, precision="bf16", stream=True).model
    assert model.to("cuda").is_mapped and not pinned


def test_ram_that_can_not_be_pinned_is_mapped_mode(folder, pinned, monkeypatch, caplog):
    allocate = PinnedMemory.allocate

    def refuse_the_third(self, nbytes, device):
        if len(pinned) == 2:
            raise RuntimeError("CUDA refused to pin")
        return allocate(self, nbytes, device)

    monkeypatch.setattr(PinnedMemory, "allocate", refuse_the_third)
    model = TextEncoder.load(folder, precision="bf16", stream=True).model
    assert model.to("cuda").is_mapped and not pinned
    assert "could not be pinned: CUDA refused" in caplog.text


def test_an_interrupt_while_pinning_unpins(folder, pinned):
    def stop(done, total):
        assert len(pinned) == BLOCKS
        raise KeyboardInterrupt

    model = TextEncoder.load(folder, precision="bf16", stream=True).model
    with pytest.raises(KeyboardInterrupt):
        model.to("cuda", stop)
    assert not pinned and model.is_mapped and model.device.type == "cpu"


# ---- what goes wrong


@pytest.mark.parametrize("source", ["int8 from int8", "bf16 from fp8"])
def test_an_interrupt_leaves_no_tensor(sources, source, way):
    path, precision = sources[source]
    encoder = TextEncoder.load(path, precision=precision, stream=True)
    expected = encoder.encode_ids(LENGTHS[20])
    before = live_bytes(torch.device("cpu"))

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        encoder.encode_ids(LENGTHS[20], progress=stop)
    gc.collect()
    activations = 2 * 20 * 64 * 4 + 4 * 20 * 20 * 4  # in the frames that the kept error holds
    assert live_bytes(torch.device("cpu")) <= before + activations < before + encoder.nbytes / 4
    assert caught.value is not None
    assert torch.equal(encoder.encode_ids(LENGTHS[20]), expected)


def test_dropping_the_encoder_drops_its_file(folder):
    encoder = TextEncoder.load(folder, precision="fp32", stream=True)
    encoder.encode_ids([1])
    weights = [weakref.ref(weight) for weight in encoder.model._weights.values()]
    del encoder
    gc.collect()
    assert all(weight() is None for weight in weights)


@pytest.mark.parametrize("precision", ["nf4", "fp4"])
def test_4_bit_is_refused(folder, tmp_path, precision):
    with pytest.raises(SigmaError, match=f"in {precision} can not be streamed.*Choose int8 or bf16"):
        TextEncoder.load(folder, precision=precision, stream=True)
    with pytest.raises(SigmaError, match="can not be streamed"):
        describe_encoder(folder, precision=precision, stream=True)


def test_int8_says_how_to_save_the_quantising(sources, caplog):
    TextEncoder.load(sources["int8 from int8"][0], stream=True)
    TextEncoder.load(sources["bf16 from bf16"][0], precision="bf16", stream=True)
    assert "quantize-t5" not in caplog.text
    TextEncoder.load(sources["int8 from fp16"][0], stream=True)
    assert "quantised to int8 again for every prompt" in caplog.text and "quantize-t5" in caplog.text


def changed(folder: Path, root: Path, change) -> Path:
    """A copy of the folder whose weights `change` has edited."""
    root.mkdir()
    for file in ("config.json", "spiece.model"):
        origin = folder / file if (folder / file).exists() else folder.parent / file
        (root / file).write_bytes(origin.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, root / "model.safetensors")
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(f"{Q}.weight"), f"{Q}.weight"),
        (lambda weights: weights.pop(f"{Q}.SCB"), f"{Q}.weight is int8 but its SCB is missing"),
        (
            lambda weights: weights.update({f"{Q}.SCB": torch.ones(3)}),
            "SCB is .3,. .*, and 64 numbers",
        ),
        (lambda weights: weights.update({f"{Q}.weight": torch.ones(3, 4).char()}), "shape .3, 4., not"),
        (
            lambda weights: (weights.pop(f"{Q}.SCB"), weights.update({f"{Q}.weight": torch.ones(64, 64)})),
            f"{Q}.weight is torch.float32, unlike in the first block",
        ),
    ],
)
def test_weights_that_are_missing_or_do_not_fit_are_named(sources, tmp_path, change, message):
    folder = changed(sources["int8 from int8"][0], tmp_path / "t5", change)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.load(folder, stream=True)


def test_a_file_that_was_cut_off_is_named(folder, tmp_path):
    copy = changed(folder, tmp_path / "t5", lambda weights: None)
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="model.safetensors is cut off"):
        TextEncoder.load(copy, precision="bf16", stream=True)


@pytest.mark.parametrize("when", ["between prompts", "between blocks"])
def test_a_file_that_changes_while_it_is_streamed_is_named(folder, tmp_path, way, when):
    copy = changed(folder, tmp_path / "t5", lambda weights: None)
    file = copy / "model.safetensors"
    encoder = TextEncoder.load(copy, precision="bf16", stream=True)
    encoder.encode_ids([1])
    if when == "between prompts":
        file.unlink()
        with pytest.raises(CheckpointError, match="model.safetensors is gone"):
            encoder.encode_ids([1])
    else:
        before = live_bytes(torch.device("cpu"))
        with pytest.raises(CheckpointError, match="model.safetensors was changed") as kept:
            encoder.encode_ids([1], progress=lambda done, total: os.utime(file))
        assert live_bytes(torch.device("cpu")) - before < encoder.nbytes / 4, kept


# ---- the pipeline and the command


def test_the_pipeline_streams(pipeline_folder, read):
    settings = dict(device="cpu", t5_precision="fp32", measure=True)
    resident = SigmaPipeline.from_path(pipeline_folder, Ways(**settings))
    streamed = SigmaPipeline.from_path(pipeline_folder, Ways(t5_device="stream", **settings))
    expected, result = (
        pipeline.encode_prompts(Settings("a fox", "snow")) for pipeline in (resident, streamed)
    )
    assert torch.equal(result.positive, expected.positive)
    assert torch.equal(result.negative, expected.negative)
    needed = [pipeline.stages.costs["text encoder"].weights for pipeline in (resident, streamed)]
    assert needed[1] < needed[0] / 2
    blocks = len(read)  # once for both prompts

    read.clear()
    texts, told = ("a fox", "snow", "a fox", ""), []
    asked = texts, Settings(), streamed.ways, None, lambda *call: told.append(call)
    several, *_ = streamed.text.encode(*asked)
    assert len(read) == blocks == told[-1][1] == len(told) - 1
    assert torch.equal(several[0].prompt_embeds, expected.positive) and several[2] is several[0]
    assert torch.equal(several[1].prompt_embeds, expected.negative)


def test_the_command_streams(pipeline_folder, tmp_path, capsys):
    out = tmp_path / "picture.png"
    quick = ["--model", str(pipeline_folder), "--size", "128x128", "--no-binning", "--steps", "1"]
    command = ["generate", "a fox", *quick, "--device", "cpu", "--t5-device", "stream", "--out", str(out)]
    assert main([*command, "--t5-precision", "nf4"]) == 2
    assert "nf4 can not be streamed" in capsys.readouterr().err and not out.exists()
    assert main([*command, "--t5-precision", "fp32"]) == 0 and out.exists()
