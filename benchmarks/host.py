"""The real ComfyUI that benchmarks of the nodes run in."""

import asyncio
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

PACK = Path(__file__).parents[1]


def folder() -> Path:
    """$COMFYUI_PATH or ~/comfy/ComfyUI, as in the tests; ends the process when it is not there."""
    found = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (found / "comfy" / "sd.py").is_file():
        sys.exit(f"There is no ComfyUI at {found}; set COMFYUI_PATH to the folder that holds custom_nodes.")
    return found


def enter(*flags: str) -> None:
    """Makes this process a ComfyUI with these flags, whose modules can be imported."""
    os.chdir(folder())
    sys.path.insert(0, str(folder()))
    sys.argv = [sys.argv[0], *flags]
    import comfy.options

    comfy.options.enable_args_parsing()


def load_pack() -> bool:
    """Has the entered ComfyUI load the pack as at any start; whether it could."""
    import nodes

    return asyncio.run(nodes.load_custom_node(str(PACK)))


def module(name: str) -> ModuleType:
    """A module of the loaded pack, such as "nodes.loaders"."""
    pack = str(PACK).replace(".", "_x_")  # as the host calls it
    return importlib.import_module(f"{pack}.{name}")
