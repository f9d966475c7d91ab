"""The arithmetic of adapters: what each kind makes of a weight matrix, or of some of its rows.

Written after the trainers: PEFT's tuners/{lora,loha,lokr,oft}/layer.py, LyCORIS' lycoris/modules and
OneTrainer's modules/module/LoRAModule.py. A strength other than 1 goes that share of the way from the weight
to the changed one, as in ComfyUI.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

EPSILON = torch.finfo(torch.float32).eps


def _on(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device, torch.float32) for tensor in tensors]


def _pair(first: torch.Tensor, second: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """first @ second; with the core of a Tucker decomposition (r, r, k, k), first (r, p) and second (r, q)
    make (p, q, k, k)."""
    if core is None:
        return first @ second
    return torch.einsum("i j ..., i p, j q -> p q ...", core, first, second)


class Additive(ABC):
    """What adds a matrix to the weight."""

    words = "additive"
    rowwise = True

    @abstractmethod
    def delta(self, shape: tuple[int, ...], rows: slice, device: torch.device) -> torch.Tensor:
        """`rows` of the matrix of `shape` that is added, in float32."""

    def apply(self, weight: torch.Tensor, shape: tuple[int, ...], rows: slice, strength: float):
        return weight + strength * self.delta(shape, rows, weight.device)


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """scale * up @ down (LoRA, arXiv 2106.09685): up (out, r), down (r, in); of a convolution (out, r, 1, 1)
    and (r, in, k, k), or down (r, in, 1, 1) with mid (r, r, k, k)."""

    words = "LoRA"
    up: torch.Tensor
    down: torch.Tensor
    mid: torch.Tensor | None
    scale: float

    def delta(self, shape, rows, device):
        up, down = _on(device, self.up.flatten(1)[rows], self.down.flatten(1))
        if self.mid is None:
            made = up @ down
        else:
            made = _pair(up.T, down, self.mid.to(device, torch.float32))
        return (self.scale * made).reshape(-1, *shape[1:])


@dataclass(frozen=True, eq=False)
class Hadamard(Additive):
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise (LoHa, arXiv 2108.06098)."""

    words = "LoHa"
    w1: tuple[torch.Tensor, torch.Tensor]
    w2: tuple[torch.Tensor, torch.Tensor]
    cores: tuple[torch.Tensor, torch.Tensor] | None
    scale: float

    def delta(self, shape, rows, device):
        cores = (None, None) if self.cores is None else _on(device, *self.cores)
        (a, b), (c, d) = _on(device, *self.w1), _on(device, *self.w2)
        one, other = _pair(a, b, cores[0]), _pair(c, d, cores[1])
        return (self.scale * one * other).reshape(shape)[rows]


@dataclass(frozen=True, eq=False)
class Kronecker(Additive):
    """scale * (w1 kron w2) (LoKr, LyCORIS, arXiv 2309.14859); each of them whole, or a product, of which w2
    may have a Tucker core."""

    words = "LoKr"
    w1: tuple[torch.Tensor, ...]
    w2: tuple[torch.Tensor, ...]
    core: torch.Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        """0 where both are whole."""
        return len(self.w2[1]) if len(self.w2) > 1 else len(self.w1[1]) if len(self.w1) > 1 else 0

    def delta(self, shape, rows, device):
        core = None if self.core is None else self.core.to(device, torch.float32)
        w1, w2 = _on(device, *self.w1), _on(device, *self.w2)
        first = w1[0] if len(w1) == 1 else w1[0] @ w1[1]
        second = w2[0] if len(w2) == 1 else _pair(w2[0], w2[1], core)
        return (self.scale * torch.kron(first, second.flatten(1))).reshape(shape)[rows]


@dataclass(frozen=True, eq=False)
class Difference(Additive):
    """A full-rank difference, or that of a bias."""

    words = "full-rank"
    tensor: torch.Tensor
    scale: float = 1.0

    def delta(self, shape, rows, device):
        return self.scale * self.tensor[rows].to(device, torch.float32)


@dataclass(frozen=True, eq=False)
class Replacement:
    """Another weight in the place of this one."""

    words = "replaced"
    rowwise = True
    tensor: torch.Tensor

    def apply(self, weight, shape, rows, strength):
        return weight + strength * (self.tensor[rows].to(weight) - weight)


@dataclass(frozen=True, eq=False)
class Decomposed:
    """Weight-decomposed (DoRA, arXiv 2402.09353): each row or column of the weight with the difference added
    is brought to a magnitude.

    magnitude: as many as the matrix has rows (axis 0) or input channels (axis 1), whose norm is over all
    rows.
    """

    added: Additive
    magnitude: torch.Tensor
    axis: int

    @property
    def words(self) -> str:
        return f"{self.added.words} with DoRA"

    @property
    def rowwise(self) -> bool:
        return self.axis == 0

    def apply(self, weight, shape, rows, strength):
        magnitude = self.magnitude.to(weight)[rows if self.axis == 0 else slice(None)]
        whole = weight + self.added.delta(shape, rows, weight.device)
        others = [axis for axis in range(whole.ndim) if axis != self.axis]
        norm = torch.linalg.vector_norm(whole, dim=others, keepdim=True).clamp_min(EPSILON)
        whole = whole * magnitude.reshape(norm.shape) / norm
        return weight + strength * (whole - weight)


@dataclass(frozen=True, eq=False)
class RotatedOutputs:
    """Blocks of rows, each turned by an orthogonal matrix (Diag-OFT of LyCORIS, arXiv 2306.07280).

    blocks (count, n, n); rescale: a factor for each row; constraint: the largest norm of all blocks, or 0.
    """

    words = "OFT"
    rowwise = False
    blocks: torch.Tensor
    rescale: torch.Tensor | None
    constraint: float

    def apply(self, weight, shape, rows, strength):
        blocks = self.blocks.to(weight)
        skew = blocks - blocks.transpose(1, 2)
        if self.constraint > 0:
            norm = skew.norm() + 1e-8
            skew = skew * (self.constraint / norm).clamp_max(1)
        turn = torch.eye(blocks.shape[1]).to(skew)
        turn = (turn + skew) @ torch.linalg.inv(turn - skew)
        parts = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
        turned = torch.einsum("k n m, k n ... -> k m ...", turn, parts).reshape(weight.shape)
        if self.rescale is not None:
            turned = turned * self.rescale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
        return weight + strength * (turned - weight)


@dataclass(frozen=True, eq=False)
class RotatedInputs:
    """Blocks of columns, each turned by an orthogonal matrix (OFTv2, arXiv 2506.19847: PEFT and OneTrainer).

    upper (count, n (n - 1) / 2): the skew-symmetric matrices above their diagonals; of one for all blocks the
    count is 1. terms: of the Neumann series for the inverse, 0 for the inverse itself. transposed: OneTrainer
    turns a convolution the other way round.
    """

    words = "OFT"
    rowwise = True
    upper: torch.Tensor
    scale: float
    terms: int
    transposed: bool = False

    @property
    def size(self) -> int:
        """n"""
        return block_size(self.upper.shape[1])

    def turns(self, device: torch.device) -> torch.Tensor:
        """(count, n, n)"""
        size = self.size
        skew = torch.zeros(len(self.upper), size, size, device=device)
        above = torch.triu_indices(size, size, 1, device=device)
        skew[:, above[0], above[1]] = self.scale * self.upper.to(device, torch.float32)
        skew = skew - skew.transpose(1, 2)
        eye = torch.eye(size, device=device).expand_as(skew)
        if not self.terms:
            # The other way round than the series, as PEFT has it.
            return torch.linalg.solve(eye + skew, eye - skew, left=False)
        # I + 2 (Q + Q^2 + ...) + Q^(terms - 1), the last of them once.
        turn, power = eye.clone(), eye
        for exponent in range(1, self.terms):
            power = power @ skew
            once = exponent == self.terms - 1 and exponent > 1
            turn = turn + (power if once else 2 * power)
        return turn

    def apply(self, weight, shape, rows, strength):
        turns = self.turns(weight.device)
        columns = weight.flatten(1)
        turns = turns.expand(columns.shape[1] // self.size, -1, -1)
        parts = columns.unflatten(1, (len(turns), self.size))
        how = "o r k, r k c -> o r c" if self.transposed else "o r c, r k c -> o r k"
        turned = torch.einsum(how, parts, turns).reshape(weight.shape)
        return weight + strength * (turned - weight)


def block_size(elements: int) -> int:
    """n, where n (n - 1) / 2 elements lie above the diagonal of n x n; 0 where there is no such n."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0
