"""The example workflows for Sigma's own weights, which the frontend offers to fetch."""

from workflow_graph import Graph
from workflow_parts import (
    SDXL_VAE,
    T5,
    T5_PARTS,
    WIDE,
    bucket,
    encode,
    load_sigma_transformer,
    load_t5_and_vae,
    load_transformer,
    report,
    sample,
    sample_few_steps,
    show,
    sigma_loaders,
)


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


def fast_1024() -> Graph:
    graph = Graph(
        "Σ at 1024 px in little more than half the time: Σ Speed has every other step forecast from those "
        "before, or what was measured for the checkpoint. It acts on KSampler and any other sampler. "
        + T5_PARTS
    )
    sigma_loaders(graph, "1024-MS")
    graph.add("speed", "PixArtSigmaSpeed", model=graph["transformer", 0], speed="auto")
    encode(graph, "a paper boat on a calm lake at sunrise")
    bucket(graph, "1:1")
    graph.column("Denoise")
    graph.add(
        "sampler",
        "KSampler",
        model=graph["speed", 0],
        positive=graph["prompt", 0],
        negative=graph["prompt", 1],
        latent_image=graph["size", 0],
        seed=0,
        steps=20,
        cfg=4.5,
        sampler_name="dpmpp_2m",
        scheduler="normal",
        denoise=1.0,
    )
    show(graph)
    return graph


def sigma_2k() -> Graph:
    graph = Graph("Σ's 2K transformer, with its own sizes, and steps that are forecast. " + T5_PARTS)
    sigma_loaders(graph, "2K-MS")
    encode(graph, "a street in an old town after rain, evening light")
    bucket(graph, "16:9")
    sample(graph, speed="auto")
    show(graph)
    return graph


def sigma_4k_kv_compression() -> Graph:
    graph = Graph(
        "4K with the 2K transformer. Keys and values of the deeper half of the layers are averaged over 2x2 "
        "tokens (deep half): an approximation that public weights were not trained for. Steps are forecast "
        "(speed auto). " + T5_PARTS
    )
    sigma_loaders(graph, "2K-MS")
    encode(graph, "a valley with a river seen from a mountain, morning mist")
    bucket(graph, "16:9", base="4096")
    sample(graph, kv_compression="deep half", speed="auto")
    show(graph)
    return graph


def sigma_few_step() -> Graph:
    graph = Graph(
        "One step, for weights that were distilled for it: pixart-sigma-nitro.safetensors of "
        "amd/Nitro-1-PixArt on Hugging Face, in models/diffusion_models. Σ Few-Step Recipe gives the noise "
        "levels and the sampler; cfg stays 1. For other distilled weights choose their recipe there. "
        + T5_PARTS
    )
    load_transformer(graph, "pixart-sigma-nitro.safetensors", variant="1024")
    load_t5_and_vae(graph, T5, SDXL_VAE, "int8")
    encode(graph, "a hummingbird at a red flower, macro photograph")
    bucket(graph, "1:1")
    sample_few_steps(graph, "one-step")
    show(graph)
    return graph


def sigma_controlnet() -> Graph:
    graph = Graph(
        "A picture that follows the edges of another. Put a ControlNet of PixArt into models/controlnet, "
        "such as SimpleTuner trains it for Σ, choose it in Load Σ ControlNet, and give pictures of the kind "
        "that it was trained on: Canny stands for that here. Lower strength or end_percent for more "
        "freedom. " + T5_PARTS
    )
    sigma_loaders(graph, "1024-MS")
    graph.add("controlnet", "PixArtSigmaLoadControlNet", control_net="pixart-sigma-controlnet")
    encode(graph, "a lighthouse on a cliff at dusk, oil painting")
    bucket(graph, "1:1")
    graph.column("What it follows")
    graph.add("picture", "LoadImage", image="example.png")
    graph.add("edges", "Canny", image=graph["picture", 0], low_threshold=0.4, high_threshold=0.8)
    graph.add("look", "PreviewImage", images=graph["edges", 0])
    graph.add(
        "control",
        "ControlNetApplyAdvanced",
        positive=graph["prompt", 0],
        negative=graph["prompt", 1],
        control_net=graph["controlnet", 0],
        image=graph["edges", 0],
        vae=graph["vae", 0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    sample(graph, words="control")
    show(graph)
    return graph


def sigma_lora() -> Graph:
    graph = Graph(
        "Σ with a LoRA. Put one that was trained for PixArt-Σ into models/loras, a file or PEFT's folder, "
        "and choose it in Load Σ LoRA. More of them, also by ComfyUI's Load LoRA, may stand behind it. "
        + T5_PARTS
    )
    sigma_loaders(graph, "1024-MS")
    graph.add(
        "lora",
        "PixArtSigmaLoadLoRA",
        model=graph["transformer", 0],
        lora="pixart-sigma-lora",
        strength_model=0.8,
        strength_clip=1.0,
    )
    encode(graph, "a mountain village in winter, ink on paper")
    bucket(graph, "1:1")
    sample(graph, model=graph["lora", 0])
    show(graph)
    return graph


def sigma_two_stage() -> Graph:
    graph = Graph(
        "Two transformers in a row, as the 900M finetunes are made: the first does 80 % of the steps, the "
        "second the rest, from the same noise, with the same prompts. Put their folders into "
        "models/diffusion_models (terminusresearch/pixart-900m-1024-ft-v0.7-stage1 and -stage2 on Hugging "
        "Face). For other steps set SplitSigmas to 80 % of them. " + T5_PARTS
    )
    load_transformer(graph, "pixart-900m-1024-ft-v0.7-stage1", variant="1024")
    graph.add(
        "refiner",
        "PixArtSigmaLoadTransformer",
        transformer="pixart-900m-1024-ft-v0.7-stage2",
        variant="1024",
        dtype="auto",
    )
    load_t5_and_vae(graph, T5, SDXL_VAE, "int8")
    encode(graph, "a glass of water with a slice of lemon on a wooden table")
    bucket(graph, "1:1")
    graph.column("Noise levels")
    graph.add(
        "schedule", "PixArtSigmaReferenceSchedule", model=graph["transformer", 0], steps=20, denoise=1.0
    )
    graph.add("split", "SplitSigmas", sigmas=graph["schedule", 0], step=16)
    graph.add("solver", "KSamplerSelect", sampler_name="dpmpp_2m")
    for name, model, latent, sigmas in (
        ("first", "transformer", graph["size", 0], 0),
        ("second", "refiner", graph["first", 0], 1),
    ):
        graph.column(f"Denoise, {name} model")
        graph.add(
            name,
            "SamplerCustom",
            model=graph[model, 0],
            add_noise=name == "first",
            noise_seed=0,
            cfg=4.5,
            positive=graph["prompt", 0],
            negative=graph["prompt", 1],
            sampler=graph["solver", 0],
            sigmas=graph["split", sigmas],
            latent_image=latent,
        )
    show(graph, graph["second", 0])
    return graph


def within_a_budget(
    note: str, budget: float, size: str, prompt: str, ratio: str, base="auto", speed="off"
) -> Graph:
    """Σ with every setting that memory depends on from the planner."""
    graph = Graph(
        f"{note} Σ VRAM Planner sets what memory depends on, its table says what for, and Σ Memory "
        f"Report what it took. {T5_PARTS}"
    )
    load_sigma_transformer(graph, size)
    bucket(graph, ratio, base=base, column="Size and plan")
    graph.add(
        "plan",
        "PixArtSigmaVRAMPlanner",
        budget=budget,
        width=graph["size", 1],
        height=graph["size", 2],
        batch_size=1,
    )
    graph.column("What the plan needs", WIDE)
    graph.add("table", "PreviewAny", source=graph["plan", 5])
    load_t5_and_vae(graph, T5, SDXL_VAE, graph["plan", 0], graph["plan", 1], column="Prompt")
    encode(graph, prompt, column="Prompt")
    sample(graph, kv_compression=graph["plan", 2], speed=speed)
    show(graph, tiling=graph["plan", 3], budget=graph["plan", 4])
    report(graph, budget)
    return graph


def sigma_under_4_gb() -> Graph:
    note, prompt = "Σ at 2048 px in 4 GB of graphics memory.", "a harbour at dawn, fishing boats, light fog"
    return within_a_budget(note, 4.0, "2K-MS", prompt, "3:2", speed="auto")


def sigma_under_2_gb() -> Graph:
    note, prompt = "Σ at 1024 px in 2 GB of graphics memory.", "a fox asleep in autumn leaves, watercolour"
    return within_a_budget(note, 2.0, "1024-MS", prompt, "1:1")


def sigma_4k_wallpaper() -> Graph:
    note = "A wallpaper of 4096 px class in 4 GB of graphics memory. It parks up to 9 GB in RAM."
    prompt = "dunes under a starry sky, long exposure"
    return within_a_budget(note, 4.0, "2K-MS", prompt, "16:9", "4096", speed="auto")


SIGMA_WORKFLOWS = (
    sigma_1024_in_8_gb,
    sigma_4_bit_t5,
    fast_1024,
    sigma_2k,
    sigma_4k_kv_compression,
    sigma_few_step,
    sigma_controlnet,
    sigma_lora,
    sigma_two_stage,
    sigma_under_4_gb,
    sigma_under_2_gb,
    sigma_4k_wallpaper,
)
