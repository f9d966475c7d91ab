"""An input that is chosen from a list, or spelled out: in a text beside it, or in one that is linked."""

from ..pixart_sigma.errors import SigmaError
from .host.api import io

CUSTOM = "custom"


def list_input(name: str, options: list[str], default: str, tooltip: str, optional: bool = False):
    """A list, into which a spelling may come by a link, and from workflows that were saved when it was a
    text. The host holds a list to its options only where it takes nothing else."""
    return io.MultiType.Input(
        io.Combo.Input(name, options=options, default=default, tooltip=tooltip, optional=optional),
        types=[io.String],
    )


def custom_input(name: str, placeholder: str, tooltip: str):
    """The text for `custom`, the last input of a node: saved workflows hold values by their place."""
    return io.String.Input(name, optional=True, default="", placeholder=placeholder, tooltip=tooltip)


def spelled(name: str, choice: str, custom: str, presets: dict[str, str], example: str) -> str:
    """The setting as on the command line; presets: what the list offers -> its spelling. SigmaError where
    the choice is custom, and the text is empty."""
    if choice != CUSTOM:
        return presets.get(choice, choice)
    if not custom.strip():
        raise SigmaError(
            f"{name} is custom, and custom_{name} is empty. Write one there, such as {example}, or choose "
            f"{', '.join(presets)}."
        )
    return custom
