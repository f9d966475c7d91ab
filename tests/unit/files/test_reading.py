"""Files that are not what they seem: each is refused in a sentence, at once, before anything is built."""

import io
import json
import os
import struct
import time
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import save, save_file

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.files import mapping
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.files.pictures import read_picture
from pixart_sigma.files.reading import parse_json, parsing, read_json
from pixart_sigma.files.weight_files import read_header, read_outline, read_state_dict
from pixart_sigma.text.embeddings import PromptEmbeddings
from pixart_sigma.transformer.calibration import Calibration

READERS = {
    "a.safetensors": read_state_dict,
    "a.safetensors.index.json": read_state_dict,
    "a.json": read_json,
    "a.png": read_picture,
    "said.png": Metadata.read,
    "prompt.safetensors": PromptEmbeddings.load,
    "a.kv_calibration.json": Calibration.read,
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(SigmaError, match="is a pipe; give a regular file"):
        READERS[name](tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(SigmaError, match="is a device"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", READERS)
def test_no_path_has_a_nul(tmp_path, name):
    with pytest.raises(SigmaError, match="is no path of a file"):
        READERS[name](tmp_path / f"a\0{name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested more than"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"a": ' + "9" * 5000 + "}", "a number has 5000 digits"),
        ('{"a": 1e999}', "1e999 is a number that is too large"),
        ("[" + "[]," * 1_000_001 + "1]", "more than 1000000 lists"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"ä": 1}'.encode("latin-1"), "can't decode"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_json_within_bounds(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError, match=f"config.json can not be read as JSON: .*({words})"):
        read_json(path)


def test_infinity_by_its_name_is_json_of_diffusers():
    assert parse_json('{"lambda_min_clipped": -Infinity}') == {"lambda_min_clipped": -float("inf")}


def test_what_a_parser_raises_is_named_and_an_interrupt_is_not():
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    for error in (panic("out of range"), KeyError("x"), RecursionError("deep"), OSError("gone")):
        with pytest.raises(CheckpointError, match="a.bin can not be read: .*download it"), parsing("a.bin"):
            raise error
    interrupt = type("InterruptProcessingException", (BaseException,), {})
    for error in (interrupt(), KeyboardInterrupt(), SystemExit(), MemoryError()):
        with pytest.raises(type(error)), parsing("a.bin"):
            raise error


def safetensors(path, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, "said to have the shape"),
        ({"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}}, "said to have the shape"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "said to have the shape"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "said to have the shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, "from 0 to 8"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "does not lie where"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "TypeError"),
        ({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, "as F4, which is not read here"),
        ({"a": 1}, "TypeError"),
        ({"__metadata__": {"a": 1}}, "metadata are not texts"),
        ({str(place): {} for place in range(100_001)}, "lists 100001 tensors"),
        (b'{"a":' + b"[]," * 1_000_001 + b"}", "more than 1000000 lists"),
        (b'{"a":' + b"[" * 200_000 + b"}", "nested more than"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "3 bytes behind its last tensor"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_header_is_held_against_the_file(tmp_path, header, words):
    path = safetensors(tmp_path / "a.safetensors", header, bytes(4))
    for read in (read_header, read_outline, read_state_dict):
        with pytest.raises(CheckpointError, match=f"a.safetensors .*{words}"):
            read(path)


@pytest.mark.parametrize("is_mapped", [True, False])
def test_tensors_are_those_that_were_saved(tmp_path, is_mapped):
    path = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
        "b": torch.tensor(True),
        "c": torch.zeros(0, 4),
        "d": torch.arange(3, dtype=torch.int64),
    }
    content = save(tensors)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" " * 3  # where numbers are not aligned
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    mapping.map_files(is_mapped)
    try:
        read = read_state_dict(path)
    finally:
        mapping.map_files(True)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    os.truncate(path, 0)  # what is in RAM is still there
    if not is_mapped:
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_file_that_is_cut_off_while_it_is_mapped_is_known(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    files = mapping.Whole(path)
    files.check()
    (tmp_path / "b").write_bytes(b"another")
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="was cut off while its weights are in use: 100 of"):
        files.check()
    os.replace(tmp_path / "b", path)  # the mapping is of the file that is gone
    with pytest.raises(CheckpointError, match="was cut off"):
        files.check()


def archive(path, outline: bytes, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in {"data.pkl": outline, "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"a/{name}", content)
    return path


TWICE = b"q\x01h\x01\x86"  # the tuple of a value and itself
HOSTILE = {
    "a key of 2^28 tuples": (b"\x80\x02})" + TWICE * 28 + b"K\x01s.", "nests tuples"),
    "a dictionary in itself": (b"\x80\x02}q\x01X\x01\x00\x00\x00ah\x01s.", "hold one another without end"),
    "dictionaries of dictionaries": (
        b"\x80\x02}" + b"q\x01}(X\x01\x00\x00\x00ah\x01X\x01\x00\x00\x00bh\x01u" * 40 + b".",
        "hold one another without end",
    ),
    "takes more than there is": (b"\x80\x02\x86.", "TUPLE2 takes more than there is"),
    "a number of 5000 digits": (b"\x80\x02I" + b"9" * 5000 + b"\n.", "can not be read as a PyTorch"),
}


@pytest.mark.filterwarnings("ignore:.*before 1")
@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_without_end_is_refused(tmp_path, name, form):
    outline, words = HOSTILE[name]
    path = tmp_path / "a.pth"
    if form == "zip":
        archive(path, outline)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        whole, empty = path.read_bytes(), b"\x80\x02}q\x00."
        assert whole.count(empty) == 1
        path.write_bytes(whole.replace(empty, outline))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=words):
        read_header(path)
    assert time.process_time() - begin < 5


def test_a_small_pickle_may_not_stand_for_much_memory(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a.weight": torch.zeros(1).expand(5000, 1_000_000)}, path)
    for read in (read_header, read_state_dict):
        with pytest.raises(CheckpointError, match="1 tensors would take 20000000000 bytes"):
            read(path)
    tied = torch.zeros(600_000)
    torch.save({"a.weight": tied, "b.weight": tied}, path)
    assert read_state_dict(path).keys() == {"a.weight", "b.weight"}


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)]
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_another_kind_are_refused(tmp_path, tensor):
    torch.save({"a.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth (can not be read as|holds no weights that)"):
        read_state_dict(tmp_path / "a.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    path = archive(tmp_path / "a.pth", bytes(10**7), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="was compressed as a zip archive"):
        read_header(path)


def test_a_bomb_in_a_picture_is_refused(tmp_path):
    from PIL import Image

    path, content = tmp_path / "a.png", io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    bomb = b"pixart_sigma\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    whole = content.getvalue()
    path.write_bytes(whole[:33] + chunk + whole[33:])  # behind the header
    with pytest.raises(SigmaError, match="a.png"):
        Metadata.read(path)


def test_a_picture_that_another_program_would_draw_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%id) (w) file\n")
    with pytest.raises(SigmaError, match="a.png is not a picture that can be read"):
        read_picture(path)
