"""What `speed` auto comes to: by the calibration of the checkpoint, or where there is none, with caution."""

import functools
import logging
from dataclasses import replace

from ..settings import Settings
from ..speed import CAUTIOUS, for_steps, spell
from .calibration import Calibration, Choice
from .kv_rules import spell as spell_rules


def follow(calibration: Calibration | None, settings: Settings) -> Settings:
    """The settings with the choice of a calibration written out.

    What was measured with other steps than the user's own is done only in a run of the steps that were
    measured; in any other, the best choice that keeps them. KV compression of the settings' own stays.
    """
    as_measured = (
        calibration is not None
        and settings.steps == calibration.steps
        and settings.scheduler == Settings.scheduler  # what is measured with
        and settings.strength == 1
        and settings.timesteps is None
        and settings.sigmas is None
        and settings.spacing is None
    )
    choice = choose(calibration, settings.steps, as_measured)
    compression = settings.kv_compression
    if compression is None and choice.rules:
        compression = spell_rules(choice.rules)
    return replace(
        settings,
        speed=spell(choice.savings),
        kv_compression=compression,
        steps=choice.steps or settings.steps,
        spacing=choice.spacing or settings.spacing,
    )


def choose(calibration: Calibration | None, steps: int, as_measured: bool = False) -> Choice:
    """The savings of a run of so many steps; other steps than these only where it is `as_measured`."""
    if calibration is None or not calibration.points:
        _say_not_measured(spell(CAUTIOUS))
        return Choice(savings=CAUTIOUS)
    point = calibration.speed if as_measured else calibration.speed_in_place
    if point is None:
        return Choice()
    if point.choice.steps is not None:
        return point.choice
    return replace(point.choice, savings=for_steps(point.choice.savings, calibration.steps, steps))


@functools.cache
def _say_not_measured(spelling: str) -> None:
    logging.getLogger(__name__).warning(
        f"Speed is {spelling}, which was not measured on this checkpoint; calibrate measures it."
    )
