"""Write example_workflows/*.json in the frontend's format, from the short descriptions below.

    python tools/build_workflows.py --object-info http://127.0.0.1:8188/object_info

Needs a running ComfyUI with this pack: which inputs a node has, and in which order, is asked of the host.
"""

import argparse
import json
import urllib.request
from pathlib import Path

DEMO = "demo (built in)"
DEMO_KV = "demo with KV compression (built in)"
PROMPT = "a red circle on a blue background"
REPOSITORY = Path(__file__).parents[1]
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, ROW, TOP = 380, 26, 90


class Graph:
    """Nodes by a name of their own; an input is a value, or `graph["name", output]`."""

    def __init__(self, note: str):
        self.note, self.nodes, self.models = note, {}, {}

    def add(self, name: str, kind: str, models=(), **inputs):
        self.nodes[name] = (kind, inputs)
        self.models[name] = list(models)

    def __getitem__(self, key: tuple[str, int]) -> "Link":
        return Link(*key)


class Link:
    def __init__(self, node: str, output: int):
        self.node, self.output = node, output


def loaders(
    graph: Graph,
    transformer=DEMO,
    text_encoder=DEMO,
    vae=DEMO,
    precision="fp32",
    variant="auto",
    models=(),
    device="auto",
):
    by_folder = {
        folder: [model for model in models if model["directory"] == folder]
        for folder in ("diffusion_models", "text_encoders", "vae")
    }
    graph.add(
        "transformer",
        "PixArtSigmaLoadTransformer",
        by_folder["diffusion_models"],
        transformer=transformer,
        variant=variant,
        dtype="auto",
    )
    graph.add(
        "t5",
        "PixArtSigmaLoadTextEncoder",
        by_folder["text_encoders"],
        text_encoder=text_encoder,
        precision=precision,
        device=device,
    )
    graph.add("vae", "PixArtSigmaLoadVAE", by_folder["vae"], vae=vae)


def encode(graph: Graph, prompt=PROMPT, after_use="free"):
    graph.add(
        "prompt",
        "PixArtSigmaTextEncode",
        clip=graph["t5", 0],
        positive=prompt,
        negative="",
        clean_caption=False,
        after_use=after_use,
    )


def bucket(graph: Graph, base="256", ratio="1:1", orientation="landscape", width=0, height=0, batch_size=1):
    graph.add(
        "size",
        "PixArtSigmaAspectRatioBucket",
        base=base,
        ratio=ratio,
        orientation=orientation,
        width=width,
        height=height,
        batch_size=batch_size,
    )


def sample(graph: Graph, latent=None, denoise=1.0, kv_compression="auto", after_use="free", words="prompt"):
    graph.add(
        "sampler",
        "PixArtSigmaSampler",
        model=graph["transformer", 0],
        positive=graph[words, 0],
        negative=graph[words, 1],
        latent_image=latent or graph["size", 0],
        seed=0,
        steps=20,
        cfg=4.5,
        sampler_name="dpmpp_2m",
        schedule="reference",
        denoise=denoise,
        kv_compression=kv_compression,
        after_use=after_use,
    )


def show(graph: Graph, latent=None, crop=True, tiling="auto", budget=0.0, prefix="PixArt-Sigma"):
    asked = (
        {"asked_width": graph["size", 3], "asked_height": graph["size", 4]}
        if crop
        else {"asked_width": 0, "asked_height": 0}
    )
    graph.add(
        "decode",
        "PixArtSigmaVAEDecode",
        samples=latent or graph["sampler", 0],
        vae=graph["vae", 0],
        tiling=tiling,
        **asked,
        after_use="keep",
        budget=budget,
    )
    graph.add("save", "SaveImage", images=graph["decode", 0], filename_prefix=prefix)


def report(graph: Graph, budget=0.0):
    """What each stage cost, against a budget in GB."""
    graph.add("report", "PixArtSigmaMemoryReport", after=graph["decode", 0], budget=budget)
    graph.add("bars", "PreviewImage", images=graph["report", 0])


def model(name: str, url: str, directory: str) -> dict:
    return {"name": name, "url": url, "directory": directory}


T5_PARTS = "Needs a T5-XXL, such as t5xxl_fp16.safetensors in models/text_encoders."
T5 = model(
    "t5xxl_fp16.safetensors",
    "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    "text_encoders",
)
SDXL_VAE = model(
    "sdxl_vae.safetensors",
    "https://huggingface.co/stabilityai/sdxl-vae/resolve/main/sdxl_vae.safetensors",
    "vae",
)


def sigma(size: str) -> dict:
    name = f"PixArt-Sigma-XL-2-{size}.pth"
    return model(
        name, f"https://huggingface.co/PixArt-alpha/PixArt-Sigma/resolve/main/{name}", "diffusion_models"
    )


def demo_text_to_image() -> Graph:
    graph = Graph(
        "The demo model comes with the pack: press Run. It knows twelve colours, circles, squares, triangles "
        "and stars, sizes, places, backgrounds and two objects at once. It is a toy, not a preview of Σ."
    )
    loaders(graph)
    encode(graph)
    bucket(graph)
    sample(graph)
    show(graph)
    report(graph)
    return graph


def sigma_1024_in_8_gb() -> Graph:
    graph = Graph(
        "Σ at 1024 px with T5 in 8 bit. Each model is released after its stage, so the largest one alone "
        "decides how much memory is needed. " + T5_PARTS
    )
    loaders(
        graph,
        sigma("1024-MS")["name"],
        T5["name"],
        SDXL_VAE["name"],
        "int8",
        models=(sigma("1024-MS"), T5, SDXL_VAE),
    )
    encode(graph, "a small cactus with a happy face in the desert")
    bucket(graph, "1024", "4:3")
    sample(graph)
    show(graph)
    report(graph, 8.0)
    return graph


def sigma_4_bit_t5() -> Graph:
    graph = Graph("Σ at 1024 px with T5 in 4 bit (nf4), for the smallest cards. " + T5_PARTS)
    loaders(
        graph,
        sigma("1024-MS")["name"],
        T5["name"],
        SDXL_VAE["name"],
        "nf4",
        models=(sigma("1024-MS"), T5, SDXL_VAE),
    )
    encode(graph, "a lighthouse above a stormy sea, oil painting")
    bucket(graph, "1024", "3:2", "portrait")
    sample(graph)
    show(graph)
    return graph


def sigma_2k() -> Graph:
    graph = Graph("Σ's 2K transformer, with its own sizes. " + T5_PARTS)
    loaders(
        graph,
        sigma("2K-MS")["name"],
        T5["name"],
        SDXL_VAE["name"],
        "int8",
        "2K",
        models=(sigma("2K-MS"), T5, SDXL_VAE),
    )
    encode(graph, "a street in an old town after rain, evening light")
    bucket(graph, "2048", "16:9")
    sample(graph)
    show(graph)
    return graph


def sigma_4k_kv_compression() -> Graph:
    graph = Graph(
        "4K with the 2K transformer. Keys and values of the deeper half of the layers are averaged over 2x2 "
        "tokens (mean:2:14-27): an approximation that public weights were not trained for. " + T5_PARTS
    )
    loaders(
        graph,
        sigma("2K-MS")["name"],
        T5["name"],
        SDXL_VAE["name"],
        "int8",
        "2K",
        models=(sigma("2K-MS"), T5, SDXL_VAE),
    )
    encode(graph, "a valley with a river seen from a mountain, morning mist")
    bucket(graph, "4096", "16:9")
    sample(graph, kv_compression="mean:2:14-27")
    show(graph)
    return graph


def within_a_budget(note: str, budget: float, size: str, prompt: str, base: str, ratio: str) -> Graph:
    """Σ with every setting that memory depends on from the planner."""
    graph = Graph(
        f"{note} VRAM Planner sets what memory depends on, its table says what for, and Memory "
        f"Report what it took. {T5_PARTS}"
    )
    bucket(graph, base, ratio)
    graph.add(
        "plan",
        "PixArtSigmaVRAMPlanner",
        budget=budget,
        width=graph["size", 1],
        height=graph["size", 2],
        batch_size=1,
    )
    graph.add("table", "PreviewAny", source=graph["plan", 5])
    loaders(
        graph,
        sigma(size)["name"],
        T5["name"],
        SDXL_VAE["name"],
        graph["plan", 0],
        "2K" if size == "2K-MS" else "auto",
        models=(sigma(size), T5, SDXL_VAE),
        device=graph["plan", 1],
    )
    encode(graph, prompt)
    sample(graph, kv_compression=graph["plan", 2])
    show(graph, tiling=graph["plan", 3], budget=graph["plan", 4])
    report(graph, budget)
    return graph


def sigma_under_4_gb() -> Graph:
    note, prompt = "Σ at 2048 px in 4 GB of graphics memory.", "a harbour at dawn, fishing boats, light fog"
    return within_a_budget(note, 4.0, "2K-MS", prompt, "2048", "3:2")


def sigma_under_2_gb() -> Graph:
    note, prompt = "Σ at 1024 px in 2 GB of graphics memory.", "a fox asleep in autumn leaves, watercolour"
    return within_a_budget(note, 2.0, "1024-MS", prompt, "1024", "1:1")


def sigma_4k_wallpaper() -> Graph:
    note = "A wallpaper of 4096 px class in 4 GB of graphics memory. It parks up to 9 GB in RAM."
    return within_a_budget(note, 4.0, "2K-MS", "dunes under a starry sky, long exposure", "4096", "16:9")


def calibrate_kv_compression() -> Graph:
    graph = Graph(
        "Measures how much KV compression this model bears at this size, shows it, and draws with what was "
        "chosen. For Σ choose its files in the loaders, 2048 in Aspect-Ratio Bucket, and turn save on: auto "
        "then uses the result, and this need not run again."
    )
    loaders(graph)
    bucket(graph)
    graph.add(
        "calibration",
        "PixArtSigmaCalibrateKVCompression",
        model=graph["transformer", 0],
        clip=graph["t5", 0],
        latent_image=graph["size", 0],
        prompts="a large yellow star on a blue background\na red circle above a green square",
        error_percent=5.0,
        seed=0,
        steps=20,
        cfg=4.5,
        save=False,
    )
    graph.add("plot", "PreviewImage", images=graph["calibration", 1])
    encode(graph)
    sample(graph, kv_compression=graph["calibration", 0])
    show(graph)
    return graph


def compare_t5_precisions() -> Graph:
    graph = Graph(
        "What T5 in 8 bit costs, before it is trusted: the same prompts in two precisions, how far each word "
        "moves, and both pictures with their difference. For Σ choose its files, its base in Aspect-Ratio "
        "Bucket, and prompts of your own; to compare the words alone, disconnect the model and the VAE."
    )
    graph.add("transformer", "PixArtSigmaLoadTransformer", transformer=DEMO, variant="auto", dtype="auto")
    graph.add("vae", "PixArtSigmaLoadVAE", vae=DEMO)
    bucket(graph)
    graph.add(
        "comparison",
        "PixArtSigmaCompareT5Precisions",
        text_encoder=DEMO,
        reference="bf16",
        precision="int8",
        prompts="a red circle on a blue background\na small yellow star on a black background",
        seed=0,
        steps=20,
        cfg=4.5,
        device="auto",
        model=graph["transformer", 0],
        vae=graph["vae", 0],
        latent_image=graph["size", 0],
    )
    graph.add("save", "SaveImage", images=graph["comparison", 0], filename_prefix="PixArt-Sigma")
    graph.add("table", "PreviewAny", source=graph["comparison", 1])
    return graph


def demo_kv_compression() -> Graph:
    graph = Graph(
        "A checkpoint that was trained with KV compression: auto uses it, with no setting. Set "
        "kv_compression to off and run again: these weights need it."
    )
    loaders(graph, transformer=DEMO_KV)
    encode(graph, "a large yellow triangle on a purple background")
    bucket(graph)
    sample(graph)
    show(graph)
    return graph


def reuse_prompt_embeddings() -> Graph:
    graph = Graph(
        "Encode once, draw often: Save Prompt Embeddings keeps what T5 made of two prompts, and Load Prompt "
        "Embeddings draws from such a file without T5. Run it, press R, and choose the new file there; then "
        "Load T5, Σ Text Encode and Save Prompt Embeddings can go."
    )
    loaders(graph)
    encode(graph, "a large green star on a white background")
    graph.add(
        "keep",
        "PixArtSigmaSaveEmbeddings",
        positive=graph["prompt", 0],
        negative=graph["prompt", 1],
        filename_prefix="prompt",
    )
    graph.add("words", "PixArtSigmaLoadEmbeddings", prompt_embeddings=DEMO)
    bucket(graph)
    sample(graph, words="words")
    show(graph)
    return graph


def native_ksampler() -> Graph:
    graph = Graph(
        "Our loaders with ComfyUI's own nodes: CLIP Text Encode, KSampler and VAE Decode. KV Compression "
        "makes any sampler faster on large pictures; up to 1024x1024 its auto changes nothing."
    )
    loaders(graph)
    graph.add("compression", "PixArtSigmaKVCompression", model=graph["transformer", 0], kv_compression="auto")
    bucket(graph)
    graph.add("positive", "CLIPTextEncode", clip=graph["t5", 0], text="a yellow star on a purple background")
    graph.add("negative", "CLIPTextEncode", clip=graph["t5", 0], text="")
    graph.add(
        "sampler",
        "KSampler",
        model=graph["compression", 0],
        positive=graph["positive", 0],
        negative=graph["negative", 0],
        latent_image=graph["size", 0],
        seed=0,
        steps=20,
        cfg=4.5,
        sampler_name="dpmpp_2m",
        scheduler="normal",
        denoise=1.0,
    )
    graph.add(
        "release",
        "PixArtSigmaReleaseModel",
        after=graph["sampler", 0],
        model=graph["transformer", 0],
        mode="offload",
    )
    graph.add("decode", "VAEDecode", samples=graph["release", 0], vae=graph["vae", 0])
    graph.add("save", "SaveImage", images=graph["decode", 0], filename_prefix="PixArt-Sigma")
    return graph


def native_custom_sampler() -> Graph:
    graph = Graph(
        "ComfyUI's SamplerCustom with the reference pipeline's own noise levels: dpmpp_2m on them gives what "
        "diffusers' PixArtSigmaPipeline gives."
    )
    loaders(graph)
    encode(graph, "a white triangle above a purple circle on a green background")
    bucket(graph)
    graph.add(
        "schedule", "PixArtSigmaReferenceSchedule", model=graph["transformer", 0], steps=20, denoise=1.0
    )
    graph.add("method", "KSamplerSelect", sampler_name="dpmpp_2m")
    graph.add(
        "sampler",
        "SamplerCustom",
        model=graph["transformer", 0],
        add_noise=True,
        noise_seed=0,
        cfg=4.5,
        positive=graph["prompt", 0],
        negative=graph["prompt", 1],
        sampler=graph["method", 0],
        sigmas=graph["schedule", 0],
        latent_image=graph["size", 0],
    )
    show(graph)
    return graph


def image_to_image() -> Graph:
    graph = Graph(
        "Image to image: a picture is drawn first, then drawn again from its latents with other words. Put "
        "Load Image and VAE Encode in place of the first picture to start from one of your own."
    )
    loaders(graph)
    encode(graph, "a red circle on a white background", after_use="keep")
    bucket(graph)
    sample(graph, after_use="keep")
    graph.add(
        "first",
        "PixArtSigmaVAEDecode",
        samples=graph["sampler", 0],
        vae=graph["vae", 0],
        tiling="auto",
        asked_width=0,
        asked_height=0,
        after_use="keep",
        budget=0.0,
    )
    graph.add("look", "PreviewImage", images=graph["first", 0])
    graph.add("latent", "VAEEncode", pixels=graph["first", 0], vae=graph["vae", 0])
    graph.add(
        "words",
        "PixArtSigmaTextEncode",
        clip=graph["t5", 0],
        positive="a green circle on a white background",
        negative="",
        clean_caption=False,
        after_use="free",
    )
    graph.add(
        "again",
        "PixArtSigmaSampler",
        model=graph["transformer", 0],
        positive=graph["words", 0],
        negative=graph["words", 1],
        latent_image=graph["latent", 0],
        seed=1,
        steps=20,
        cfg=4.5,
        sampler_name="dpmpp_2m",
        schedule="reference",
        denoise=0.85,
        kv_compression="auto",
        after_use="free",
    )
    show(graph, graph["again", 0])
    return graph


def inpainting() -> Graph:
    graph = Graph(
        "Inpainting with ComfyUI's own mask nodes: only the right half is drawn anew. Paint a mask in Load "
        "Image's mask editor to do it to a picture of your own."
    )
    loaders(graph)
    encode(graph, "a blue square to the left of a red circle on a white background", after_use="keep")
    bucket(graph)
    sample(graph, after_use="keep")
    graph.add("empty", "SolidMask", value=0.0, width=256, height=256)
    graph.add("half", "SolidMask", value=1.0, width=128, height=256)
    graph.add(
        "mask",
        "MaskComposite",
        destination=graph["empty", 0],
        source=graph["half", 0],
        x=128,
        y=0,
        operation="add",
    )
    graph.add("masked", "SetLatentNoiseMask", samples=graph["sampler", 0], mask=graph["mask", 0])
    graph.add(
        "words",
        "PixArtSigmaTextEncode",
        clip=graph["t5", 0],
        positive="a blue square to the left of a green star on a white background",
        negative="",
        clean_caption=False,
        after_use="free",
    )
    graph.add(
        "again",
        "PixArtSigmaSampler",
        model=graph["transformer", 0],
        positive=graph["words", 0],
        negative=graph["words", 1],
        latent_image=graph["masked", 0],
        seed=2,
        steps=20,
        cfg=4.5,
        sampler_name="dpmpp_2m",
        schedule="reference",
        denoise=1.0,
        kv_compression="auto",
        after_use="free",
    )
    show(graph, graph["again", 0])
    return graph


def aspect_ratio_tour() -> Graph:
    graph = Graph(
        "One prompt at three shapes. Aspect-Ratio Bucket picks the trained size nearest to what is asked."
    )
    loaders(graph)
    encode(graph, "a large orange star on a black background")
    for number, (ratio, orientation) in enumerate(
        (("16:9", "landscape"), ("1:1", "landscape"), ("4:3", "portrait"))
    ):
        size, sampler, decode = f"size{number}", f"sampler{number}", f"decode{number}"
        graph.add(
            size,
            "PixArtSigmaAspectRatioBucket",
            base="256",
            ratio=ratio,
            orientation=orientation,
            width=0,
            height=0,
            batch_size=1,
        )
        graph.add(
            sampler,
            "PixArtSigmaSampler",
            model=graph["transformer", 0],
            positive=graph["prompt", 0],
            negative=graph["prompt", 1],
            latent_image=graph[size, 0],
            seed=0,
            steps=20,
            cfg=4.5,
            sampler_name="dpmpp_2m",
            schedule="reference",
            denoise=1.0,
            kv_compression="auto",
            after_use="keep",
        )
        graph.add(
            decode,
            "PixArtSigmaVAEDecode",
            samples=graph[sampler, 0],
            vae=graph["vae", 0],
            tiling="auto",
            asked_width=graph[size, 3],
            asked_height=graph[size, 4],
            after_use="keep",
            budget=0.0,
        )
        graph.add(f"save{number}", "SaveImage", images=graph[decode, 0], filename_prefix="PixArt-Sigma")
    return graph


WORKFLOWS = (
    demo_text_to_image,
    demo_kv_compression,
    reuse_prompt_embeddings,
    native_ksampler,
    native_custom_sampler,
    image_to_image,
    inpainting,
    aspect_ratio_tour,
    sigma_1024_in_8_gb,
    sigma_4_bit_t5,
    sigma_2k,
    sigma_4k_kv_compression,
    sigma_under_4_gb,
    sigma_under_2_gb,
    sigma_4k_wallpaper,
    calibrate_kv_compression,
    compare_t5_precisions,
)


def to_frontend(graph: Graph, object_info: dict) -> dict:
    """The graph in the format that the frontend saves, laid out from left to right."""
    numbers = {name: number for number, name in enumerate(graph.nodes, start=1)}
    depth: dict[str, int] = {}
    for name, (_, inputs) in graph.nodes.items():
        before = [depth[value.node] for value in inputs.values() if isinstance(value, Link)]
        depth[name] = max(before, default=-1) + 1
    nodes, links, next_row = [], [], {}
    for name, (kind, inputs) in graph.nodes.items():
        node = _node(kind, inputs, object_info[kind])
        node["id"], node["order"] = numbers[name], numbers[name] - 1
        node["pos"] = [COLUMN * depth[name], TOP + next_row.get(depth[name], 0)]
        next_row[depth[name]] = next_row.get(depth[name], 0) + node["size"][1] + 60
        if graph.models[name]:
            node["properties"]["models"] = graph.models[name]
        for slot, entry in enumerate(node["inputs"]):
            value = inputs[entry["name"]]
            links.append(
                [len(links) + 1, numbers[value.node], value.output, numbers[name], slot, entry["type"]]
            )
            entry["link"] = len(links)
        nodes.append(node)
    for number, origin, output, *_ in links:
        nodes[origin - 1]["outputs"][output]["links"].append(number)
    note = {
        "id": len(nodes) + 1,
        "type": "MarkdownNote",
        "pos": [0, TOP - 220],
        "size": [720, 140],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [graph.note],
    }
    return {
        "last_node_id": len(nodes) + 1,
        "last_link_id": len(links),
        "nodes": [*nodes, note],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(kind: str, inputs: dict, info: dict) -> dict:
    sockets, widgets, given = [], [], dict(inputs)
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            declared, *options = info["input"][part][name]
            options = options[0] if options else {}
            is_widget = isinstance(declared, list) or declared in WIDGETS
            value = given.pop(name, options.get("default"))
            linked = isinstance(value, Link)
            if linked:
                socket = {"name": name, "type": "COMBO" if isinstance(declared, list) else declared}
                sockets.append(socket | ({"widget": {"name": name}} if is_widget else {}))
            if is_widget:
                widgets.append(options.get("default") if linked else value)
                if options.get("control_after_generate"):
                    widgets.append("fixed")
    if given:
        raise ValueError(f"{kind} has no input {', '.join(given)}.")
    outputs = [
        {"name": name, "type": "*" if isinstance(declared, list) else declared, "links": []}
        for name, declared in zip(info["output_name"], info["output"], strict=True)
    ]
    texts = sum("\n" in str(value) or len(str(value)) > 24 for value in widgets)
    height = ROW * (len(sockets) + len(widgets)) + 40 + 90 * texts
    if kind in ("SaveImage", "PreviewImage"):
        height += 260
    return {
        "type": kind,
        "size": [320, height],
        "flags": {},
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "properties": {"Node name for S&R": kind},
        "widgets_values": widgets,
    }


def read_object_info(place: str) -> dict:
    """What the host says about its nodes, from its address or from a file."""
    if not place.startswith("http"):
        return json.loads(Path(place).read_text(encoding="utf-8"))
    with urllib.request.urlopen(place) as answer:
        return json.load(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--object-info", required=True, help="address of the host's /object_info, or a file")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "example_workflows")
    arguments = parser.parse_args()
    object_info = read_object_info(arguments.object_info)
    arguments.out.mkdir(exist_ok=True)
    for build in WORKFLOWS:
        text = json.dumps(to_frontend(build(), object_info), indent=1, ensure_ascii=False)
        (arguments.out / f"{build.__name__}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
