"""The example workflows that run as they are, with the demo."""

from workflow_graph import Graph
from workflow_parts import (
    DEMO,
    DEMO_KV,
    DEMO_PHASED,
    WIDE,
    bucket,
    decode,
    encode,
    load_transformer,
    loaders,
    report,
    sample,
    sample_few_steps,
    save,
    show,
)


def demo_text_to_image() -> Graph:
    graph = Graph(
        "The demo model comes with the pack: press Run. It knows twelve colours, circles, squares, triangles "
        "and stars, sizes, places, backgrounds and two objects at once. It is a toy, not a preview of Σ."
    )
    loaders(graph)
    encode(graph, "a red square to the left of a blue star on a white background")
    bucket(graph)
    sample(graph)
    show(graph)
    report(graph)
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


def demo_four_steps() -> Graph:
    graph = Graph(
        "Four steps without guidance: the demo's transformer, distilled for it. Σ Few-Step Recipe gives the "
        "noise levels and the sampler, and cfg stays 1. Such weights of Σ run the same way."
    )
    loaders(graph, transformer=DEMO_PHASED)
    encode(graph, "a large orange star on a blue background")
    bucket(graph)
    sample_few_steps(graph, "phased-4")
    show(graph)
    return graph


def reuse_prompt_embeddings() -> Graph:
    graph = Graph(
        "Encode once, draw often: Save Σ Prompt Embeddings keeps what T5 made of two prompts, and Load Σ "
        "Prompt Embeddings draws from such a file without T5. Run it, press R, and choose the new file "
        "there; then Load Σ Text Encoder (T5), Σ Text Encode and Save Σ Prompt Embeddings can go."
    )
    loaders(graph)
    encode(graph, "a green star on a white background", column="Encode once")
    graph.add(
        "keep",
        "PixArtSigmaSaveEmbeddings",
        positive=graph["prompt", 0],
        negative=graph["prompt", 1],
        filename_prefix="prompt",
    )
    graph.column("Draw often")
    graph.add("words", "PixArtSigmaLoadEmbeddings", prompt_embeddings=DEMO)
    bucket(graph, column="Draw often")
    sample(graph, words="words")
    show(graph)
    return graph


def prompt_list() -> Graph:
    graph = Graph(
        "A picture for each line: Σ Encode Prompt List encodes all prompts with T5 loaded once, and ComfyUI "
        "runs what is behind it once for each. file takes the prompts from a file of the input folder."
    )
    loaders(graph)
    graph.column("Prompts and size")
    graph.add(
        "prompts",
        "PixArtSigmaEncodePromptList",
        clip=graph["t5", 0],
        prompts="a red circle in the middle\na large blue star\na green square below a white triangle",
        file="none",
        negative="",
        seed=0,
        clean_caption=False,
        after_use="free",
    )
    bucket(graph, column="Prompts and size")
    sample(graph, words="prompts", seed=graph["prompts", 2], after_use="keep")
    show(graph)
    return graph


def native_ksampler() -> Graph:
    graph = Graph(
        "Our loaders with ComfyUI's own nodes: CLIP Text Encode, KSampler and VAE Decode. Σ KV Compression "
        "makes any sampler faster on large pictures; up to 1024x1024 its auto changes nothing."
    )
    loaders(graph)
    graph.add("compression", "PixArtSigmaKVCompression", model=graph["transformer", 0], kv_compression="auto")
    graph.column("Prompts and size")
    graph.add("positive", "CLIPTextEncode", clip=graph["t5", 0], text="a yellow star on a purple background")
    graph.add("negative", "CLIPTextEncode", clip=graph["t5", 0], text="")
    bucket(graph, column="Prompts and size")
    graph.column("Denoise")
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
    graph.column("Picture")
    graph.add("decode", "VAEDecode", samples=graph["release", 0], vae=graph["vae", 0])
    save(graph)
    return graph


def native_custom_sampler() -> Graph:
    graph = Graph(
        "ComfyUI's SamplerCustom with the reference pipeline's own noise levels: dpmpp_2m on them gives what "
        "diffusers' PixArtSigmaPipeline gives."
    )
    loaders(graph)
    encode(graph, "a green triangle above a purple square on a white background")
    bucket(graph)
    graph.column("Noise levels")
    graph.add(
        "schedule", "PixArtSigmaReferenceSchedule", model=graph["transformer", 0], steps=20, denoise=1.0
    )
    graph.add("method", "KSamplerSelect", sampler_name="dpmpp_2m")
    graph.column("Denoise")
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
    encode(graph, "a red square on a white background", after_use="keep")
    bucket(graph)
    sample(graph, column="First picture", after_use="keep")
    decode(graph, graph["sampler", 0], size=None, name="first")
    graph.add("look", "PreviewImage", images=graph["first", 0])
    graph.column("New prompt")
    graph.add("latent", "VAEEncode", pixels=graph["first", 0], vae=graph["vae", 0])
    encode(graph, "a green star on a white background", name="words", column="New prompt")
    sample(graph, graph["latent", 0], "words", "again", "Draw again", seed=1, denoise=0.85)
    show(graph, graph["again", 0])
    return graph


def inpainting() -> Graph:
    graph = Graph(
        "Inpainting with ComfyUI's own mask nodes: only the right half is drawn anew. Paint a mask in Load "
        "Image's mask editor to do it to a picture of your own."
    )
    loaders(graph)
    encode(graph, "a blue square to the left of a red triangle on a white background", after_use="keep")
    bucket(graph)
    sample(graph, column="First picture", after_use="keep")
    graph.column("Mask")
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
    encode(
        graph,
        "a blue square to the left of a green star on a white background",
        name="words",
        column="New prompt",
    )
    sample(graph, graph["masked", 0], "words", "again", "Draw again", seed=2)
    show(graph, graph["again", 0])
    return graph


def aspect_ratio_tour() -> Graph:
    graph = Graph(
        "One prompt at three shapes. Σ Aspect-Ratio Bucket picks the trained size nearest to what is asked."
    )
    loaders(graph)
    encode(graph, "a large orange triangle on a black background")
    shapes = (("16:9", "landscape"), ("1:1", "landscape"), ("4:3", "portrait"))
    for number, (ratio, orientation) in enumerate(shapes):
        size, sampler, decoded = f"size{number}", f"sampler{number}", f"decode{number}"
        bucket(graph, ratio, orientation, name=size)
        sample(graph, graph[size, 0], name=sampler, after_use="keep")
        graph.column("Decode")
        decode(graph, graph[sampler, 0], size, decoded)
        graph.column("Pictures")
        save(graph, decoded, f"save{number}")
    return graph


def calibrate_kv_compression() -> Graph:
    graph = Graph(
        "Measures how much KV compression this model bears at this size, shows it, and draws with what was "
        "chosen. For Σ choose its files in the loaders, and turn save on: auto then uses the result, and "
        "this need not run again."
    )
    loaders(graph)
    bucket(graph, column="Calibrate")
    graph.add(
        "calibration",
        "PixArtSigmaCalibrateKVCompression",
        model=graph["transformer", 0],
        clip=graph["t5", 0],
        latent_image=graph["size", 0],
        prompts="a large yellow star on a blue background\na red square above a green triangle",
        error_percent=5.0,
        seed=0,
        steps=20,
        cfg=4.5,
        save=False,
    )
    graph.column("Plot and prompt", WIDE)
    graph.add("plot", "PreviewImage", images=graph["calibration", 1])
    encode(graph, "a yellow star on a blue background", column="Plot and prompt")
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
    bucket(graph, column="Compare")
    graph.add(
        "comparison",
        "PixArtSigmaCompareT5Precisions",
        text_encoder=DEMO,
        reference="bf16",
        precision="int8",
        prompts="a red square on a blue background\na small yellow star on a black background",
        seed=0,
        steps=20,
        cfg=4.5,
        device="auto",
        model=graph["transformer", 0],
        vae=graph["vae", 0],
        latent_image=graph["size", 0],
    )
    graph.column("Pictures and table", WIDE)
    save(graph, "comparison")
    graph.add("table", "PreviewAny", source=graph["comparison", 1])
    return graph


DEMO_WORKFLOWS = (
    demo_text_to_image,
    demo_kv_compression,
    demo_four_steps,
    reuse_prompt_embeddings,
    prompt_list,
    native_ksampler,
    native_custom_sampler,
    image_to_image,
    inpainting,
    aspect_ratio_tour,
    calibrate_kv_compression,
    compare_t5_precisions,
)
