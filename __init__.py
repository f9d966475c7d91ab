"""The PixArt-Sigma node pack, as ComfyUI finds it. Nothing is imported until the host asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import SigmaExtension

    return SigmaExtension()
