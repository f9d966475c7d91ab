"""Prompts that are encoded once: saved as a file, and used without T5."""

from .host.api import io, ui
from .host.embeddings import choices
from .host.folders import DEMO_CHOICE


class SaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaSaveEmbeddings",
            display_name="Save Σ Prompt Embeddings",
            category="PixArt Sigma",
            description="Writes two encoded prompts into output/prompt_embeddings, with their words and the "
            "encoder's settings. Load Σ Prompt Embeddings uses them without T5, on this machine or another.",
            search_aliases=["save conditioning", "export conditioning", "prompt cache", "embeddings", "t5"],
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="From a text encoding node. Areas, masks and combined prompts are not kept, and "
                    "are refused.",
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt, from the same text encoder."),
                io.String.Input(
                    "filename_prefix",
                    default="prompt",
                    tooltip="The file's name, to which a number is added; a folder may go before it, and "
                    "%year%, %month% and %day% are replaced.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, positive, negative, filename_prefix):
        from .host.embeddings import to_file
        from .host.notice import show_notice

        choice = to_file(positive, negative, filename_prefix)
        show_notice(f"Saved. Choose {choice} in Load Σ Prompt Embeddings.")
        return io.NodeOutput(ui=ui.PreviewText(choice))


class LoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaLoadEmbeddings",
            display_name="Load Σ Prompt Embeddings",
            category="PixArt Sigma",
            description="Reads two prompts that were encoded before, by Save Σ Prompt Embeddings or in a "
            "terminal. No text encoder is needed.",
            search_aliases=["load conditioning", "import conditioning", "prompt cache", "embeddings", "t5"],
            inputs=[
                io.Combo.Input(
                    "prompt_embeddings",
                    options=choices(),
                    default=DEMO_CHOICE,
                    tooltip="A file from output/prompt_embeddings or input/prompt_embeddings; press R after "
                    "saving a new one. The demo is a red circle on a blue background, for the demo "
                    "transformer only.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="What the picture shows."),
                io.Conditioning.Output(display_name="negative", tooltip="What to avoid."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, prompt_embeddings):
        from .host.embeddings import find

        status = find(prompt_embeddings).stat()
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, prompt_embeddings):
        from .host.embeddings import find, from_file

        return io.NodeOutput(*from_file(find(prompt_embeddings)))


NODES = [SaveEmbeddings, LoadEmbeddings]
