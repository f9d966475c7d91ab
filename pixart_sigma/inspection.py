"""What any file or folder is, in words, and what in the pack uses it."""

from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .files.locating import resolve
from .files.parts import Choice, Kind, kind_of, models
from .files.quantised_weights import describe_storage
from .files.weight_files import read_header, read_metadata
from .recipes import suggest_recipe
from .transformer.checkpoint import find_components, inspect
from .transformer.controlnet_file import describe_controlnet, is_controlnet
from .transformer.lora import (
    alphas_of,
    check_contents,
    is_adapter_folder,
    kinds_of,
    ranks_of,
    read_contents,
    written_by,
)

USES = {
    "transformer": "Load Σ Transformer, or --transformer",
    "text_encoder": "Load Σ Text Encoder (T5), or --text-encoder",
    "vae": "Load Σ VAE, or --vae",
}
CONTROLNET_USE = "Load Σ ControlNet, or generate --control with --control-image"
PIPELINE_USE = "each of the three loaders, or --model"
AVERAGES = {
    "left": "The averages (EMA) beside the weights are left out.",
    "taken": "These are averages (EMA): there is nothing else.",
}
T5_EMBEDDING = {"t5xxl", "t5"}  # the tensors of a textual inversion
EMBEDDINGS = {"positive", "negative"}  # the tensors of Save Σ Prompt Embeddings


# What metadata call a model; other entries may hold a whole workflow, with the names of many.
TITLES = ("modelspec.title", "ss_output_name")


@dataclass(frozen=True)
class _Model:
    owner: str
    kind: Kind | None
    choice: Choice


def describe(path: str | Path, variant: str | None = None) -> str:
    """A few lines for people on anything that the pack uses: what it is, its parts, and what loads it.

    variant: the transformer's, for `inspect`. Raises CheckpointError, by its true name, for what is of no use
    here, and for what is damaged.
    """
    path = resolve(path)
    components = find_components(path)
    if components:
        return _describe_pipeline(path, components, variant)
    if is_adapter_folder(path):
        return _describe_lora(path)
    header = read_header(path)
    found = [_Model(owner, kind_of(choice.names), choice) for owner, choice in models(header).items()]
    known = [model for model in found if model.kind is not None]
    if len(known) == 1:
        return _describe_one(path, known[0], header, variant)
    if not known:
        return _describe_other(path, header)
    return _describe_several(path, known, variant)


def find_recipe(path: Path) -> str:
    """The recipe of few-step weights that are called as known ones are; "" for others. A hint, no more."""
    components = find_components(path)
    metadata = read_metadata(components.get("transformer", path))
    titles = [metadata[title] for title in TITLES if title in metadata]
    return suggest_recipe([*path.absolute().parts[-3:], *titles])


def _recipe_line(path: Path) -> str:
    recipe = find_recipe(path)
    return f"few steps       called as weights for the recipe {recipe} (--recipe)\n" if recipe else ""


def _describe_pipeline(path: Path, components: dict[str, Path], variant: str | None) -> str:
    if "transformer" in components:
        return f"{inspect(path, variant).describe()}\n{_recipe_line(path)}use             {PIPELINE_USE}"
    parts = [_describe_part(part, components[part], variant) for part in USES if part in components]
    named = ", ".join(components)
    return "\n".join([f"{path}: a pipeline folder without a transformer: {named}", *parts])


def _describe_one(path: Path, model: _Model, header: dict, variant: str | None) -> str:
    kind = model.kind
    if kind is not None and kind.part:
        lines = [_describe_part(kind.part, path, variant)]
        if model.choice.average:
            lines.append(f"averages        {AVERAGES[model.choice.average]}")
        return "\n".join(lines)
    if kind is not None and kind.words == "a LoRA":
        return _describe_lora(path)
    if kind is not None and kind.words == "a ControlNet" and is_controlnet(path):
        return f"{describe_controlnet(path)}\nuse             {CONTROLNET_USE}"
    words = kind.words if kind is not None else "an unknown model"
    if words == "an embedding for prompts":
        return _describe_embedding(path)
    raise CheckpointError(f"{path} is {words}, which PixArt-Sigma does not use. Choose another file.")


def _describe_several(path: Path, found: list[_Model], variant: str | None) -> str:
    ours = [model for model in found if model.kind is not None and model.kind.part]
    held = " and ".join(model.kind.words for model in found if model.kind is not None)
    lines = [f"{path}: one file of several models: {held}"]
    if not ours:
        raise CheckpointError(f"{path} is {held}, which PixArt-Sigma does not use. Choose another file.")
    errors = []
    for model in ours:
        try:
            lines.append(_describe_part(model.kind.part if model.kind else "", path, variant))
        except CheckpointError as error:
            errors.append(str(error))
    if len(errors) == len(ours):
        raise CheckpointError(f"{path} is one file of several models ({held}). {errors[0]}")
    return "\n".join(lines + errors)


def _describe_part(part: str, path: Path, variant: str | None) -> str:
    if part == "transformer":
        words = f"{inspect(path, variant).describe()}\n{_recipe_line(path)}".rstrip()
    elif part == "text_encoder":
        words = _describe_t5(path)
    else:
        words = _describe_vae(path)
    return f"{words}\nuse             {USES[part]}"


def _describe_t5(path: Path) -> str:
    from .text.weights import read_t5

    config, weights, precision = read_t5(path, outline=True)
    return "\n".join(
        [
            f"{path}: a T5 text encoder",
            f"encoder         {config.num_layers} blocks, width {config.d_model} in "
            f"{config.num_heads} heads, {config.vocab_size} tokens",
            f"weights         {precision or 'as stored'}, {describe_storage(weights)}",
        ]
    )


def _describe_vae(path: Path) -> str:
    from .vae.loading import read_vae

    weights, config = read_vae(path)
    stored = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    widths = ", ".join(map(str, config["block_out_channels"]))
    return "\n".join(
        [
            f"{path}: a VAE",
            f"levels          {widths} channels, {config['layers_per_block']} layers each",
            f"latents         {config.get('latent_channels', 4)} channels, "
            f"scaling factor {config.get('scaling_factor')}",
            f"weights         {', '.join(sorted(stored))}",
        ]
    )


def _describe_lora(path: Path) -> str:
    contents = read_contents(path)
    check_contents(contents)
    layers = contents.layers
    kinds = ", ".join(f"{words} of {count}" for words, count in kinds_of(contents).items())
    fused = sum(len(layer.modules) > 1 for layer in layers)
    lines = [
        f"{path}: an adapter (LoRA) of a PixArt transformer",
        f"written by      {written_by(contents)}",
        f"changes         {len(layers)} layers: {kinds}" + (f"; {fused} of them fused" if fused else ""),
    ]
    if ranks := ranks_of(contents):
        lines.append(
            f"rank            {_numbers(ranks)}, alpha {_numbers(alphas_of(contents)) or 'as the rank'}"
        )
    if contents.unmatched:
        named = ", ".join(contents.unmatched[:3])
        lines.append(
            f"not known       {len(contents.unmatched)} tensors, such as {named}: it will be refused"
        )
    if contents.text:
        lines.append(f"text encoder    {len(contents.text.tensors)} tensors, for T5")
    if contents.embeddings:
        lines.append(f"embeddings      {contents.embeddings} tensors, which are not used")
    recipe = _recipe_line(contents.file)
    return "\n".join(lines) + f"\n{recipe}use             Load Σ LoRA, or --lora"


def _numbers(found: set) -> str:
    """Few numbers one by one, of many the smallest and largest."""
    numbers = [f"{number:g}" for number in sorted(found)]
    return ", ".join(numbers) if len(numbers) < 5 else f"{numbers[0]} to {numbers[-1]}"


def _describe_embedding(path: Path) -> str:
    return (
        f"{path}: an embedding for prompts (textual inversion)\n"
        f"use             embedding:{path.stem} in a prompt in ComfyUI, from models/embeddings"
    )


def _describe_other(path: Path, header: dict) -> str:
    if header and header.keys() <= T5_EMBEDDING:
        return _describe_embedding(path)
    if set(header) == EMBEDDINGS and "positive_text" in read_metadata(path):
        from .text.embeddings import PromptEmbeddings

        saved = PromptEmbeddings.load(path)
        return "\n".join(
            [
                f"{path}: prompt embeddings, encoded in {saved.precision}",
                f"prompt          {saved.positive_text}",
                f"negative        {saved.negative_text}",
                "use             Load Σ Prompt Embeddings, or generate --embeddings",
            ]
        )
    try:
        inspect(path)  # says best what a PixArt lacks
    except CheckpointError as error:
        if "is not a PixArt-Sigma transformer" not in str(error):
            raise
    first = next(iter(header), "nothing")
    raise CheckpointError(f"{path} is no model that is known here: its first weight is {first}.")
