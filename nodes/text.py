"""Prompts to the conditioning the transformer was trained with."""

from contextlib import AbstractContextManager, nullcontext

from ..pixart_sigma.choices import RELEASES
from .host.api import io

T5_XXL_WIDTH = 4096


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixArtSigmaTextEncode",
            display_name="Σ Text Encode",
            category="PixArt Sigma",
            description="Turns both prompts into conditioning as PixArt-Σ expects it: lower case, up to 300 "
            "tokens. Can then release the text encoder. (word:1.3) makes a word count more.",
            search_aliases=["prompt", "clip text encode", "conditioning", "t5", "negative prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="From Load Σ Text Encoder (T5), or from ComfyUI's Load CLIP with type pixart. "
                    "CLIP models of Stable Diffusion do not work.",
                ),
                io.String.Input(
                    "positive",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a large yellow star on a blue background",  # which the demo draws well
                    tooltip="What the picture shows. Whole sentences work well; about 200 words fit.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to avoid. Empty is how the model was trained.",
                ),
                io.Boolean.Input(
                    "clean_caption",
                    default=False,
                    tooltip="Clean the prompts like the training captions: no links, HTML, hashtags or "
                    "brackets. Turns (word:1.3) off.",
                ),
                io.Combo.Input(
                    "after_use",
                    options=list(RELEASES),
                    default="keep",
                    tooltip="What happens to the text encoder afterwards. keep leaves it where it is, "
                    "offload moves it out of the GPU, free also drops it from RAM; it is read again when a "
                    "prompt changes.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="What the picture shows."),
                io.Conditioning.Output(display_name="negative", tooltip="What to avoid."),
            ],
        )

    @classmethod
    def execute(cls, clip, positive, negative, clean_caption, after_use):
        from .host.memory import record
        from .host.release import release

        check_clip(clip)
        with record("Encode the prompts"):
            try:
                with encoded_ahead(clip, (positive, negative), clean_caption):
                    conditioning = [encode(clip, text, clean_caption) for text in (positive, negative)]
            finally:
                release(clip, after_use)
        return io.NodeOutput(*conditioning)


class EncodePromptList(io.ComfyNode):
    # Long because a node's inputs stand in one place, each with its tooltip.
    @classmethod
    def define_schema(cls):
        from .host.prompt_list import NO_FILE, choices

        return io.Schema(
            node_id="PixArtSigmaEncodePromptList",
            display_name="Σ Encode Prompt List",
            category="PixArt Sigma",
            description="Turns many prompts into lists of conditioning, with the text encoder loaded once. "
            "The nodes behind it then make a picture for each prompt.",
            search_aliases=["prompt batch", "many prompts", "prompts from file", "list", "queue prompts"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="From Load Σ Text Encoder (T5), or from ComfyUI's Load CLIP with type pixart.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a red circle in the middle\na large blue star",
                    tooltip="A prompt in each line; empty lines are left out.",
                ),
                io.Combo.Input(
                    "file",
                    options=choices(),
                    default=NO_FILE,
                    tooltip="In place of the lines above: a .txt with a prompt in each line, or a .csv or "
                    ".jsonl with prompt, negative and seed, in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to avoid, for each prompt that brings none of its own.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the first prompt; each further one has the next, unless its row says.",
                ),
                io.Boolean.Input(
                    "clean_caption",
                    default=False,
                    tooltip="Clean the prompts like the training captions: no links, HTML, hashtags or "
                    "brackets. Turns (word:1.3) off.",
                ),
                io.Combo.Input(
                    "after_use",
                    options=list(RELEASES),
                    default="keep",
                    tooltip="What happens to the text encoder once all prompts are encoded.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", is_output_list=True, tooltip="One for each prompt."
                ),
                io.Conditioning.Output(
                    display_name="negative", is_output_list=True, tooltip="What to avoid, for each prompt."
                ),
                io.Int.Output(
                    display_name="seed", is_output_list=True, tooltip="For the sampler's seed, as an input."
                ),
                io.String.Output(display_name="text", is_output_list=True, tooltip="The prompts' words."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        from .host.prompt_list import NO_FILE, find

        if file == NO_FILE:
            return 0, 0
        status = find(file).stat()
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, clip, prompts, file, negative, seed, clean_caption, after_use):
        from .host.memory import record
        from .host.prompt_list import read, with_progress
        from .host.release import release

        check_clip(clip)
        listed = read(prompts, file, negative, seed)
        with record("Encode the prompts"):
            try:
                texts = list(dict.fromkeys(text for one in listed for text in (one.prompt, one.negative)))
                with encoded_ahead(clip, texts, clean_caption):
                    made = with_progress(texts, lambda text: encode(clip, text, clean_caption))
                    encoded = dict(zip(texts, made, strict=True))
            finally:
                release(clip, after_use)
        return io.NodeOutput(
            [encoded[one.prompt] for one in listed],
            [encoded[one.negative] for one in listed],
            [one.seed for one in listed],
            [one.prompt for one in listed],
        )


def check_clip(clip) -> None:
    """ValueError where a loader of a model file found no text encoder in it."""
    if clip is None:
        raise ValueError(
            "There is no text encoder in this model file. Connect Load Σ Text Encoder (T5), or Load "
            "CLIP with type pixart."
        )


def encoded_ahead(clip, texts, clean_caption: bool) -> AbstractContextManager:
    """Within this block `encode` has these texts from a T5 that is streamed, which reads its blocks once."""
    from .host import embeddings
    from .host.text_encoder import SigmaClip

    ours = isinstance(clip, SigmaClip)
    return embeddings.encoded_ahead(clip, texts, clean_caption) if ours else nullcontext()


def encode(clip, text: str, clean_caption: bool) -> list:
    """The host's conditioning [[(1, n, C), dict]] of a prompt, by our CLIP or by one of the host's for T5."""
    from ..pixart_sigma.errors import SigmaError
    from ..pixart_sigma.text.cleaning import prepare_around_embeddings
    from .host import embeddings
    from .host.text_encoder import SigmaClip
    from .host.tokenizer import tell_left_out

    if isinstance(clip, SigmaClip):
        return embeddings.encode(clip, text, clean_caption)
    # Cleaning leaves no bracket for the host to read as a weight.
    prepared = prepare_around_embeddings(text, clean_caption)
    tell_left_out(prepared, T5_XXL_WIDTH)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prepared))
    width = conditioning[0][0].shape[-1]
    if width != T5_XXL_WIDTH:
        raise SigmaError(
            f"This text encoder makes embeddings {width} numbers wide, and PixArt-Sigma needs the "
            f"{T5_XXL_WIDTH} of T5-XXL. Connect Load Σ Text Encoder (T5), or Load CLIP with a t5xxl file and "
            "type pixart."
        )
    return embeddings.with_source(conditioning, text=text, clean_caption=clean_caption)


NODES = [TextEncode, EncodePromptList]
