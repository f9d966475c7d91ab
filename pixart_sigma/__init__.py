"""PixArt-Σ from a prompt to a picture, stage by stage.

Importing the package costs almost nothing: torch, diffusers and transformers are imported when a
public name is first used.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# The folder of the model that comes with the pack, and that of its transformer trained with KV compression.
DEMO = Path(__file__).parent / "demo"
DEMO_KV = Path(__file__).parent / "demo_kv"

_MODULE_OF = {
    "SigmaError": "errors",
    "inspect": "transformer.checkpoint",
    "load_transformer": "transformer.loading",
    "TextEncoder": "text.encoder",
    "load_vae": "vae.coding",
    "decode": "vae.coding",
    "denoise": "sampling.denoise",
    "SigmaPipeline": "pipeline",
    "pick_size": "aspect_ratio",
}

__all__ = ["DEMO", "DEMO_KV", "__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
