"""What the nodes use of ComfyUI's node API, so that a later version of it is one line here."""

from comfy_api.latest import ComfyAPI, ComfyExtension, io, ui
from comfyui_version import __version__ as HOST_VERSION

__all__ = ["HOST_VERSION", "ComfyAPI", "ComfyExtension", "io", "ui"]
