"""Streamed T5 against resident T5: output, bytes per stage and time, with random blocks of T5-XXL's size.

    python benchmarks/streamed_t5.py [--precision int8|bf16] [--blocks 3] [--tokens 20] [--device cpu]

Gates: the same output bit for bit; on CUDA a window of at most 0.6 GB (int8) or 0.9 GB (bf16), which does
not depend on the number of blocks. Writes a file of 0.2 to 0.4 GB per block to the temporary folder.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixart_sigma.text.loading import read_encoder, stream_model
from pixart_sigma.text.model import build_model
from pixart_sigma.text.weights import expected_shapes

WINDOW = {"int8": 0.6e9, "bf16": 0.9e9}
ROUNDS = 3


def write_encoder(folder: Path, precision: str, blocks: int):
    """An encoder as transformers or `quantize-t5` would save it. The blocks have the same random numbers."""
    from transformers import T5Config

    config = T5Config(
        d_model=4096,
        d_kv=64,
        num_heads=64,
        d_ff=10240,
        num_layers=blocks,
        vocab_size=512,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    if precision == "int8":
        config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    weights, drawn = {}, {}
    for key, shape in expected_shapes(config).items():
        is_quantized = precision == "int8" and len(shape) == 2 and ".block." in key
        is_quantized = is_quantized and ".wo." not in key and "relative" not in key
        if (kind := (shape, is_quantized)) not in drawn:
            number = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
            drawn[kind] = torch.randint(-127, 128, shape, dtype=torch.int8) if is_quantized else number
        weights[key] = drawn[kind].clone()
        if is_quantized:
            weights[key.removesuffix("weight") + "SCB"] = torch.full(shape[:1], 0.02)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def anonymous() -> int:
    """Bytes of RAM that belong to no file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def seconds(call, device: torch.device) -> float:
    """The least of several rounds: CPU time of the process, or time on the clock where a GPU works."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    taken = []
    for _ in range(ROUNDS):
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - start)
    return min(taken)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second from pinned RAM."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return host.nbytes / seconds(lambda: target.copy_(host, non_blocking=True), device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", choices=("int8", "bf16"), default="int8")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, precision = torch.device(arguments.device), arguments.precision
    ids = torch.arange(arguments.tokens)[None] + 3
    passed = True

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_encoder(Path(folder), precision, arguments.blocks)
        gc.collect()
        start = anonymous()
        path, config, weights, _ = read_encoder(folder, precision)
        streamed = stream_model(config, weights, precision, device, path).to(device)
        result = streamed(ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            streamed(ids)
            window = torch.cuda.max_memory_allocated(device) - before
            passed = window <= WINDOW[precision]
            print(f"window on the GPU, activations included: {window / 1e6:.0f} MB")
            print(
                f"left on the GPU afterwards: {(torch.cuda.memory_allocated(device) - before) / 1e6:.1f} MB"
            )
        waits = "in the mapped file" if streamed.is_mapped else "in pinned RAM"
        print(
            f"{arguments.blocks} blocks in {precision}, waiting {waits}, {arguments.tokens} tokens, {device}"
        )
        print(f"window by shapes: {streamed.window_nbytes(torch.device('cuda')) / 1e6:.0f} MB (two blocks)")
        print(f"streamed: {(anonymous() - start) / 1e6:.1f} MB of RAM that is no file's")
        streamed_seconds = seconds(lambda: streamed(ids), device)
        moved = arguments.blocks * streamed.window_nbytes(torch.device("cuda")) / 2
        if device.type == "cuda":
            ideal = moved / copy_bandwidth(device)
            print(f"streamed: {streamed_seconds:.3f} s, {streamed_seconds / ideal:.2f} of bytes / bandwidth")

        start = anonymous()
        resident = build_model(config, weights, precision, device, path)
        expected = resident(input_ids=ids.to(device)).last_hidden_state
        print(f"resident: {(anonymous() - start) / 1e6:.1f} MB of RAM that is no file's")
        resident_seconds = seconds(lambda: resident(input_ids=ids.to(device)), device)
        print(f"time, streamed : resident = {streamed_seconds / resident_seconds:.2f}")
        equal = torch.equal(result, expected)
        print(f"bit for bit equal: {equal} (of {result.numel()} numbers, finite: {result.isfinite().all()})")
    return 0 if passed and equal else 1


if __name__ == "__main__":
    sys.exit(main())
