"""A pipeline by what it is opened from, which another process or another machine can do as well."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import BUILT_IN
from ..adapter_files import AdapterFile
from ..devices import dtype_name
from ..pipeline import SigmaPipeline
from ..settings import Ways


@dataclass(frozen=True)
class Opening:
    """What a pipeline for many pictures is opened from, as plain data. A machine that has the files in the
    same places opens the same.

    files: the arguments of `SigmaPipeline.from_path` beside the ways. adapters: of the transformer and T5.
    refiner: a second transformer.
    """

    files: dict[str, Any] = field(default_factory=dict)
    ways: Ways = field(default_factory=Ways)
    adapters: tuple[AdapterFile, ...] = ()
    refiner: str | None = None

    def open(self) -> SigmaPipeline:
        """The pipeline, which keeps its models. Raises what `from_path`, `with_adapters` and `with_refiner`
        raise."""
        pipeline = SigmaPipeline.from_path(**self.files, ways=replace(self.ways, release="keep"))
        pipeline = pipeline.with_adapters(self.adapters)
        return pipeline.with_refiner(self.refiner) if self.refiner else pipeline

    def absolute(self) -> "Opening":
        """The same, whatever folder a process works in."""
        return replace(
            self,
            files={name: _absolute(value) for name, value in self.files.items()},
            adapters=tuple(replace(adapter, path=_absolute(adapter.path)) for adapter in self.adapters),
            refiner=_absolute(self.refiner),
        )


def made_with(pipeline: SigmaPipeline) -> dict[str, str]:
    """What all pictures of a batch have in common, ready for JSON; a batch goes on with the same alone."""
    found = {f"{component} (fingerprint)": sha for component, sha in pipeline.fingerprints().items()}
    for adapter in pipeline.components.used_adapters:
        found[f"adapter {adapter.name}"] = f"{adapter.fingerprint} at {adapter.strength:g}"
    precision = pipeline.ways.t5_precision or ""
    return found | {"precision of T5": precision, "dtype": dtype_name(pipeline.dtype)}


def _absolute(value: Any) -> Any:
    """A path that exists, from the root on; what else there may be, such as a model's name, stays."""
    if isinstance(value, str | Path) and str(value) not in BUILT_IN and Path(value).exists():
        return str(Path(value).absolute())
    return value
