"""The transformer's stage of a run: it is loaded, used and released, in a smaller way where it must; and the
ways it has."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from ..choices import MAX_SEQUENCE_LENGTH, TRANSFORMER_DEVICES
from ..errors import SigmaError
from ..files.quantised_weights import dequantised
from ..memory.stages import Stages
from ..memory.ways import Needs, Way, first_that_fits
from ..settings import Settings, Ways
from .calibrated_speed import follow
from .calibration import Calibration, find_calibration, fingerprint_of
from .changes import Change
from .checkpoint import Checkpoint, Quantised, load_transformer_state_dict
from .config import TransformerConfig
from .controlnet_file import build_controlnet
from .cost import activation_bytes
from .kv_rules import KVCompression, resolve
from .loading import UNCHANGED, load_transformer
from .lora import Adapter, adapter_changes
from .network import SigmaTransformer, build_transformer
from .quantised import put_layers, working_nbytes
from .streaming import parameter_nbytes, parked_nbytes, window_nbytes

Result = TypeVar("Result")


def list_ways(places: Iterable[str], guided: bool, needs: Callable[[str, bool], Needs]) -> Iterator[Way]:
    """The ways to run the transformer in these places of TRANSFORMER_DEVICES: in each of them both prompts in
    one pass, and with guidance in turn.

    needs(place, in turn): what a way needs.
    """
    for place in places:
        for in_turn in (False, True) if guided else (False,):
            how = "prompt and negative prompt in turn" if in_turn else "in one pass"
            yield Way(
                how + (", streamed" if place == "stream" else ""),
                {"transformer_device": place, "guidance_in_turn": in_turn},
                partial(needs, place, in_turn),
            )


@dataclass(frozen=True)
class Pass:
    """What a forward pass is over: latents of height x width pixels, and prompts of so many tokens."""

    height: int
    width: int
    count: int = 1
    guided: bool = True
    tokens: int = MAX_SEQUENCE_LENGTH


def predict_needs(
    config: TransformerConfig,
    work: Pass,
    dtype: torch.dtype,
    place: str,
    in_turn: bool,
    quantised: Quantised = (),
    controlnets: tuple[TransformerConfig, ...] = (),
) -> Needs:
    """Bytes of a transformer of this config, in a dtype, in a place of TRANSFORMER_DEVICES.

    quantised: the weights that stay quantised, see `Checkpoint.quantised`. controlnets: the configs of those
    that act beside it; they are whole on the device, also where the transformer is streamed.
    """
    weights, in_ram = _weight_bytes(config, dtype, place, quantised)
    weights += sum(_controlnet_bytes(controlnet, dtype) for controlnet in controlnets)
    batch = work.count * (2 if work.guided and not in_turn else 1)
    size = (-(-work.height // 8), -(-work.width // 8))
    activations = activation_bytes(config, batch, *size, work.tokens, dtype.itemsize, len(controlnets))
    return Needs(weights + activations + working_nbytes(quantised), weights, in_ram)


@functools.lru_cache(maxsize=8)
def _controlnet_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    return parameter_nbytes(build_controlnet(config).parameters(), dtype)


@functools.lru_cache(maxsize=64)
def _weight_bytes(
    config: TransformerConfig, dtype: torch.dtype, place: str, quantised: Quantised
) -> tuple[int, int]:
    """Bytes of weights on the device and of those that wait in RAM."""
    transformer = build_transformer(config)
    put_layers(transformer, quantised, UNCHANGED)
    if place == "stream":
        return window_nbytes(transformer, dtype), parked_nbytes(transformer, dtype)
    return parameter_nbytes(transformer.parameters(), dtype), 0


@dataclass
class TransformerStage:
    """The transformer by its files, the device and dtype it runs in, the run's stages, and the adapters that
    change its weights, in order, each with its strength; name: among the stages, and in messages."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    stages: Stages = field(repr=False)
    adapters: tuple[tuple[Adapter, float], ...] = field(default=(), repr=False)
    name: str = "transformer"
    _held_place: str = field(default="", repr=False)

    def run(
        self, use: Callable[[SigmaTransformer, bool], Result], work: Pass, ways: Ways
    ) -> tuple[Result, Ways]:
        """use(transformer, guidance in turn), and the ways as it ran: as they ask for it, or in a smaller way
        where memory runs out."""

        def run_in(way: Way) -> Result:
            in_turn = way.chosen["guidance_in_turn"]
            return self._hold(way.chosen["transformer_device"], lambda transformer: use(transformer, in_turn))

        result, way = first_that_fits(self.name, self._ways(work, ways), run_in)
        return result, replace(ways, **way.chosen)

    def load(self, place: str) -> SigmaTransformer:
        """Load the transformer for a place."""
        return load_transformer(
            self.checkpoint,
            dtype=self.dtype,
            device=self.device,
            stream=place == "stream",
            changes=self._changes(),
        )

    def kv_compression(self, setting: str | None, width: int, height: int) -> tuple[KVCompression, ...]:
        """The rules of a run at a size in pixels; None is as the checkpoint was trained.

        Raises SigmaError where the setting does not fit the checkpoint.
        """
        config = self.checkpoint.config
        if setting is not None and setting.endswith(".json"):
            return resolve(self._read_calibration(setting).rules, config, height, width)
        calibration = self._find_calibration() if setting == "auto" else None
        return resolve(setting, config, height, width, calibration.rules if calibration else None)

    def at_speed(self, settings: Settings) -> Settings:
        """The settings with what their `speed` comes to for this checkpoint written out; with it may come KV
        compression, where they leave it open, and other steps, where the run is as it was measured.

        Raises SigmaError for a calibration of another checkpoint.
        """
        if not settings.speed_is_open:
            return settings
        asked = str(settings.speed)
        calibration = self._find_calibration() if asked == "auto" else self._read_calibration(asked)
        return follow(calibration, settings)

    def _find_calibration(self) -> Calibration | None:
        return find_calibration(self.checkpoint.path, self._fingerprint)

    def _read_calibration(self, path: str) -> Calibration:
        calibration = Calibration.read(Path(path))
        if not calibration.fits(self._fingerprint()):
            raise SigmaError(
                f"{path} was measured on another checkpoint than {self.checkpoint.path}; calibrate it."
            )
        return calibration

    def _fingerprint(self) -> tuple[float, ...]:
        """Of the checkpoint: its calibration is followed with adapters too, as in ComfyUI."""
        return fingerprint_of(load_transformer_state_dict(self.checkpoint))

    def _changes(self) -> dict[str, Change]:
        """What the adapters do. The file is read once more only for one that has to see other weights too."""
        weights = functools.cache(partial(load_transformer_state_dict, self.checkpoint))
        return adapter_changes(self.adapters, lambda name: dequantised(weights()[name]))

    def _ways(self, work: Pass, ways: Ways) -> list[Way]:
        """As it is asked for, then in smaller ways. On a CPU nothing is smaller for being streamed."""
        places = TRANSFORMER_DEVICES if self.device.type != "cpu" else (ways.transformer_device,)
        needs = partial(
            predict_needs, self.checkpoint.config, work, self.dtype, quantised=self.checkpoint.quantised
        )
        asked = {
            "transformer_device": ways.transformer_device,
            "guidance_in_turn": ways.guidance_in_turn and work.guided,
        }
        every = list(list_ways(places, work.guided, needs))
        return every[[way.chosen for way in every].index(asked) :]

    def _hold(self, place: str, use: Callable[[SigmaTransformer], Result]) -> Result:
        """use(transformer), the transformer in this place, also where another run left it in another one."""
        if self._held_place != place:
            self.stages.drop(self.name)
        self._held_place = place
        return self.stages.run(self.name, partial(self.load, place), use)
