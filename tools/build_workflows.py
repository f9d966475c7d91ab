"""Write example_workflows/*.json in the frontend's format, from the short descriptions below.

    python tools/build_workflows.py --object-info http://127.0.0.1:8188/object_info

Needs a running ComfyUI with this pack: which inputs a node has, and in which order, is asked of the host.
"""

import argparse
import json
import urllib.request
from pathlib import Path

from workflow_graph import Graph, to_frontend
from workflow_parts import (
    DEMO,
    DEMO_KV,
    SDXL_VAE,
    T5,
    T5_PARTS,
    bucket,
    decode,
    encode,
    load_sigma_transformer,
    load_t5_and_vae,
    load_transformer,
    loaders,
    report,
    sample,
    save,
    show,
    sigma_loaders,
)

REPOSITORY = Path(__file__).parents[1]


def demo_text_to_image() -> Graph:
    graph = Graph(
        "The demo model comes with the pack: press Run. It knows twelve colours, circles, squares, triangles "
        "and stars, sizes, places, backgrounds and two objects at once. It is a toy, not a preview of Σ."
    )
    loaders(graph)
    encode(graph, "a red circle on a blue background")
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
    sigma_loaders(graph, "1024-MS")
    encode(graph, "a small cactus with a happy face in the desert")
    bucket(graph, "4:3")
    sample(graph)
    show(graph)
    report(graph, 8.0)
    return graph


def sigma_4_bit_t5() -> Graph:
    graph = Graph("Σ at 1024 px with T5 in 4 bit (nf4), for the smallest cards. " + T5_PARTS)
    sigma_loaders(graph, "1024-MS", "nf4")
    encode(graph, "a lighthouse above a stormy sea, oil painting")
    bucket(graph, "3:2", "portrait")
    sample(graph)
    show(graph)
    return graph


def sigma_2k() -> Graph:
    graph = Graph("Σ's 2K transformer, with its own sizes. " + T5_PARTS)
    sigma_loaders(graph, "2K-MS")
    encode(graph, "a street in an old town after rain, evening light")
    bucket(graph, "16:9")
    sample(graph)
    show(graph)
    return graph


def sigma_4k_kv_compression() -> Graph:
    graph = Graph(
        "4K with the 2K transformer. Keys and values of the deeper half of the layers are averaged over 2x2 "
        "tokens (deep half): an approximation that public weights were not trained for. " + T5_PARTS
    )
    sigma_loaders(graph, "2K-MS")
    encode(graph, "a valley with a river seen from a mountain, morning mist")
    bucket(graph, "16:9", base="4096")
    sample(graph, kv_compression="deep half")
    show(graph)
    return graph


def within_a_budget(note: str, budget: float, size: str, prompt: str, ratio: str, base="auto") -> Graph:
    """Σ with every setting that memory depends on from the planner."""
    graph = Graph(
        f"{note} Σ VRAM Planner sets what memory depends on, its table says what for, and Σ Memory "
        f"Report what it took. {T5_PARTS}"
    )
    load_sigma_transformer(graph, size)
    bucket(graph, ratio, base=base)
    graph.add(
        "plan",
        "PixArtSigmaVRAMPlanner",
        budget=budget,
        width=graph["size", 1],
        height=graph["size", 2],
        batch_size=1,
    )
    graph.add("table", "PreviewAny", source=graph["plan", 5])
    load_t5_and_vae(graph, T5, SDXL_VAE, graph["plan", 0], graph["plan", 1])
    encode(graph, prompt)
    sample(graph, kv_compression=graph["plan", 2])
    show(graph, tiling=graph["plan", 3], budget=graph["plan", 4])
    report(graph, budget)
    return graph


def sigma_under_4_gb() -> Graph:
    note, prompt = "Σ at 2048 px in 4 GB of graphics memory.", "a harbour at dawn, fishing boats, light fog"
    return within_a_budget(note, 4.0, "2K-MS", prompt, "3:2")


def sigma_under_2_gb() -> Graph:
    note, prompt = "Σ at 1024 px in 2 GB of graphics memory.", "a fox asleep in autumn leaves, watercolour"
    return within_a_budget(note, 2.0, "1024-MS", prompt, "1:1")


def sigma_4k_wallpaper() -> Graph:
    note = "A wallpaper of 4096 px class in 4 GB of graphics memory. It parks up to 9 GB in RAM."
    return within_a_budget(note, 4.0, "2K-MS", "dunes under a starry sky, long exposure", "16:9", "4096")


def calibrate_kv_compression() -> Graph:
    graph = Graph(
        "Measures how much KV compression this model bears at this size, shows it, and draws with what was "
        "chosen. For Σ choose its files in the loaders, and turn save on: auto then uses the result, and "
        "this need not run again."
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
    encode(graph, "a red circle on a blue background")
    sample(graph, kv_compression=graph["calibration", 0])
    show(graph)
    return graph


def compare_t5_precisions() -> Graph:
    graph = Graph(
        "What T5 in 8 bit costs, before it is trusted: the same prompts in two precisions, how far each word "
        "moves, and both pictures with their difference. For Σ choose its files, and prompts of your own; to "
        "compare the words alone, disconnect the model and the VAE."
    )
    load_transformer(graph, DEMO)
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
    save(graph, "comparison")
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
        "Encode once, draw often: Save Σ Prompt Embeddings keeps what T5 made of two prompts, and Load Σ "
        "Prompt Embeddings draws from such a file without T5. Run it, press R, and choose the new file "
        "there; then Load Σ Text Encoder (T5), Σ Text Encode and Save Σ Prompt Embeddings can go."
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
    save(graph)
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
    decode(graph, graph["sampler", 0], size=None, name="first")
    graph.add("look", "PreviewImage", images=graph["first", 0])
    graph.add("latent", "VAEEncode", pixels=graph["first", 0], vae=graph["vae", 0])
    encode(graph, "a green circle on a white background", name="words")
    sample(graph, graph["latent", 0], "words", "again", seed=1, denoise=0.85)
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
    encode(graph, "a blue square to the left of a green star on a white background", name="words")
    sample(graph, graph["masked", 0], "words", "again", seed=2)
    show(graph, graph["again", 0])
    return graph


def aspect_ratio_tour() -> Graph:
    graph = Graph(
        "One prompt at three shapes. Σ Aspect-Ratio Bucket picks the trained size nearest to what is asked."
    )
    loaders(graph)
    encode(graph, "a large orange star on a black background")
    shapes = (("16:9", "landscape"), ("1:1", "landscape"), ("4:3", "portrait"))
    for number, (ratio, orientation) in enumerate(shapes):
        size, sampler, decoded = f"size{number}", f"sampler{number}", f"decode{number}"
        bucket(graph, ratio, orientation, name=size)
        sample(graph, graph[size, 0], name=sampler, after_use="keep")
        decode(graph, graph[sampler, 0], size, decoded)
        save(graph, decoded, f"save{number}")
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


def build(object_info: dict) -> dict[str, str]:
    """The text of each file by its name, from what the host says about its nodes."""
    texts = {}
    for workflow in WORKFLOWS:
        saved = to_frontend(workflow(), object_info)
        texts[f"{workflow.__name__}.json"] = json.dumps(saved, indent=1, ensure_ascii=False) + "\n"
    return texts


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
    arguments.out.mkdir(exist_ok=True)
    for name, text in build(read_object_info(arguments.object_info)).items():
        (arguments.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
