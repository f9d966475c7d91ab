"""PixArt-Σ from a prompt to a picture, stage by stage.

Importing the package costs almost nothing: torch, diffusers and transformers are imported when a
public name is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The folder of the model that comes with the pack, that of its transformer trained with KV compression, and
# the file of the one distilled to four steps, in int8.
DEMO = Path(__file__).parent / "demo"
DEMO_KV = Path(__file__).parent / "demo_kv"
DEMO_PHASED = Path(__file__).parent / "demo_phased" / "demo_phased_4step.safetensors"
# By the names that a transformer can be given by.
BUILT_IN = {"demo": DEMO, "demo-kv": DEMO_KV, "demo-phased": DEMO_PHASED}

if TYPE_CHECKING:  # what is written out here for editors and type checkers is found at run time below
    from .adapter_files import AdapterFile
    from .aspect_ratio import pick_size
    from .errors import CheckpointError, SettingError, SigmaError
    from .pipeline import Result, SigmaPipeline
    from .planner import plan
    from .prompt_embeds import Prompts, pad_embeds
    from .sampling.denoise import denoise
    from .sampling.guidance import guide
    from .sampling.noise import get_noise
    from .settings import Settings, Ways
    from .text.cache import EmbeddingCache
    from .text.embeddings import PromptEmbeddings, encode
    from .text.encoder import TextEncoder, load_text_encoder
    from .transformer.checkpoint import inspect
    from .transformer.control_pictures import ControlPicture
    from .transformer.loading import load_transformer
    from .vae.loading import load_vae
    from .vae.stage import decode

_MODULE_OF = {
    "AdapterFile": "adapter_files",
    "CheckpointError": "errors",
    "ControlPicture": "transformer.control_pictures",
    "EmbeddingCache": "text.cache",
    "PromptEmbeddings": "text.embeddings",
    "Prompts": "prompt_embeds",
    "Result": "pipeline",
    "SettingError": "errors",
    "Settings": "settings",
    "SigmaError": "errors",
    "SigmaPipeline": "pipeline",
    "TextEncoder": "text.encoder",
    "Ways": "settings",
    "decode": "vae.stage",
    "denoise": "sampling.denoise",
    "encode": "text.embeddings",
    "get_noise": "sampling.noise",
    "guide": "sampling.guidance",
    "inspect": "transformer.checkpoint",
    "load_text_encoder": "text.encoder",
    "load_transformer": "transformer.loading",
    "load_vae": "vae.loading",
    "pad_embeds": "prompt_embeds",
    "pick_size": "aspect_ratio",
    "plan": "planner",
}

__all__ = [
    "AdapterFile",
    "CheckpointError",
    "ControlPicture",
    "DEMO",
    "DEMO_KV",
    "DEMO_PHASED",
    "EmbeddingCache",
    "PromptEmbeddings",
    "Prompts",
    "Result",
    "SettingError",
    "Settings",
    "SigmaError",
    "SigmaPipeline",
    "TextEncoder",
    "Ways",
    "__version__",
    "decode",
    "denoise",
    "encode",
    "get_noise",
    "guide",
    "inspect",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "pad_embeds",
    "pick_size",
    "plan",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
