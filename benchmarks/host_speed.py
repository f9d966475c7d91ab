"""What savings change in the demo's latents in a real ComfyUI, and what they cost, beside its step caches.

    python benchmarks/host_speed.py [--calibration FILE ...] [--savings SPELLING ...]
                                    [--thresholds 0.05 0.1] [--size 256] [--count 48] [--seed 0]

One MODEL in fp32, held-out prompts, prompt k from seed k, dpmpp_2m on the reference schedule, 20 steps, cfg
4.5. Compared are Σ Speed, both choices of each calibration, EasyCache and LazyCache at their defaults and at
other thresholds, and fewer steps. Each row: what the network computed as a share of the full run's, in
pictures of its batches and in multiply-adds, and the relative L2 of the finished latents against the full
run's. Reported only.
"""

import argparse
import sys
from pathlib import Path

import host

STEPS = 20
FEWER_STEPS = (14, 10, 8, 6)
SAVINGS = (
    "forecast:0:1",
    "forecast:1:1",
    "forecast:1:1:10-95%",
    "forecast:1:2",
    "forecast:1:2:10-95%",
    "forecast:2:1",
    "forecast:2:2",
    "forecast:1:3",
    "guidance:1:1",
    "forecast:1:1+guidance:1:1",
)


class Counter:
    """What the networks of the MODELs of `watch` have computed since the last `take`."""

    def __init__(self):
        self.rows = self.multiply_adds = 0
        self._cost = host.module("pixart_sigma.transformer.cost").multiply_adds
        self._setting = host.module("nodes.host.kv_compression").KV_COMPRESSION

    def watch(self, model):
        """A clone that is counted. It is the last to wrap the network: EasyCache leaves out calls there, when
        the host believes that they are made."""
        from comfy.patcher_extension import WrappersMP

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "benchmark", self._count)
        return model

    def take(self) -> tuple[int, int]:
        """Pictures of batches, and multiply-adds."""
        taken = self.rows, self.multiply_adds
        self.rows = self.multiply_adds = 0
        return taken

    def _count(self, executor, x, timesteps, context, context_mask, control, options, **named):
        config = executor.class_obj.sigma_config
        height, width = (8 * side for side in x.shape[-2:])
        rules = options[self._setting](height, width) if self._setting in options else ()
        one = self._cost(config, height, width, context.shape[1], rules or (), float(timesteps[0]))
        self.rows += len(x)
        self.multiply_adds += len(x) * one
        return executor(x, timesteps, context, context_mask, control, options, **named)


def variants(model, arguments) -> dict[str, tuple]:
    """Each row's name, its MODEL, and what its settings have beside the full run's."""
    found = {"full": (model, {})}
    found |= {f"`{savings}`": (model, {"speed": savings}) for savings in arguments.savings}
    for path in arguments.calibration:
        found |= {name: (model, changed) for name, changed in calibrated(path).items()}
    found |= step_caches(model, arguments.thresholds)
    return found | {f"{steps} steps": (model, {"steps": steps}) for steps in FEWER_STEPS}


def calibrated(path: Path) -> dict[str, dict]:
    """What the choices of a calibration are in the sampler's words."""
    calibration = host.module("pixart_sigma.transformer.calibration").Calibration.read(path)
    spell_rules = host.module("pixart_sigma.transformer.kv_rules").spell
    spell_savings = host.module("pixart_sigma.speed").spell
    if calibration.steps != STEPS:
        sys.exit(f"{path} was measured with {calibration.steps} steps; the runs here have {STEPS}.")
    found = {}
    for name, point in (("in place", calibration.speed_in_place), ("any steps", calibration.speed)):
        if point is not None:
            found[f"**budget {calibration.budget:.0%}**, {name}"] = {
                "kv_compression": spell_rules(point.choice.rules),
                "speed": spell_savings(point.choice.savings),
                "steps": point.choice.steps or STEPS,
                "spacing": point.choice.spacing,
            }
    return found


def step_caches(model, thresholds: list[float]) -> dict[str, tuple]:
    """The MODEL behind each of the host's step caches, as their nodes give it."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    found = {}
    for node in (EasyCacheNode, LazyCacheNode):
        schema = node.define_schema()
        defaults = {value.id: value.default for value in schema.inputs if value.id != "model"}
        for threshold in (defaults["reuse_threshold"], *thresholds):
            cached = node.execute(model, **defaults | {"reuse_threshold": threshold}).args[0]
            default = ", its default" if threshold == defaults["reuse_threshold"] else ""
            found[f"{schema.display_name} {threshold:g}{default}"] = cached, {}
    return found


def encode(prompts: list[str]) -> list:
    """The host's conditioning of each prompt, and last of the empty one."""
    clip = host.module("nodes.host.text_encoder").load_clip(host.module("pixart_sigma").DEMO, "fp32", "auto")
    text = host.module("nodes.text")
    return [text.encode(clip, prompt, False) for prompt in (*prompts, "")]


def measure(arguments) -> dict[str, list[tuple[float, int, int]]]:
    """Of each row and prompt the relative L2 from the full run, and what was computed."""
    import torch
    from evaluate import held_out_prompts

    sampling = host.module("nodes.host.sampling")
    model = host.module("nodes.host.transformer").load_model(host.module("pixart_sigma").DEMO, dtype="fp32")
    counter = Counter()
    compared = {
        name: (counter.watch(cached), changed)
        for name, (cached, changed) in variants(model, arguments).items()
    }
    *positives, negative = encode([prompt for _, prompt in held_out_prompts(arguments.count, arguments.seed)])
    empty = {"samples": torch.zeros(1, 4, arguments.size // 8, arguments.size // 8)}
    full = {"steps": STEPS, "kv_compression": "off"}
    found = {name: [] for name in compared}
    for seed, positive in enumerate(positives):
        reference = None
        for name, (watched, changed) in compared.items():
            settings = sampling.SamplerSettings(seed=seed, **full | changed)
            made = sampling.sample(watched, positive, negative, empty, settings)["samples"]
            reference = made if reference is None else reference
            error = float((made - reference).norm() / reference.norm())
            found[name].append((error, *counter.take()))
        print(f"{seed + 1} of {arguments.count}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", nargs="*", default=[], type=lambda path: Path(path).resolve())
    parser.add_argument("--savings", nargs="*", default=SAVINGS)
    parser.add_argument("--thresholds", nargs="*", type=float, default=[0.05, 0.1])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0, help="which held-out prompts are drawn")
    arguments = parser.parse_args()
    host.enter("--cpu")
    import comfy.utils
    import torch

    host.load_pack()
    sys.path.append(str(host.PACK / "tools" / "demo"))
    comfy.utils.set_progress_bar_enabled(False)
    with torch.inference_mode():
        found = measure(arguments)
    print(f"{arguments.size}x{arguments.size}, {arguments.count} prompts of seed {arguments.seed}\n")
    print("| what | pictures computed | multiply-adds | error, mean | largest |\n|---|---|---|---|---|")
    _, *full = map(sum, zip(*found["full"], strict=True))
    for name, prompts in found.items():
        errors, *computed = zip(*prompts, strict=True)
        rows, multiply_adds = (sum(one) / whole for one, whole in zip(computed, full, strict=True))
        mean = sum(errors) / len(errors)
        print(f"| {name} | {rows:.3f} | {multiply_adds:.3f} | {mean:.1%} | {max(errors):.1%} |")


if __name__ == "__main__":
    main()
