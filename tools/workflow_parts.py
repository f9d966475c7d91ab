"""The groups of nodes that the example workflows are made of."""

from workflow_graph import Graph, Link, download

# Of a column with tables, plots or bars, which have small letters.
WIDE = 560
DEMO = "demo (built in)"
DEMO_KV = "demo with KV compression (built in)"
DEMO_PHASED = "demo for four steps (built in)"
T5_PARTS = "Needs a T5-XXL, such as t5xxl_fp16.safetensors in models/text_encoders."
T5 = download(
    "t5xxl_fp16.safetensors",
    "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    "text_encoders",
)
SDXL_VAE = download(
    "sdxl_vae.safetensors",
    "https://huggingface.co/stabilityai/sdxl-vae/resolve/main/sdxl_vae.safetensors",
    "vae",
)


def loaders(graph: Graph, transformer=DEMO):
    load_transformer(graph, transformer)
    load_t5_and_vae(graph)


def sigma_loaders(graph: Graph, size: str, precision="int8"):
    """Sigma's own files; `size` as in the transformer's name."""
    load_sigma_transformer(graph, size)
    load_t5_and_vae(graph, T5, SDXL_VAE, precision)


def load_sigma_transformer(graph: Graph, size: str):
    name = f"PixArt-Sigma-XL-2-{size}.pth"
    address = f"https://huggingface.co/PixArt-alpha/PixArt-Sigma/resolve/main/{name}"
    variant = "2K" if size == "2K-MS" else "auto"
    load_transformer(graph, download(name, address, "diffusion_models"), variant)


def load_transformer(graph: Graph, transformer, variant="auto"):
    graph.column("Models")
    graph.add(
        "transformer", "PixArtSigmaLoadTransformer", transformer=transformer, variant=variant, dtype="auto"
    )


def load_t5_and_vae(
    graph: Graph, text_encoder=DEMO, vae=DEMO, precision="fp32", device="auto", column="Models"
):
    graph.column(column)
    graph.add(
        "t5", "PixArtSigmaLoadTextEncoder", text_encoder=text_encoder, precision=precision, device=device
    )
    graph.add("vae", "PixArtSigmaLoadVAE", vae=vae)


def encode(graph: Graph, prompt: str, after_use="free", name="prompt", column="Prompt and size"):
    graph.column(column)
    graph.add(
        name,
        "PixArtSigmaTextEncode",
        clip=graph["t5", 0],
        positive=prompt,
        negative="",
        clean_caption=False,
        after_use=after_use,
    )


def bucket(
    graph: Graph, ratio="1:1", orientation="landscape", base="auto", name="size", column="Prompt and size"
):
    """An empty latent of the transformer's own size, or of another base."""
    graph.column(column)
    graph.add(
        name,
        "PixArtSigmaAspectRatioBucket",
        base=base,
        ratio=ratio,
        orientation=orientation,
        width=0,
        height=0,
        batch_size=1,
        **({"model": graph["transformer", 0]} if base == "auto" else {}),
    )


def sample(
    graph: Graph,
    latent: Link | None = None,
    words="prompt",
    name="sampler",
    column="Denoise",
    model: Link | None = None,
    **settings,
):
    graph.column(column)
    defaults = {
        "seed": 0,
        "steps": 20,
        "cfg": 4.5,
        "sampler_name": "dpmpp_2m",
        "schedule": "reference",
        "denoise": 1.0,
        "kv_compression": "auto",
        "after_use": "free",
    }
    graph.add(
        name,
        "PixArtSigmaSampler",
        model=model or graph["transformer", 0],
        positive=graph[words, 0],
        negative=graph[words, 1],
        latent_image=latent or graph["size", 0],
        **defaults | settings,
    )


def sample_few_steps(graph: Graph, recipe: str):
    """Distilled weights by a recipe, without guidance."""
    graph.column("Denoise")
    graph.add(
        "recipe",
        "PixArtSigmaFewStepRecipe",
        model=graph["transformer", 0],
        recipe=recipe,
        denoise=1.0,
        custom_recipe="",
    )
    graph.add(
        "sampler",
        "SamplerCustom",
        model=graph["transformer", 0],
        add_noise=True,
        noise_seed=0,
        cfg=1.0,
        positive=graph["prompt", 0],
        negative=graph["prompt", 1],
        sampler=graph["recipe", 1],
        sigmas=graph["recipe", 0],
        latent_image=graph["size", 0],
    )


def decode(graph: Graph, latent: Link, size: str | None = "size", name="decode", tiling="auto", budget=0.0):
    """`size` is the node whose asked size the picture is cropped to."""
    graph.add(
        name,
        "PixArtSigmaVAEDecode",
        samples=latent,
        vae=graph["vae", 0],
        tiling=tiling,
        asked_width=graph[size, 3] if size else 0,
        asked_height=graph[size, 4] if size else 0,
        after_use="keep",
        budget=budget,
    )


def save(graph: Graph, images="decode", name="save"):
    graph.add(name, "SaveImage", images=graph[images, 0], filename_prefix="PixArt-Sigma")


def show(graph: Graph, latent: Link | None = None, **settings):
    graph.column("Picture")
    decode(graph, latent or graph["sampler", 0], **settings)
    save(graph)


def report(graph: Graph, budget=0.0):
    """What each stage cost, against a budget in GB."""
    graph.column("Memory", WIDE)
    graph.add("report", "PixArtSigmaMemoryReport", after=graph["decode", 0], budget=budget)
    graph.add("bars", "PreviewImage", images=graph["report", 0])
