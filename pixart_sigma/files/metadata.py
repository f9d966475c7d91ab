"""What a picture's file says of how it was made, so that it can be made again."""

import functools
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import SigmaError
from ..noise_schedule import PUBLISHED, NoiseSchedule
from ..settings import Settings, Ways
from .picture_files import read_said
from .reading import parse_json, parsing

PACKAGES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Model:
    """A model that took part: its name for people, and its fingerprint; "" for one that is not known."""

    name: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class ControlModel:
    """A ControlNet that took part: its name and fingerprint, the digest of the picture that it read, its
    strength, and in which part of the noise schedule it acted."""

    name: str
    fingerprint: str
    image_sha256: str
    strength: float
    part: str


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter of the transformer that took part: its name for people, its strength and its fingerprint."""

    name: str
    strength: float
    fingerprint: str


@dataclass(frozen=True)
class Metadata:
    """All that makes a picture again.

    settings: with nothing left open. ways: as the stages ran in the end. models: by component. versions: of
    this package and of those that compute. variant: what the transformer was taken to be trained for.
    image_sha256, mask_sha256: of the picture that it started from, and of the mask.
    noise_schedule: that the transformer was run with; an earlier version had the published one for all.
    adapters: of the transformer, in their order.
    embeddings_sha256: of encoded prompts whose encoder is not known; their words alone would not do.
    index: which of a run's pictures it is, from 1; 0 where the run made one.
    """

    settings: Settings
    ways: Ways
    models: dict[str, Model]
    versions: dict[str, str] = field(default_factory=lambda: current_versions())
    image_sha256: str = ""
    mask_sha256: str = ""
    embeddings_sha256: str = ""
    variant: str = ""
    noise_schedule: NoiseSchedule = PUBLISHED
    controls: tuple[ControlModel, ...] = ()
    adapters: tuple[UsedAdapter, ...] = ()
    index: int = 0

    def as_json(self) -> str:
        """The settings' fields, and beside them ways, models, versions and digests."""
        content = asdict(self) | {"noise_schedule": self.noise_schedule.as_dict()}
        return json.dumps(content.pop("settings") | content, ensure_ascii=False)

    @classmethod
    def read(cls, path: str | Path) -> "Metadata":
        """What `as_json` wrote into a picture's file. One of an earlier version has the settings alone.

        Raises SigmaError for a file that is no picture, or none of ours.
        """
        text = read_said(path)
        if text is None:
            raise SigmaError(
                f"{path} does not say how it was made; give a picture that `pixart-sigma generate` wrote. "
                "Other programs drop what a file says when they save it."
            )
        said = "does not say how it was made in a way that can be read"
        with parsing(path, said, "Give another picture.", SigmaError):
            return cls._of(parse_json(text))

    @classmethod
    def _of(cls, content: dict[str, Any]) -> "Metadata":
        if str(content.get("kv_compression")).endswith(".json"):
            raise ValueError("its KV compression is a file, which is not trusted")
        known = {
            name: content[name]
            for name in ("image_sha256", "mask_sha256", "embeddings_sha256", "variant")
            if name in content
        }
        # Before the ways were written down there was this one of them.
        ways = content.get("ways") or {"t5_precision": content.get("t5_precision")}
        return cls(
            settings=Settings.from_dict(content),
            ways=Ways.from_dict(ways),
            models={name: Model(**model) for name, model in content.get("models", {}).items()},
            versions=dict(content.get("versions", {})),
            noise_schedule=NoiseSchedule.from_dict(content.get("noise_schedule", {})),
            controls=tuple(ControlModel(**control) for control in content.get("controls", ())),
            adapters=tuple(UsedAdapter(**adapter) for adapter in content.get("adapters", ())),
            index=int(content.get("index", 0)),
            **{name: str(value) for name, value in known.items()},
        )


def current_versions() -> dict[str, str]:
    """Of this package and of those that compute; of one that is not installed as a package there is none."""
    return dict(_versions())


@functools.cache  # reading them takes longer than writing a small picture
def _versions() -> tuple[tuple[str, str], ...]:
    from .. import __version__

    found = {"pixart_sigma": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return tuple(found.items())
