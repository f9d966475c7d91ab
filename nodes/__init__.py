"""The nodes, in the order in which a picture passes them."""

from .host.api import HOST_VERSION, ComfyExtension

OLDEST_HOST = (0, 26)


class SigmaExtension(ComfyExtension):
    async def on_load(self):
        from .host.mapping import obey_host
        from .host.replacements import register

        obey_host()
        await register()

    async def get_node_list(self):
        version = tuple(int(part) for part in HOST_VERSION.split(".")[:2])
        if version < OLDEST_HOST:
            raise RuntimeError(
                f"The PixArt-Sigma nodes need ComfyUI 0.26 or newer, and this is {HOST_VERSION}. "
                "Update ComfyUI."
            )
        from . import (
            calibration,
            decode,
            embeddings,
            few_step,
            kv_compression,
            loaders,
            lora,
            memory,
            old_graphs,
            planner,
            precision_comparison,
            sampling,
            size,
            speed,
            text,
        )

        modules = (
            planner,
            loaders,
            lora,
            text,
            embeddings,
            precision_comparison,
            size,
            kv_compression,
            speed,
            calibration,
            sampling,
            few_step,
            decode,
            memory,
            old_graphs,
        )
        return [node for module in modules for node in module.NODES]
