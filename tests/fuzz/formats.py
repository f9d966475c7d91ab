"""Each format that is read: a damaged file of it, and all that the pack does with such a file.

A format is a function of a Random, an empty folder and the bases, that writes a case there and gives back
what reads it, to be called.
"""

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mutations
import numpy
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save

from pixart_sigma import DEMO
from pixart_sigma.files.metadata import Metadata
from pixart_sigma.files.pictures import read_mask, read_picture
from pixart_sigma.files.weight_files import read_facts, read_metadata, read_outline, read_state_dict
from pixart_sigma.inspection import describe
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.text.embeddings import PromptEmbeddings
from pixart_sigma.text.encoder import TextEncoder
from pixart_sigma.text.quantize import quantize_t5
from pixart_sigma.text.tokenizer import find_tokenizer, load_tokenizer, tokenize
from pixart_sigma.transformer.calibration import Calibration
from pixart_sigma.transformer.checkpoint import inspect
from pixart_sigma.transformer.lora import read_adapter
from pixart_sigma.vae.loading import load_vae
from pixart_sigma.vae.stage import decode

SIZES = (0, 4, 32, 256, 2**40, 2**63)
Case = Callable[[], object]
PROMPT = "A red house, 3 ﬁne ﬂowers; ①"
NAMES = (
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
    "shared.weight",
    "transformer_blocks.0.attn1.to_q.weight",
    "blocks.0.attn.qkv.weight",
    "x_embedder.proj.weight",
    "pos_embed.proj.weight",
    "decoder.conv_in.weight",
    "first_stage_model.encoder.down.0.block.0.conv1.weight",
    "lora_unet_blocks_0_attn_qkv.lora_down.weight",
    "transformer.blocks.0.attn.proj.lora_A.weight",
    "base_model.model.transformer_blocks.0.attn1.to_q.lora_B.weight",
    "controlnet_blocks.0.after_proj.weight",
    "model.diffusion_model.blocks.0.mlp.fc1.weight_scale",
    "blocks.0.mlp.fc1.comfy_quant",
    "scaled_fp8",
    "pixart_sigma.facts",
    "positive",
    "emb_params",
)


@dataclass(frozen=True)
class Bases:
    """What is damaged: quantised encoders by precision, and a tokenizer.json."""

    quantised: dict[str, Path]
    tokenizer: dict
    calibration: dict


def make_bases(folder: Path) -> Bases:
    """Write what takes long to make, once."""
    folder.mkdir(parents=True)
    for precision in ("int8", "nf4"):
        quantize_t5(DEMO / "text_encoder", folder / precision, precision)
    tokenizer = load_tokenizer(find_tokenizer(DEMO / "text_encoder"), 128)
    tokenizer.save_pretrained(folder / "tokenizer")
    said = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    point = {
        "kind": "steps",
        "kv_compression": "none",
        "speed": "none",
        "steps": 12,
        "spacing": None,
        "error": 0.1,
        "multiply_adds": 0.5,
        "seconds": 0.5,
    }
    calibration = {
        "format": "pixart-sigma calibration 2",
        "kv_compression": "none",
        "error": 0.1,
        "budget": 0.2,
        "multiply_adds_saved": 0.5,
        "size": [512, 512],
        "steps": 20,
        "prompts": ["a house"],
        "errors": {"2": [[0.1, None, 0.1, 0.2]]},
        "fingerprint": [0.1] * 16,
        "reference": "own",
        "speed": point,
        "speed_in_place": None,
        "points": [point],
    }
    return Bases({name: folder / name for name in ("int8", "nf4")}, said, calibration)


def _use_weights(path: Path) -> None:
    """All that is asked of any file of weights."""
    for read in (read_metadata, read_facts, read_outline, read_state_dict, describe, read_adapter_of):
        try:
            read(path)
        except ValueError as error:  # the next one may still fall
            if not type(error).__module__.endswith("pixart_sigma.errors"):
                raise


def read_adapter_of(path: Path) -> object:
    """It as an adapter of the demo's transformer."""
    return read_adapter(path, inspect(DEMO / "transformer").config)


def safetensors(random: Random, folder: Path, bases: Bases) -> Case:
    names = random.sample(NAMES, random.choice([1, 3, 8]))
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn]
    tensors = {
        name: torch.zeros(random.choice([(), (0,), (4, 4), (8, 4), (16, 4, 2, 2)])).to(random.choice(kinds))
        for name in names
    }
    if random.random() < 0.3:
        layer, _, _ = names[0].rpartition(".")
        said = json.dumps(mutations.change_value(random, {"format": "int8_tensorwise", "convrot": True}))
        stored = bytearray(said.encode("utf-8", "replace"))
        tensors[f"{layer}.comfy_quant"] = torch.frombuffer(stored, dtype=torch.uint8)
    content = save(tensors, {"format": "pt", "ss_output_name": "x"})
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if random.random() < 0.8:
        header = mutations.change_value(random, header)
    made = mutations.as_json(random, header)
    head = struct.pack("<Q", random.choice([len(made)] * 8 + [2**63, len(made) + 1])) + made
    path = folder / "model.safetensors"
    path.write_bytes(head + (data if random.random() < 0.9 else mutations.bytes_of(random, data)))
    return lambda: _use_weights(path)


def pickles(random: Random, folder: Path, bases: Bases) -> Case:
    weights = {name: torch.zeros(4, 4) for name in random.sample(NAMES, 3)}
    content = random.choice([weights, {"state_dict": weights, "epoch": 3, ("a", 1): [1, (2, 3)]}])
    path = folder / "model.pth"
    zipped = random.random() < 0.7
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    if random.random() < 0.3:
        path.write_bytes(mutations.bytes_of(random, whole))
    elif zipped:
        with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(path, "w") as after:
            for entry in before.infolist():
                held = before.read(entry)
                outline = entry.filename.endswith("data.pkl")
                after.writestr(entry.filename, mutations.operations(random, held) if outline else held)
    else:
        outline = pickle.dumps({"x": (1, (2, 3)), "y": [1.5, "z"]}, protocol=2)
        path.write_bytes(whole[:10] + mutations.operations(random, outline) + whole[10:])
    return lambda: _use_weights(path)


def _config(random: Random, source: Path, target: Path) -> None:
    """A folder as the source, its weights by links, with a damaged config.json."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for _ in range(random.choice([1, 1, 2])):
        settings = mutations.change_value(random, settings)
    (target / "config.json").write_bytes(mutations.as_json(random, settings))


def t5_config(random: Random, folder: Path, bases: Bases) -> Case:
    source = random.choice([DEMO / "text_encoder", *bases.quantised.values()])
    _config(random, source, folder / "t5")
    precision = random.choice([None, "bf16", "fp32"]) if source.name == "text_encoder" else None
    return lambda: TextEncoder.load(folder / "t5", DEMO / "tokenizer", precision).encode(PROMPT)


def vae_config(random: Random, folder: Path, bases: Bases) -> Case:
    _config(random, DEMO / "vae", folder / "vae")
    return lambda: decode(load_vae(folder / "vae"), torch.zeros(1, 4, 8, 8))


def transformer_config(random: Random, folder: Path, bases: Bases) -> Case:
    _config(random, DEMO / "transformer", folder / "transformer")
    said = json.loads((DEMO / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    (folder / "scheduler").mkdir()
    changed = mutations.as_json(random, mutations.change_value(random, said))
    (folder / "scheduler" / "scheduler_config.json").write_bytes(changed)
    (folder / "vae").mkdir()
    return lambda: describe(folder)


def index(random: Random, folder: Path, bases: Bases) -> Case:
    weights = {"x.weight": torch.zeros(2), "shared.weight": torch.zeros(2, 2)}
    (folder / "a-00001-of-00002.safetensors").write_bytes(save({"x.weight": weights["x.weight"]}))
    (folder / "a-00002-of-00002.safetensors").write_bytes(save({"shared.weight": weights["shared.weight"]}))
    said = {
        "metadata": {"total_size": 24},
        "weight_map": {name: f"a-0000{place}-of-00002.safetensors" for place, name in enumerate(weights, 1)},
    }
    changed = mutations.change_value(random, said)
    (folder / "a.safetensors.index.json").write_bytes(mutations.as_json(random, changed))
    return lambda: _use_weights(folder)


def quantised_state(random: Random, folder: Path, bases: Bases) -> Case:
    source = random.choice(list(bases.quantised.values()))
    shutil.copytree(source, folder / "t5")
    weights = load_file(source / "model.safetensors")
    beside = [name for name in weights if ".weight." in name or name.endswith(("SCB", "_format"))]
    for name in random.sample(beside if random.random() < 0.8 else list(weights), random.choice([1, 1, 3])):
        weights[name] = _changed(random, weights[name])
    (folder / "t5" / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    return lambda: TextEncoder.load(folder / "t5", DEMO / "tokenizer").encode(PROMPT)


def _changed(random: Random, tensor: torch.Tensor) -> torch.Tensor:
    """Another shape, another dtype, other bytes."""
    action = random.randrange(5)
    if action == 0:
        return tensor.reshape(-1)[: random.choice([0, 1, tensor.numel() // 2])].clone()
    if action == 1:
        return torch.cat([tensor.reshape(-1)] * 2)
    if action == 2:
        return tensor.to(random.choice([torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool]))
    if action == 3 and tensor.dtype == torch.uint8 and tensor.ndim == 1:
        said = json.loads(bytes(tensor.tolist()))
        made = json.dumps(mutations.change_value(random, said)).encode()
        return torch.frombuffer(bytearray(made), dtype=torch.uint8)
    stored = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    changed = mutations.bytes_of(random, stored)[: len(stored)].ljust(len(stored), b"\xff")
    return torch.frombuffer(bytearray(changed), dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


def sentencepiece(random: Random, folder: Path, bases: Bases) -> Case:
    content = (DEMO / "tokenizer" / "spiece.model").read_bytes()
    (folder / "spiece.model").write_bytes(mutations.bytes_of(random, content))
    if random.random() < 0.5:
        said = json.loads((DEMO / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        changed = mutations.as_json(random, mutations.change_value(random, said))
        (folder / "tokenizer_config.json").write_bytes(changed)
    return lambda: _use_tokenizer(folder / "spiece.model")


def _use_tokenizer(file: Path) -> None:
    tokenize(load_tokenizer(file, 128), PROMPT, return_offsets_mapping=True)


def tokenizer_json(random: Random, folder: Path, bases: Bases) -> Case:
    said = mutations.change_value(random, bases.tokenizer)
    (folder / "tokenizer.json").write_bytes(mutations.as_json(random, said))
    return lambda: _use_tokenizer(folder / "tokenizer.json")


def calibration(random: Random, folder: Path, bases: Bases) -> Case:
    path = folder / "model.kv_calibration.json"
    path.write_bytes(mutations.as_json(random, mutations.change_value(random, bases.calibration)))

    def read() -> None:
        found = Calibration.read(path)
        found.describe()
        found.fits(found.fingerprint)

    return read


def embeddings(random: Random, folder: Path, bases: Bases) -> Case:
    path = folder / "prompt.safetensors"
    path.write_bytes(mutations.bytes_of(random, (DEMO / "prompt_embeddings.safetensors").read_bytes()))
    return lambda: PromptEmbeddings.load(path)


def pictures(random: Random, folder: Path, bases: Bases) -> Case:
    mode = random.choice(["RGB", "RGBA", "L", "P", "CMYK", "I;16", "F", "LA", "1"])
    kind = random.choice(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO", "AVIF"])
    pixels = numpy.frombuffer(random.randbytes(32 * 32 * 3), numpy.uint8).reshape(32, 32, 3)
    picture = Image.fromarray(pixels)
    said = PngImagePlugin.PngInfo()
    said.add_text("pixart_sigma", mutations.as_json(random, _metadata(random)).decode("utf-8", "replace"))
    content = io.BytesIO()
    try:
        picture.convert(mode).save(content, kind, **({"pnginfo": said} if kind == "PNG" else {}))
    except (OSError, ValueError, KeyError):  # not every mode is in every format
        content = io.BytesIO()
        picture.save(content, "PNG", pnginfo=said)
    path = folder / "picture"
    whole = content.getvalue()
    path.write_bytes(mutations.bytes_of(random, whole) if random.random() < 0.8 else whole)

    def read() -> None:
        for one in (read_picture, read_mask, Metadata.read):
            try:
                one(path)
            except ValueError as error:
                if not type(error).__module__.endswith("pixart_sigma.errors"):
                    raise

    return read


def _metadata(random: Random) -> dict:
    said = json.loads(Metadata(Settings(prompt="a house"), Ways(), {}).as_json())
    return mutations.change_value(random, said)


def gguf(random: Random, folder: Path, bases: Bases) -> Case:
    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words.encode())) + words.encode()

    names = random.sample(NAMES, random.choice([1, 3]))
    number = random.choice
    counts = number([len(names)] * 4 + [2**40]), number([2, 2, 3])
    header = b"GGUF" + struct.pack("<IQQ", number([3, 3, 2, 9]), *counts)
    header += text("general.architecture") + struct.pack("<I", 8) + text("t5")
    header += text("general.alignment") + struct.pack("<II", 4, number([32, 32, 0, 7, 2**31]))
    for place, name in enumerate(names):
        shape = [32 if random.random() < 0.8 else number(SIZES) for _ in range(number([1, 2]))]
        header += text(name) + struct.pack("<I", number([len(shape)] * 6 + [2**31]))
        header += struct.pack(f"<{len(shape)}Q", *shape)
        header += struct.pack("<IQ", number([0, 1, 2, 8, 12, 30, 99]), place * number([0, 2**12, 2**40]))
    path = folder / "model.gguf"
    whole = header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(2**14)
    path.write_bytes(mutations.bytes_of(random, whole) if random.random() < 0.4 else whole)

    def read() -> None:
        _use_weights(path)
        for weight in read_state_dict(path).values():
            weight[...].float().sum()

    return read


FORMATS: dict[str, Callable[[Random, Path, Bases], Case]] = {
    "safetensors": safetensors,
    "pickles": pickles,
    "t5_config": t5_config,
    "vae_config": vae_config,
    "transformer_config": transformer_config,
    "index": index,
    "quantised_state": quantised_state,
    "sentencepiece": sentencepiece,
    "tokenizer_json": tokenizer_json,
    "calibration": calibration,
    "embeddings": embeddings,
    "pictures": pictures,
    "gguf": gguf,
}
