"""Weight files written a tensor at a time: what they will hold is said first, so that never more than one
tensor of them is in memory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from .quantised_weights import QuantisedWeight
from .safetensors_files import DTYPES

Outline = Mapping[str, torch.Tensor | QuantisedWeight]  # on the meta device
Tensors = Iterable[tuple[str, torch.Tensor]]
NOTHING: Mapping[str, str] = MappingProxyType({})


def write_safetensors(
    path: Path, outline: Mapping[str, torch.Tensor], tensors: Tensors, metadata: Mapping[str, str] = NOTHING
) -> None:
    """Write `tensors`, each of those in the outline, once, in any order, with `metadata` in the header.

    In the file the wide dtypes come first, as readers expect, who map them into memory.
    """
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in sorted(outline, key=lambda name: (-outline[name].itemsize, name)):
        tensor = outline[name]
        starts[name], end = end, end + tensor.nbytes
        offsets = [starts[name], end]
        header[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            planned = outline[name]
            assert (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype), f"{name} is {tensor.shape}"
            file.seek(8 + len(text) + starts.pop(name))
            file.write(as_bytes(tensor).numpy().data)
    assert not starts, f"{min(starts)} was not written"


def write_gguf(path: Path, outline: Outline, tensors: Tensors, kind: str, texts: Mapping[str, str]) -> None:
    """Write `tensors`, those of the outline in its order, with `texts` in the metadata; of a weight in blocks
    the raw bytes. kind: what most of the file is, such as "Q8_0"."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "pixart")  # as gguf-node calls it
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for name, text in texts.items():
        writer.add_string(name, text)
    plain = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    for name, weight in outline.items():
        if isinstance(weight, QuantisedWeight):
            form = gguf.GGMLQuantizationType[weight.form]
        else:
            form = plain[weight.dtype]
        writer.add_tensor_info(name, weight.shape, numpy.dtype("float32"), weight.nbytes, form)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, tensor), planned in zip(tensors, outline, strict=True):
            assert name == planned, f"{name} comes where {planned} should"
            writer.write_tensor_data(as_bytes(tensor).numpy())
    finally:
        writer.close()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor as they are stored, on the CPU, in one dimension of uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
