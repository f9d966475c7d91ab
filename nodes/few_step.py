"""Recipes of few-step weights for SamplerCustom, and their list."""

from ..pixart_sigma.recipes import RECIPE_NAMES
from .choice import CUSTOM, custom_input, list_input, spelled
from .host.api import io
from .host.few_step import recipe_sampler, recipe_sigmas

PRESETS = {name: name for name in RECIPE_NAMES}
EXAMPLE = "ddim:999,749,500,250"


class FewStepRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaFewStepRecipe",
            display_name="Σ Few-Step Recipe",
            category="PixArt Sigma",
            description="How weights that were distilled to one or a few steps are run: their noise levels, "
            "and the sampler with the first latents as those weights want them. Σ Sampler has the same "
            "recipes in its schedule.",
            search_aliases=["few steps", "one step", "distilled", "nitro", "dmd", "lcm", "tcd", "turbo"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the noise levels are for."),
                list_input(
                    "recipe",
                    [*PRESETS, CUSTOM],
                    "phased-4",
                    "What the weights were distilled for. one-step: Nitro and DMD. phased-4 and "
                    "phased-2: the phased LoRAs. four-step: TDM. lcm and tcd: with so many steps. custom "
                    "is what custom_recipe says. Weights that were not distilled draw poorly with each.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from pure noise. Lower starts from the given latents, with the last of "
                    "the recipe's steps: 0.5 runs 2 of 4.",
                ),
                custom_input(
                    "custom_recipe",
                    EXAMPLE,
                    "For recipe custom: UPDATE:TIMESTEPS with the update x0, ddim, lcm or tcd, such "
                    "as ddim:999,749,500,250, or lcm-3. At the end :sigma, as in x0:440:sigma, for weights "
                    "that begin with noise of its timestep's size and not of size 1.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(tooltip="The noise levels, for SamplerCustom, with cfg 1."),
                io.Sampler.Output(tooltip="The recipe's own sampler, for the same SamplerCustom."),
            ],
        )

    @classmethod
    def execute(cls, model, recipe, denoise, custom_recipe=""):
        recipe = spelled("recipe", recipe, custom_recipe, PRESETS, EXAMPLE)
        return io.NodeOutput(recipe_sigmas(model, recipe, denoise), recipe_sampler(recipe))


NODES = [FewStepRecipe]
