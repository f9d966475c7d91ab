"""Freeing memory between the stages, and seeing what each one used."""

from .host.api import io


class ReleaseModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaReleaseModel",
            display_name="Σ Release Model",
            category="PixArt Sigma",
            description="Takes the connected model out of the graphics card's memory, and no other one. It "
            "loads itself again when it is next used.",
            search_aliases=["unload", "unload model", "free memory", "clear vram", "offload", "vram"],
            inputs=[
                io.AnyType.Input(
                    "after",
                    tooltip="What must be finished first, for example the sampler's latents. It is passed "
                    "on unchanged.",
                ),
                io.MultiType.Input(
                    "model",
                    types=[io.Model, io.Clip, io.Vae],
                    tooltip="The MODEL, CLIP or VAE to release. Other models stay where they are.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["offload", "free"],
                    default="offload",
                    tooltip="offload moves the weights to RAM, 8-bit and 4-bit ones are dropped. free drops "
                    "the T5 of Load Σ Text Encoder (T5) from RAM too; other models leave it to the system.",
                ),
            ],
            outputs=[
                io.AnyType.Output(
                    display_name="after",
                    tooltip="The same as the input. What is connected here runs after the release.",
                )
            ],
            is_output_node=True,  # it has its effect at the end of a graph too
        )

    @classmethod
    def execute(cls, after, model, mode):
        from .host.memory import record
        from .host.release import kind_of, release

        with record(f"Release {kind_of(model)}"):
            release(model, mode)
        return io.NodeOutput(after)


class MemoryReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaMemoryReport",
            display_name="Σ Memory Report",
            category="PixArt Sigma",
            description="Shows how much memory each PixArt-Σ stage of this run used, what it loaded and "
            "freed, and which models ComfyUI still holds. Stages whose result was cached did not run and are "
            "not shown.",
            search_aliases=["vram usage", "memory usage", "profiler", "benchmark", "statistics"],
            inputs=[
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="What must be finished first, usually the decoded picture. Without it the "
                    "report may be made too early.",
                ),
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="GB (10^9 bytes) that the run should keep to, drawn as a line. 0 is all that the "
                    "card has.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="A bar per stage against the budget, for Preview Image.",
                ),
                io.String.Output(display_name="table", tooltip="The same as text."),
                io.String.Output(display_name="json", tooltip="The same in bytes and seconds, for scripts."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, after=None, budget=0.0):
        return float("nan")  # equal to nothing, so that it is made anew in each run

    @classmethod
    def execute(cls, after=None, budget=0.0):
        from .host.memory import held_models, stages, total_memory, what_is_measured
        from .host.memory_picture import draw, report, table

        if not budget >= 0:
            raise ValueError(f"The budget is {budget:g} GB; give 0 for all that the card has, or more.")
        figures = what_is_measured(), stages(), held_models(), int(budget * 1e9) or total_memory()
        return io.NodeOutput(draw(*figures), table(*figures), report(*figures))


NODES = [ReleaseModel, MemoryReport]
