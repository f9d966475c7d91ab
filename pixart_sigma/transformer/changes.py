"""Changes of a transformer's weights, each made of the weight alone when it is loaded or used."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

# The weight, of any float dtype -> the changed weight of the same shape, dtype and device. Computed in
# float32; the argument is not touched.
Change = Callable[[torch.Tensor], torch.Tensor]
# A weight of the transformer by its name, as it is without any change.
Read = Callable[[str], torch.Tensor]


class Kind(Protocol):
    """What is done to a matrix. `rowwise`: whether a row can be changed without the others."""

    @property
    def words(self) -> str: ...

    @property
    def rowwise(self) -> bool: ...

    def apply(
        self, weight: torch.Tensor, shape: tuple[int, ...], rows: slice, strength: float
    ) -> torch.Tensor:
        """The changed `rows` of a matrix of `shape`, from `weight`, those rows in float32."""
        ...


@dataclass(frozen=True, eq=False)
class Edit:
    """One change by an adapter: of a weight, or of several together that it knows as one matrix.

    names: of the weights, whose rows are joined in this order. shape: of the joined matrix. layer: what the
    adapter calls it.
    """

    layer: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind

    def rows_of(self, name: str) -> slice:
        """Where the rows of one weight lie in the joined matrix."""
        count = self.shape[0] // len(self.names)
        start = self.names.index(name) * count
        return slice(start, start + count)


def make_changes(steps: Iterable[tuple[Edit, float]], read: Read) -> dict[str, Change]:
    """The change of each weight, by its name: all edits that touch it, in order, each with its strength.

    Each edit works on what the one before has left, as in ComfyUI. Of strength 0 there is none. `read` gives
    the other weights of a matrix that can only be changed as a whole, when such a one is to be changed.
    """
    chains: dict[str, _Chain] = {}
    for edit, strength in steps:
        if strength:
            step = (edit, strength)
            for name in edit.names:
                chains.setdefault(name, _Chain(name, [], chains, read)).steps.append(step)
    return dict(chains)


@dataclass(eq=False)
class _Chain:
    name: str
    steps: list[tuple[Edit, float]]
    chains: dict[str, "_Chain"]
    read: Read

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return self._run(weight).to(weight.dtype)

    def _run(self, weight: torch.Tensor, until: tuple[Edit, float] | None = None) -> torch.Tensor:
        """The weight in float32 after the steps before `until`, or after all."""
        changed = weight.to(torch.float32)
        for step in self.steps:
            if step is until:
                break
            edit, strength = step
            rows = edit.rows_of(self.name)
            if edit.kind.rowwise or len(edit.names) == 1:
                changed = edit.kind.apply(changed, edit.shape, rows, strength)
            else:
                whole = torch.cat([self._part(name, changed, step) for name in edit.names])
                # A view would keep the other rows alive for as long as the changed weight.
                changed = edit.kind.apply(whole, edit.shape, slice(None), strength)[rows].clone()
        return changed

    def _part(self, name: str, own: torch.Tensor, step: tuple[Edit, float]) -> torch.Tensor:
        """A weight of the joined matrix as it is before a step."""
        if name == self.name:
            return own
        return self.chains[name]._run(self.read(name).to(own.device), until=step)
