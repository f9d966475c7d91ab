"""Load, encode, sample, decode and free the demo through the nodes in a real ComfyUI, 20 times over.

    python benchmarks/host_release.py

After each round no weight is alive and the host's list of loaded models is empty. From round 5 to round 20
the process's memory grows by at most 1 %.
"""

import ctypes
import gc
import sys

import host

ROUNDS, SETTLED = 20, 5
GATE = 0.01


def one_round(pack, seed: int) -> None:
    """A picture; each model is freed by the node that used it."""
    loaders, text, size, sampling, decode = pack
    (model,) = loaders.LoadTransformer.execute("demo (built in)", "auto", "auto").result
    (clip,) = loaders.LoadTextEncoder.execute("demo (built in)", "int8", "auto").result
    (vae,) = loaders.LoadVAE.execute("demo (built in)").result
    positive, negative = text.TextEncode.execute(clip, "a red circle", "", False, "free").result
    latent = size.AspectRatioBucket.execute("256", "1:1", "landscape", 0, 0, 1).result[0]
    settings = seed, 2, 4.5, "dpmpp_2m", "reference", 1.0, "off", "free"
    (latent,) = sampling.Sampler.execute(model, positive, negative, latent, *settings).result
    pictures = decode.VAEDecode.execute(latent, vae, "auto", 0, 0, "free").result[0]
    assert pictures.shape == (1, 256, 256, 3)


def give_back() -> None:
    """glibc keeps freed memory for later, more or less of it from round to round."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> int:
    from live_weights import live_weights

    host.enter("--cpu")
    import comfy.model_management
    import psutil
    import torch

    host.load_pack()
    pack = [host.module(f"nodes.{part}") for part in ("loaders", "text", "size", "sampling", "decode")]
    process, memory, left = psutil.Process(), [], []
    for seed in range(ROUNDS):
        with torch.inference_mode():
            one_round(pack, seed)
        gc.collect()
        give_back()
        left.append(live_weights())
        memory.append(process.memory_info().rss)
    drift = memory[-1] / memory[SETTLED - 1] - 1
    listed = len(comfy.model_management.current_loaded_models)
    print(f"alive after a round: {max(left) / 1e6:.2f} MB of weights at most; in the host's list: {listed}")
    print(
        f"memory of the process after round {SETTLED} {memory[SETTLED - 1] / 1e6:.1f} MB, "
        f"after round {ROUNDS} {memory[-1] / 1e6:.1f} MB: {drift:+.2%} (gate {GATE:.0%})"
    )
    return 0 if not any(left) and not listed and drift <= GATE else 1


if __name__ == "__main__":
    sys.exit(main())
