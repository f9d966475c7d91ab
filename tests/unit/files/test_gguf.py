"""GGUF files: the numbers in them are those that gguf itself reads, and what is wrong with one is named."""

import struct
import sys

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from quantised_files import is_linear, random_weights, write_gguf

from pixart_sigma.errors import CheckpointError
from pixart_sigma.files import gguf as reader
from pixart_sigma.files.gguf_blocks import FORMULAS, dequantise_blocks
from pixart_sigma.files.quantised_weights import QuantisedWeight, dequantised
from pixart_sigma.files.weight_files import check_file, read_header, read_state_dict
from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict

THROUGH_GGUF = ("IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
READERS = (check_file, read_header, read_state_dict, inspect)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", [*FORMULAS, *THROUGH_GGUF])
def test_every_block_type_is_what_gguf_makes_of_it(name):
    kind = GGMLQuantizationType[name]
    type_size = gguf.GGML_QUANT_SIZES[kind][1]
    stored = numpy.random.default_rng(0).integers(0, 256, (200, 3 * type_size), dtype=numpy.uint8)
    expected = torch.from_numpy(dequantize(stored, kind)).flatten()
    made = dequantise_blocks(torch.from_numpy(stored), name, type_size).flatten()
    assert torch.equal(made.isnan(), expected.isnan()) and not made.isnan().all()
    assert torch.equal(made.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q8_0"])
@pytest.mark.parametrize("plain", ["F32", "F16", "BF16"])
def test_a_file_is_read_by_its_header_and_its_tensors(tmp_path, kind, plain):
    weights = random_weights()
    expected = write_gguf(
        tmp_path / "a.gguf", weights, kind, plain, architecture="any", random_blocks=kind != "Q8_0"
    )
    header, tensors = read_header(tmp_path / "a.gguf"), read_state_dict(tmp_path / "a.gguf")
    assert header.keys() == tensors.keys() == expected.keys()
    kinds = set()
    for name, weight in tensors.items():
        assert header[name][0] == tuple(weight.shape) == tuple(weights[name].shape)
        assert torch.equal(dequantised(weight).float(), expected[name])
        kinds.add(header[name][1].name if isinstance(weight, QuantisedWeight) else header[name][1])
    assert kinds == {kind, {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[plain]}
    # Of the large types only layers of 256 numbers in a row are.
    assert len(inspect(tmp_path / "a.gguf").quantised) == sum(
        is_linear(name, weight) and weight.shape[1] % (32 if kind == "Q8_0" else 256) == 0
        for name, weight in weights.items()
    )


def test_a_small_file_read_by_hand(tmp_path):
    """One block of Q8_0 and one number, written here byte by byte."""
    numbers = list(range(-16, 16))
    block = struct.pack("<e32b", 0.5, *numbers)
    data = block + bytes(30) + struct.pack("<f", 7.0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + entry("some.list", 9, struct.pack("<IQ2H", 2, 2, 1, 2))
    head += text("a") + struct.pack("<IQQIQ", 2, 32, 1, 8, 0)
    head += text("b") + struct.pack("<IQIQ", 1, 1, 0, 64)
    (tmp_path / "a.gguf").write_bytes(padded(head) + data)
    read = read_state_dict(tmp_path / "a.gguf")
    assert read["a"].shape == (1, 32) and read["a"].form == "Q8_0"
    assert read["a"].dequantise().tolist() == [[number / 2 for number in numbers]]
    assert read["b"].tolist() == [7.0]


def test_a_flattened_tensor_has_its_shape_again(tmp_path):
    stored = gguf.quants.quantize(numpy.ones((4, 32), numpy.float32), GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "any")
    writer.add_array("comfy.gguf.orig_shape.conv", [8, 4, 2, 2])
    writer.add_tensor("conv", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    finish(writer)
    weight = read_state_dict(tmp_path / "a.gguf")["conv"]
    assert weight.shape == (8, 4, 2, 2) and weight.dequantise().shape == (8, 4, 2, 2)
    assert torch.allclose(weight.dequantise(), torch.ones(8, 4, 2, 2), atol=1e-3)


def test_convolutions_and_tables_that_are_quantised_load_too(tmp_path):
    """A block type does not say that it is a linear layer's."""
    weights = random_weights()
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "any")
    kind = GGMLQuantizationType.Q8_0
    for name, weight in weights.items():
        array = weight.numpy()
        if name.endswith("scale_shift_table") or name.endswith("bias") and array.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    finish(writer)
    from pixart_sigma.transformer.loading import load_transformer

    loaded = load_transformer(tmp_path / "a.gguf", torch.float32, variant="1024").state_dict()
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].dtype == torch.float32
        assert (loaded[name] - weight).abs().max() <= 0.01 * weight.abs().max(), name
    assert not torch.equal(loaded["scale_shift_table"], weights["scale_shift_table"])


def test_the_file_stays_mapped(tmp_path):
    write_gguf(tmp_path / "a.gguf", random_weights(), "Q8_0")
    (tmp_path / "a.gguf").chmod(0o444)
    tensors = read_state_dict(tmp_path / "a.gguf")
    pieces = [part for weight in tensors.values() for part in getattr(weight, "parts", {"": weight}).values()]
    places = [piece.data_ptr() for piece in pieces]
    starts = [place.start for place in reader.read_gguf_header(tmp_path / "a.gguf").values()]
    assert max(places) - min(places) == max(starts) - min(starts)  # in one mapping


# ---- untrusted


def text(words):
    return struct.pack("<Q", len(words)) + words.encode()


def entry(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def padded(head):
    return head + bytes(-len(head) % 32)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def head(tensors=1, entries=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def tensor(name="a", dimensions=(32,), kind=8, offset=0):
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


MANY = 2**62
HOSTILE = {
    "no header": (b"GGUF", "is cut off"),
    "version 1": (head(version=1), "GGUF of version 1"),
    "another byte order": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0), "little-endian"),
    "many tensors": (head(tensors=MANY), f"claims {MANY} tensors"),
    "many entries": (head(entries=MANY), f"claims {MANY} entries"),
    "more entries than there are": (head(entries=9), "is cut off"),
    "a long name": (head() + struct.pack("<Q", MANY), f"claims {MANY} bytes in a name"),
    "a name beyond the file": (head() + struct.pack("<Q", 60000), "is cut off"),
    "a name that is no text": (
        head() + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40),
        "can not be read as GGUF",
    ),
    "many dimensions": (head() + text("a") + struct.pack("<I", 2**31), f"claims {2**31} dimensions of a"),
    "a long text": (head(0, 1) + entry("a", 8, struct.pack("<Q", MANY)), "is cut off"),
    "a long architecture": (
        head(0, 1) + entry("general.architecture", 8, struct.pack("<Q", MANY)),
        f"claims {MANY} bytes",
    ),
    "a long list": (head(0, 1) + entry("a", 9, struct.pack("<IQ", 4, MANY)), "claims .* numbers in a"),
    "a long list of texts": (head(0, 1) + entry("a", 9, struct.pack("<IQ", 8, MANY)), "claims .* texts in a"),
    "texts beyond the file": (head(0, 1) + entry("a", 9, struct.pack("<IQ", 8, 1000)), "is cut off"),
    "a list of lists": (head(0, 1) + entry("a", 9, struct.pack("<IQ", 9, 1)), "a list of type 9"),
    "a value of no type": (head(0, 1) + entry("a", 77, b""), "a value of type 77"),
    "an unknown tensor type": (head() + tensor(kind=999), "as type 999 of GGUF.*Update it.*Q8_0, Q5_0"),
    "a type that gguf does not read": (head() + tensor(kind=9), "as type 9 of GGUF"),  # Q8_1
    "half a block": (head() + tensor(dimensions=(33,)), "has no whole blocks of Q8_0"),
    "no dimensions": (head() + tensor(dimensions=()), "has no whole blocks of Q8_0"),
    "tensors of petabytes": (head() + tensor(dimensions=(2**40, 2**40)), "said to have the shape"),
    "tensors of gigabytes": (head() + tensor(dimensions=(2**20, 2**15)), "is cut off: .* are needed for a"),
    "a tensor beyond the file": (head() + tensor(offset=2**40), "is cut off"),
    "an offset between": (head() + tensor(offset=3) + bytes(200), "a is not aligned"),
    "twice": (head(2) + tensor() + tensor() + bytes(200), "has a twice"),
    "no alignment": (
        head(1, 1) + entry("general.alignment", 4, struct.pack("<I", 0)) + tensor() + bytes(200),
        "its alignment is 0",
    ),
    "an alignment of another type": (
        head(1, 1) + entry("general.alignment", 8, text("8")) + tensor() + bytes(200),
        "its alignment is None",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_named(tmp_path, name):
    content, words = HOSTILE[name]
    (tmp_path / "a.gguf").write_bytes(content)
    for read in READERS:
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "a.gguf")


def test_a_file_is_cut_off_anywhere(tmp_path):
    write_gguf(tmp_path / "whole.gguf", {"a.weight": torch.ones(32, 64), "a.bias": torch.ones(32)}, "Q5_0")
    whole = (tmp_path / "whole.gguf").read_bytes()
    assert read_header(tmp_path / "whole.gguf")["a.weight"][0] == (32, 64)
    end = len(whole) - 32  # the writer fills up to 32 bytes behind the last tensor
    for length in (*range(5, 230, 7), end - 1):
        (tmp_path / "a.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is cut off"):
            read_header(tmp_path / "a.gguf")


def test_a_changed_byte_is_an_error_or_other_numbers(tmp_path):
    """Nothing but CheckpointError comes out of a header, whichever byte is another."""
    write_gguf(tmp_path / "whole.gguf", {"a.weight": torch.ones(32, 64), "a.bias": torch.ones(32)}, "Q5_0")
    whole = (tmp_path / "whole.gguf").read_bytes()
    refused = 0
    for place in range(4, 200):
        for value in (0, 1, 0x7F, 0xFF):
            (tmp_path / "a.gguf").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                for weight in read_state_dict(tmp_path / "a.gguf").values():
                    dequantised(weight)
            except CheckpointError:
                refused += 1
    assert refused > 300


def test_another_model_is_known_by_its_weights(tmp_path):
    write_gguf(tmp_path / "a.gguf", {"token_embd.weight": torch.ones(64, 32), "blk.0.x": torch.ones(32)})
    with pytest.raises(CheckpointError, match="is not a PixArt-Sigma transformer: .* token_embd.weight"):
        inspect(tmp_path / "a.gguf")
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.ones(32, 32)}
    write_gguf(tmp_path / "a.gguf", flux, architecture="pixart")
    with pytest.raises(CheckpointError, match="is Flux or a model like it, not a PixArt-Sigma"):
        inspect(tmp_path / "a.gguf")
    write_gguf(tmp_path / "a.gguf", random_weights(), architecture="llama")
    assert len(load_transformer_state_dict(inspect(tmp_path / "a.gguf"))) == len(random_weights())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "a.gguf", {"a": torch.ones(32)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    reader._block_types.cache_clear()
    with pytest.raises(CheckpointError, match="pip install gguf"):
        read_header(tmp_path / "a.gguf")
    monkeypatch.undo()
    assert read_header(tmp_path / "a.gguf") == {"a": ((32,), torch.float32)}
