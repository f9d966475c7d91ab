"""The numbers of GGUF's block types, in torch, so that they are made where the blocks are.

Equal to `gguf.quants.dequantize` bit by bit. The layouts are those of llama.cpp's ggml-common.h: `Q4_0` to
`Q8_0` and `IQ4_NL` hold 32 numbers in a block, the others 256 in groups with scales of their own.
"""

import torch

# The sixteen levels of IQ4_NL (kvalues_iq4nl).
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantise_blocks(blocks: torch.Tensor, name: str, type_size: int) -> torch.Tensor:
    """Raw bytes (..., n * type_size) of the block type of this name -> its numbers (n blocks, block size) in
    float32. Types without a formula here go through the gguf package, on the CPU."""
    blocks = blocks.reshape(-1, type_size)
    formula = FORMULAS.get(name)
    if formula is not None:
        return formula(blocks)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    numbers = torch.from_numpy(dequantize(blocks.cpu().numpy(), GGMLQuantizationType[name]))
    return numbers.to(blocks.device)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at a byte of each block, (n, 1) in float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _unpack(packed: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Bytes (n, B) -> (n, B * 8 / bits) numbers: of a run of bytes first the lowest bits, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    runs = packed.unflatten(1, (-1, 1, run))
    return torch.bitwise_and(torch.bitwise_right_shift(runs, shifts), 2**bits - 1).flatten(1)


def _single_bits(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (n, B) -> their bits (n, 8 B), the lowest of each byte first."""
    return _unpack(packed, 1, 1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_unpack(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _unpack(blocks[:, 4:], 4, 16).float() + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    numbers = _unpack(blocks[:, 6:], 4, 16) | (_single_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (numbers.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    numbers = _unpack(blocks[:, 8:], 4, 16) | (_single_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * numbers.float() + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=blocks.device)
    return _half(blocks, 0) * levels[_unpack(blocks[:, 2:], 4, 16).int()]


def _grouped(scales: torch.Tensor, numbers: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    """numbers (n, 256) by the scale of their group (n, groups), less the group's `least`."""
    groups = numbers.float().unflatten(1, (scales.shape[1], -1)) * scales[..., None]
    return (groups if least is None else groups - least[..., None]).flatten(1)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, numbers = blocks[:, :16], _unpack(blocks[:, 16:80], 2, 32)
    scale, least = _half(blocks, 80), _half(blocks, 82)
    return _grouped(scale * (scales & 15).float(), numbers, least * (scales >> 4).float())


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    packed = blocks[:, 96:108]  # 16 scales of six bits: four here, two there
    scales = _unpack(packed[:, :8], 4, 8) | (_unpack(packed[:, 8:], 2, 4) << 4)
    high = _unpack(blocks[:, :32], 1, 32) ^ 1  # the offset is where the bit is not
    numbers = _unpack(blocks[:, 32:96], 2, 32).view(torch.int8) - (high << 2).view(torch.int8)
    return _grouped(_half(blocks, 108) * (scales.float() - 32), numbers)


def _scales_and_leasts(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K: eight scales and eight minima, of six bits in twelve bytes, times the block's own."""
    low, middle, high = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    leasts = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], 1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * leasts.float()


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, leasts = _scales_and_leasts(blocks)
    return _grouped(scales, _unpack(blocks[:, 16:], 4, 32), leasts)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, leasts = _scales_and_leasts(blocks)
    numbers = _unpack(blocks[:, 48:], 4, 32) | (_unpack(blocks[:, 16:48], 1, 32) << 4)
    return _grouped(scales, numbers, leasts)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    numbers = _unpack(blocks[:, :128], 4, 64) | (_unpack(blocks[:, 128:192], 2, 32) << 4)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _grouped(_half(blocks, 208) * scales, numbers.float() - 32)


FORMULAS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
