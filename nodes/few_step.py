"""Recipes of few-step weights for SamplerCustom, and their list."""

from ..pixart_sigma.errors import SigmaError
from ..pixart_sigma.recipes import RECIPE_NAMES
from .host.api import io
from .host.few_step import recipe_sampler, recipe_sigmas

CUSTOM = "custom"


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
                io.MultiType.Input(
                    io.Combo.Input(
                        "recipe",
                        options=[*RECIPE_NAMES, CUSTOM],
                        default="phased-4",
                        tooltip="What the weights were distilled for. one-step: Nitro and DMD. phased-4 and "
                        "phased-2: the phased LoRAs. four-step: TDM. lcm and tcd: with so many steps. custom "
                        "is what custom_recipe says. Weights that were not distilled draw poorly with each.",
                    ),
                    types=[io.String],
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
                io.String.Input(
                    "custom_recipe",
                    optional=True,
                    default="",
                    placeholder="ddim:999,749,500,250",
                    tooltip="For recipe custom: UPDATE:TIMESTEPS with the update x0, ddim, lcm or tcd, such "
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
        if recipe == CUSTOM:
            if not custom_recipe.strip():
                raise SigmaError(
                    "recipe is custom, and custom_recipe is empty. Write UPDATE:TIMESTEPS there, such as "
                    f"ddim:999,749,500,250, or choose {', '.join(RECIPE_NAMES)}."
                )
            recipe = custom_recipe
        return io.NodeOutput(recipe_sigmas(model, recipe, denoise), recipe_sampler(recipe))


NODES = [FewStepRecipe]
