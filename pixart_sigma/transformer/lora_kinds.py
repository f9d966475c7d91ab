"""From the tensors that an adapter has of one layer to what they do there, with all sizes checked."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from ..errors import CheckpointError
from .changes import Edit, Kind
from .lora_changes import (
    Additive,
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    RotatedInputs,
    RotatedOutputs,
    block_size,
)
from .lora_scaling import Scaling

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """What an adapter has of one layer. name: in the file; modules: diffusers' names, several where it is
    fused; tensors: by what they are of it, see PARTS of `lora_names`."""

    name: str
    modules: tuple[str, ...]
    tensors: Tensors


@dataclass(frozen=True)
class Family:
    """Which tensors make a kind: all of `needed`, of each pair in `either` the first or all others, and what
    may be beside them."""

    words: str
    needed: tuple[str, ...]
    beside: tuple[str, ...] = ()
    either: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def own(self) -> set[str]:
        """The tensors that no other kind has."""
        choices = {name for whole, parts in self.either for name in (whole, *parts)}
        return {*self.needed, *choices}


DORA = ("alpha", "dora_scale")
FAMILIES = (
    Family("LoRA", ("lora_down", "lora_up"), ("lora_mid", "lora_up_bias", "magnitude", *DORA)),
    Family("LoHa", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2", *DORA)),
    Family(
        "LoKr",
        (),
        ("lokr_t2", *DORA),
        (("lokr_w1", ("lokr_w1_a", "lokr_w1_b")), ("lokr_w2", ("lokr_w2_a", "lokr_w2_b"))),
    ),
    Family("OFT", ("oft_blocks",), ("rescale", "alpha")),
    Family("OFT", ("oft_R",), ("scaled_oft",)),
    Family("full-rank", ("diff",), ("alpha",)),
    Family("replaced", ("weight",)),
)
BIASES = ("diff_b", "bias")


def edits_of(
    layer: Layer, shapes: dict[str, tuple[int, ...]], scaling: Scaling, source: object
) -> list[Edit]:
    """What an adapter does to a layer's weights and biases.

    shapes: of the model's weights, by diffusers' names, or transformers'. Raises CheckpointError that names
    the layer where a tensor is missing, left over, not finite, or of the wrong size.
    """
    check_tensors(layer, source)
    family = find_family(layer, source)
    edits = []
    if family is not None:
        names = tuple(f"{name}.weight" if f"{name}.weight" in shapes else name for name in layer.modules)
        shape = _joined([shapes[name] for name in names])
        kind = _MAKERS[family.words](layer, shape, scaling, source)
        edits.append(Edit(layer.name, names, shape, kind))
    biases = {name: layer.tensors[name] for name in (*BIASES, "lora_up_bias") if name in layer.tensors}
    for part, tensor in biases.items():
        names = tuple(f"{name}.bias" for name in layer.modules)
        if any(name not in shapes for name in names):
            raise CheckpointError(f"{source} changes a bias of {layer.name}, which has none.")
        shape = _joined([shapes[name] for name in names])
        _check_shape(layer, tuple(tensor.shape), shape, source)
        factor = 1.0
        if part == "lora_up_bias":
            factor = _scale(layer, len(layer.tensors["lora_down"]), scaling, source)
        made: Kind = Replacement(tensor) if part == "bias" else Difference(tensor, factor)
        edits.append(Edit(layer.name, names, shape, made))
    return edits


def find_family(layer: Layer, source: object) -> Family | None:
    """The kind of a layer, with all that it needs; None where only a bias changes."""
    held = layer.tensors.keys() - {*BIASES}
    found = [family for family in FAMILIES if family.own & held]
    if len(found) > 1:
        words = " and ".join(family.words for family in found)
        raise CheckpointError(f"{source} has {words} for {layer.name} at once; choose a file of one kind.")
    if not found:
        if held:
            raise CheckpointError(f"{source} has {_list(held)} for {layer.name} and nothing that it is of.")
        return None
    family = found[0]
    lacking = [name for name in family.needed if name not in held]
    for whole, parts in family.either:
        if whole not in held:
            lacking += [name for name in parts if name not in held]
        elif held & set(parts):
            raise CheckpointError(f"{source} has {whole} for {layer.name} twice, whole and as a product.")
    if lacking:
        raise CheckpointError(
            f"{source} lacks {_list(lacking)} for {layer.name}, of which it has {_list(held)}: it is "
            "incomplete, download it again."
        )
    left = held - family.own - {*family.beside}
    if left:
        raise CheckpointError(
            f"{source} has {_list(left)} for {layer.name}, which {family.words} has no use for."
        )
    return family


def check_tensors(layer: Layer, source: object) -> None:
    """CheckpointError unless all tensors of a layer are finite numbers, and some."""
    for part, tensor in layer.tensors.items():
        if part == "scaled_oft":
            continue
        if tensor.numel() == 0:
            raise CheckpointError(f"{source} has rank 0 for {layer.name}: {part} is {tuple(tensor.shape)}.")
        if part == "alpha":
            if tensor.numel() != 1 or not torch.isfinite(tensor.float()).all():
                raise CheckpointError(f"{source} says alpha {tensor.tolist()} for {layer.name}.")
        elif not tensor.is_floating_point():
            raise CheckpointError(
                f"{source} stores {part} of {layer.name} as {tensor.dtype}, which is not read."
            )
        elif not torch.isfinite(tensor.float()).all():
            raise CheckpointError(
                f"{source} has numbers that are not finite (NaN) in {part} of {layer.name}: its training "
                "failed, or it is damaged."
            )


def _list(names) -> str:
    return ", ".join(sorted(names))


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _check_shape(layer: Layer, found: tuple, needed: tuple, source: object) -> None:
    """That tensors make a matrix of this shape; of a convolution's its columns may be counted together."""
    if tuple(found) not in (tuple(needed), (needed[0], prod(needed[1:]))):
        raise CheckpointError(
            f"{source} changes {layer.name} as {tuple(found)}, and here it is "
            f"{tuple(needed)}: it was made for another model, or for one of another width."
        )


def _check_inner(layer: Layer, fits: bool, source: object) -> None:
    if not fits:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in layer.tensors.items())
        raise CheckpointError(f"The tensors of {layer.name} in {source} do not fit together: {shapes}.")


def _alpha(layer: Layer, source: object) -> float | None:
    if "alpha" not in layer.tensors:
        return None
    return float(layer.tensors["alpha"].float())


def _scale(layer: Layer, rank: int, scaling: Scaling, source: object) -> float:
    alpha = _alpha(layer, source)
    if alpha == 0:
        raise CheckpointError(
            f"{source} says alpha 0 for {layer.name}, with which it would change nothing: it is damaged."
        )
    return scaling.scale(layer.modules[0], rank, alpha)


def _decomposed(layer: Layer, added: Additive, shape: tuple[int, ...], source: object) -> Kind:
    """With the magnitudes of DoRA, where there are some: PEFT's are of rows, others say it by their shape."""
    if "magnitude" in layer.tensors and "dora_scale" in layer.tensors:
        raise CheckpointError(f"{source} has the magnitudes of {layer.name} twice.")
    if "magnitude" in layer.tensors:
        magnitude, axis = layer.tensors["magnitude"], 0
    elif "dora_scale" in layer.tensors:
        magnitude = layer.tensors["dora_scale"]
        axis = 0 if magnitude.ndim < 2 or magnitude.shape[0] == shape[0] else 1
    else:
        return added
    if len(shape) < 2 or magnitude.numel() != shape[axis]:
        raise CheckpointError(
            f"The magnitudes of {layer.name} in {source} are {tuple(magnitude.shape)}, for a weight "
            f"of {shape}."
        )
    return Decomposed(added, magnitude.flatten(), axis)


def _low_rank(layer: Layer, shape: tuple[int, ...], scaling: Scaling, source: object) -> Kind:
    up, down, mid = (layer.tensors.get(f"lora_{part}") for part in ("up", "down", "mid"))
    assert up is not None and down is not None
    rank = len(down)
    _check_inner(layer, min(up.ndim, down.ndim) >= 2 and up.numel() == len(up) * rank, source)
    window: tuple[int, ...] = ()
    if mid is not None:
        _check_inner(layer, mid.ndim > 2 and mid.shape[:2] == (rank, rank), source)
        window = tuple(mid.shape[2:])
    _check_shape(layer, (len(up), down.numel() // rank * prod(window)), shape, source)
    scale = _scale(layer, rank, scaling, source)
    return _decomposed(layer, LowRank(up, down, mid, scale), shape, source)


def _hadamard(layer: Layer, shape: tuple[int, ...], scaling: Scaling, source: object) -> Kind:
    w1, w2 = ((layer.tensors[f"hada_{w}_a"], layer.tensors[f"hada_{w}_b"]) for w in ("w1", "w2"))
    held = [layer.tensors.get(f"hada_{core}") for core in ("t1", "t2")]
    cores = (held[0], held[1]) if held[0] is not None and held[1] is not None else None
    _check_inner(layer, cores is not None or held == [None, None], source)
    for index, (a, b) in enumerate((w1, w2)):
        made = _product_shape(layer, a, b, cores and cores[index], source)
        _check_shape(layer, made, shape, source)
    scale = _scale(layer, len(w1[1]), scaling, source)
    return _decomposed(layer, Hadamard(w1, w2, cores, scale), shape, source)


def _kronecker(layer: Layer, shape: tuple[int, ...], scaling: Scaling, source: object) -> Kind:
    tensors, core = layer.tensors, layer.tensors.get("lokr_t2")
    w1, w2 = (
        (tensors[f"lokr_{w}"],)
        if f"lokr_{w}" in tensors
        else (tensors[f"lokr_{w}_a"], tensors[f"lokr_{w}_b"])
        for w in ("w1", "w2")
    )
    _check_inner(layer, core is None or len(w2) == 2, source)
    first = tuple(w1[0].shape) if len(w1) == 1 else _product_shape(layer, *w1, None, source)
    second = tuple(w2[0].shape) if len(w2) == 1 else _product_shape(layer, *w2, core, source)
    _check_inner(layer, len(first) == 2 and len(second) >= 2, source)
    _check_shape(layer, (first[0] * second[0], first[1] * prod(second[1:])), shape, source)
    made = Kronecker(w1, w2, core, 1.0)
    rank = made.rank
    if not rank and scaling.kind == "LOKR":
        rank = scaling.rank_of(layer.modules[0]) or 0
    # Both whole: LyCORIS and OneTrainer have no alpha then, whatever they write; PEFT has.
    if rank:
        made = Kronecker(w1, w2, core, _scale(layer, rank, scaling, source))
    return _decomposed(layer, made, shape, source)


def _product_shape(layer: Layer, a: torch.Tensor, b: torch.Tensor, core, source: object) -> tuple[int, ...]:
    """The shape of a @ b, or with a core of what `_pair` makes of them."""
    if core is None:
        _check_inner(layer, a.ndim == b.ndim == 2 and a.shape[1] == len(b), source)
        return len(a), b.shape[1]
    fits = a.ndim == b.ndim == 2 and core.ndim > 2 and tuple(core.shape[:2]) == (len(a), len(b))
    _check_inner(layer, fits, source)
    return a.shape[1], b.shape[1] * prod(core.shape[2:])


def _rotated_outputs(layer: Layer, shape: tuple[int, ...], source: object) -> Kind:
    blocks, rescale = layer.tensors["oft_blocks"], layer.tensors.get("rescale")
    if blocks.ndim == 4:
        raise CheckpointError(f"{source} is BOFT, which is not read here; merge it with its trainer.")
    _check_inner(layer, blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2], source)
    _check_shape(layer, (blocks.shape[0] * blocks.shape[1], *shape[1:]), shape, source)
    _check_inner(layer, rescale is None or rescale.numel() == shape[0], source)
    # LyCORIS writes what one output channel may have.
    constraint = (_alpha(layer, source) or 0.0) * shape[0]
    return RotatedOutputs(blocks, rescale, constraint)


def _rotated_inputs(layer: Layer, shape: tuple[int, ...], scaling: Scaling, source: object) -> Kind:
    upper = layer.tensors["oft_R"]
    size = block_size(upper.shape[1]) if upper.ndim == 2 else 0
    _check_inner(layer, size > 1, source)
    columns = prod(shape[1:])
    count = columns // size if len(upper) == 1 else len(upper)
    _check_shape(layer, (shape[0], count * size), (shape[0], columns), source)
    scale = 1 / (2 * (size - 1) ** 0.5) if "scaled_oft" in layer.tensors else 1.0
    terms = 4 if scaling.neumann_terms == 3 else scaling.neumann_terms  # PEFT makes them alike
    return RotatedInputs(upper, scale, terms, transposed=len(shape) > 2 and not scaling.kind)


def _make_rotated(layer: Layer, shape: tuple[int, ...], scaling: Scaling, source: object) -> Kind:
    if "oft_blocks" in layer.tensors:
        return _rotated_outputs(layer, shape, source)
    return _rotated_inputs(layer, shape, scaling, source)


def _whole(layer: Layer, shape: tuple[int, ...], scaling: Scaling, source: object) -> Kind:
    part = "diff" if "diff" in layer.tensors else "weight"
    tensor = layer.tensors[part]
    _check_shape(layer, tuple(tensor.shape), shape, source)
    tensor = tensor.reshape(shape)
    return Difference(tensor) if part == "diff" else Replacement(tensor)


_MAKERS: dict[str, Callable[[Layer, tuple[int, ...], Scaling, object], Kind]] = {
    "LoRA": _low_rank,
    "LoHa": _hadamard,
    "LoKr": _kronecker,
    "OFT": _make_rotated,
    "full-rank": _whole,
    "replaced": _whole,
}
