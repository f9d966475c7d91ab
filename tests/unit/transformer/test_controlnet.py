"""ControlNets against diffusers' own blocks, hooked into diffusers' transformer; and their files."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.transformer.config import KVWeights, TransformerConfig
from pixart_sigma.transformer.controlnet import Control, ControlHooks
from pixart_sigma.transformer.controlnet_file import (
    build_controlnet,
    describe_controlnet,
    inspect_controlnet,
    is_controlnet,
    load_controlnet,
)
from pixart_sigma.transformer.hooks import Hooks
from pixart_sigma.transformer.kv_rules import KVCompression
from pixart_sigma.transformer.network import build_transformer
from pixart_sigma.transformer.streaming import StreamedTransformer, stream_blocks

CAPTION = 12
LAYERS = 2


def config_of(heads=2, head_dim=72, layers=4, **changes):
    sizes = dict(num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim)
    channels = dict(in_channels=4, out_channels=8, patch_size=2, caption_channels=CAPTION)
    return TransformerConfig(
        sample_size=32,
        interpolation_scale=0.5,
        cross_attention_dim=heads * head_dim,
        **sizes,
        **channels,
        **changes,
    )


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def randomize(module, seed, scale=0.3):
    shapes = module.state_dict()
    weights = {
        name: normal(*weight.shape, seed=seed + place, scale=scale)
        for place, (name, weight) in enumerate(shapes.items())
    }
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


CONFIG = config_of()


@pytest.fixture(scope="module")
def transformer():
    return randomize(build_transformer(CONFIG), 0)


@pytest.fixture(scope="module")
def weights():
    """A ControlNet of two layers in diffusers' format."""
    return randomize(build_controlnet(config_of(layers=LAYERS)), 1000).state_dict()


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("controlnet") / "edges.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def controlnet(path):
    return load_controlnet(path)


def make_reference(transformer, controls):
    """diffusers' transformer with these weights, into whose blocks the ControlNets are hooked by hand.

    controls: pairs of a ControlNet's weights and the latents of its picture.
    """
    config = transformer.sigma_config
    reference = PixArtTransformer2DModel(**config.to_diffusers())
    reference.load_state_dict(transformer.state_dict())
    reference.eval().requires_grad_(False)
    for weights, latents in controls:
        _hook(reference, weights, latents)
    return reference


def _hook(reference, weights, latents):
    layers = len({name.split(".")[1] for name in weights})
    copies = copy.deepcopy(reference.transformer_blocks[:layers])
    for index, block in enumerate(copies):
        prefix = f"controlnet_blocks.{index}.transformer_block."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if prefix in name}
        block.load_state_dict(own)

    def project(index, part, tokens):
        weight, bias = (weights[f"controlnet_blocks.{index}.{part}.{name}"] for name in ("weight", "bias"))
        return tokens @ weight.T + bias

    state = {}

    def before(index):
        def hook(module, arguments, named):
            (hidden_states,) = arguments
            if index == 0:
                picture = reference.pos_embed(latents.expand_as(state["latents"]))
                state["tokens"] = hidden_states + project(0, "before_proj", picture)
            state["tokens"] = copies[index](state["tokens"], **named)
            return (hidden_states + project(index, "after_proj", state["tokens"]),), named

        return hook

    def start(module, arguments, named):
        state["latents"] = arguments[0]

    reference.register_forward_pre_hook(start, with_kwargs=True)
    for index in range(layers):
        reference.transformer_blocks[index + 1].register_forward_pre_hook(before(index), with_kwargs=True)


def predict(reference, latents, timestep, embeds):
    out = reference(
        latents,
        encoder_hidden_states=embeds,
        timestep=torch.as_tensor(timestep).expand(len(latents)),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    return out.sample[:, :4]


def error(made, expected):
    return ((made - expected).norm() / expected.norm()).item()


LATENTS, EMBEDS, PICTURE = normal(2, 4, 6, 10), normal(2, 5, CAPTION, seed=1), normal(1, 4, 6, 10, seed=2)


def test_it_is_diffusers(transformer, controlnet, weights):
    made = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks((Control(controlnet, PICTURE),)))
    expected = predict(make_reference(transformer, [(weights, PICTURE)]), LATENTS, 500.0, EMBEDS)
    assert error(made, expected) < 1e-5
    assert error(transformer(LATENTS, 500.0, EMBEDS), expected) > 0.05


@pytest.mark.slow
def test_it_is_diffusers_at_real_width(tmp_path):
    config = config_of(heads=16, head_dim=72, layers=4)
    transformer = randomize(build_transformer(config), 0, scale=0.03)
    controlnet = randomize(build_controlnet(replace(config, num_layers=2)), 1000, scale=0.03)
    reference = make_reference(transformer, [(controlnet.state_dict(), PICTURE)])
    made = transformer(LATENTS, 20.0, EMBEDS, hooks=ControlHooks((Control(controlnet, PICTURE),)))
    expected = predict(reference, LATENTS, 20.0, EMBEDS)
    assert error(made, expected) < 1e-5 < 1e-3 < error(transformer(LATENTS, 20.0, EMBEDS), expected)


def test_strength_scales_what_is_added(transformer, controlnet):
    plain = transformer(LATENTS, 500.0, EMBEDS)
    off = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks((Control(controlnet, PICTURE, 0.0),)))
    half = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks((Control(controlnet, PICTURE, 0.5),)))
    assert torch.equal(off, plain) and error(half, plain) > 0.01
    halved = {
        name: weight * (0.5 if "after_proj" in name else 1)
        for name, weight in controlnet.state_dict().items()
    }
    reference = make_reference(transformer, [(halved, PICTURE)])
    assert error(half, predict(reference, LATENTS, 500.0, EMBEDS)) < 1e-5


def test_several_add_up(transformer, controlnet, tmp_path):
    other = randomize(build_controlnet(config_of(layers=3)), 5000)
    second = normal(1, 4, 6, 10, seed=9)
    controls = Control(controlnet, PICTURE), Control(other, second)
    made = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(controls))
    assert error(made, transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(controls[::-1]))) < 1e-6
    alone = [transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks((control,))) for control in controls]
    assert min(error(made, one) for one in alone) > 0.01
    silent = Control(other, second, 0.0)
    kept = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks((controls[0], silent)))
    assert error(kept, alone[0]) < 1e-6


def test_a_picture_for_each_and_sizes_off_the_grid(transformer, controlnet, weights):
    latents, pictures = normal(2, 4, 5, 7), normal(2, 4, 5, 7, seed=3)
    made = transformer(latents, 500.0, EMBEDS, hooks=ControlHooks((Control(controlnet, pictures),)))
    for place in range(2):
        one = slice(place, place + 1)
        alone = transformer(
            latents[one], 500.0, EMBEDS[one], hooks=ControlHooks((Control(controlnet, pictures[one]),))
        )
        assert error(made[one], alone) < 1e-5
    guided = transformer(
        latents.repeat(2, 1, 1, 1),
        500.0,
        EMBEDS.repeat(2, 1, 1),
        hooks=ControlHooks((Control(controlnet, pictures),)),
    )
    assert error(guided, made.repeat(2, 1, 1, 1)) < 1e-5


def test_a_picture_of_another_size_is_refused(transformer, controlnet):
    for wrong in (normal(1, 4, 6, 8), normal(3, 4, 6, 10), normal(0, 4, 6, 10)):
        with pytest.raises(SigmaError, match="encode the control picture at the size"):
            transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks((Control(controlnet, wrong),)))


def test_that_of_another_transformer_is_refused(controlnet):
    for other, words in (
        (config_of(layers=2), "of 2 layers is for a transformer of at least 3, and this one has 2"),
        (config_of(heads=4, head_dim=36), "width 144 in 2 heads, and this one has width 144 in 4"),
    ):
        transformer = randomize(build_transformer(other), 0)
        with pytest.raises(SigmaError, match=words):
            transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks((Control(controlnet, PICTURE),)))


def test_with_negative_prompts_in_the_attention(transformer, controlnet):
    """The ControlNet reads the prompt: with both alike, guidance away from one changes nothing."""
    control = (Control(controlnet, PICTURE),)
    both = torch.cat([EMBEDS, EMBEDS])
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2:, 3:] = mask[:2, 3:] = False
    made = transformer(LATENTS, 500.0, both, mask, nag_scale=5.0, hooks=ControlHooks(control))
    expected = transformer(LATENTS, 500.0, EMBEDS, mask[2:], hooks=ControlHooks(control))
    assert error(made, expected) < 1e-5
    read = []
    first = controlnet.controlnet_blocks[0]
    handle = first.register_forward_pre_hook(lambda module, arguments: read.append(arguments[2]))
    other = torch.cat([normal(2, 5, CAPTION, seed=7), EMBEDS])
    transformer(LATENTS, 500.0, other, nag_scale=5.0, hooks=ControlHooks(control))
    handle.remove()
    assert torch.equal(read[0], transformer.project_prompt(other)[2:])


def test_what_is_hooked_in_stays_outside_it(transformer, controlnet):
    class Counting(Hooks):
        def __init__(self):
            self.seen = []

        def run_block(self, block, hidden_states, prompt_embeds, call):
            self.seen.append(call.index)
            return super().run_block(block, hidden_states, prompt_embeds, call)

        def after_attention(self, name, tokens):
            self.seen.append(name)
            return tokens

    hooks = Counting()
    control = (Control(controlnet, PICTURE),)
    made = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(control, hooks))
    assert hooks.seen == [entry for index in range(4) for entry in (index, "attn1", "attn2")]
    assert torch.equal(made, transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(control)))


def test_kv_compression_acts_on_it_too_but_for_a_trained_one(transformer, controlnet):
    control = (Control(controlnet, PICTURE),)
    dense = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(control))
    made = transformer(LATENTS, 500.0, EMBEDS, None, "mean:2:1", hooks=ControlHooks(control))
    assert error(made, dense) > 1e-3

    class Compressing(Hooks):
        """The rule for the transformer's own block alone."""

        def run_block(self, block, hidden_states, prompt_embeds, call):
            rule = KVCompression("mean", 2, (1,)) if call.index == 1 else None
            return super().run_block(block, hidden_states, prompt_embeds, replace(call, kv_compression=rule))

    beside = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(control, Compressing()))
    assert error(made, beside) > 1e-5
    trained = config_of(kv_compression=KVWeights(2, (1, 2)))
    network = randomize(build_transformer(trained), 0)
    assert network(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(control)).isfinite().all()


def test_it_is_streamed_beside(transformer, controlnet, monkeypatch):
    control = (Control(controlnet, PICTURE),)
    expected = transformer(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(control))
    streamed = stream_blocks(randomize(build_transformer(CONFIG), 0), "cpu")
    assert isinstance(streamed, StreamedTransformer)
    streamed._park(torch.device("cpu"))
    assert torch.equal(streamed(LATENTS, 500.0, EMBEDS, hooks=ControlHooks(control)), expected)


# ---- files


def as_authors(weights, to_original):
    """The same in the names of PixArt-alpha's own training, with a weight of the transformer beside it."""
    found = {"base_model.x_embedder.proj.bias": torch.zeros(144)}
    blocks = {}
    for name, weight in weights.items():
        _, index, part, rest = name.split(".", 3)
        if part == "transformer_block":
            blocks[f"transformer_blocks.{index}.{rest}"] = weight
        else:
            found[f"controlnet.{index}.{part}.{rest}"] = weight
    for name, weight in to_original(blocks).items():
        _, index, rest = name.split(".", 2)
        found[f"controlnet.{index}.copied_block.{rest}"] = weight
    return found


def test_the_authors_spelling_is_the_same(weights, to_original, controlnet, tmp_path):
    authors = as_authors(weights, to_original)
    assert "controlnet.1.copied_block.attn.qkv.weight" in authors
    torch.save({"state_dict": authors, "epoch": 1}, tmp_path / "edges.pth")
    loaded = load_controlnet(tmp_path / "edges.pth")
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    assert is_controlnet(tmp_path / "edges.pth")
    assert "2, width 144 in 2 heads" in describe_controlnet(tmp_path / "edges.pth")


def test_a_folder_and_wrappers(weights, tmp_path):
    folder = tmp_path / "controlnet"
    folder.mkdir()
    wrapped = {f"controlnet.{name}": weight for name, weight in weights.items()}
    wrapped |= {"transformer.proj_out.weight": torch.zeros(2, 2)}
    save_file(wrapped, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"num_layers": 2}')
    loaded = load_controlnet(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.bfloat16}
    assert is_controlnet(folder)


def test_what_is_something_else_is_refused(weights, transformer, tmp_path):
    def refused(found, words, read=inspect_controlnet):
        """Most of it from the header alone."""
        save_file({name: weight.contiguous() for name, weight in found.items()}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "x.safetensors")

    refused(transformer.state_dict(), "is a PixArt-Sigma transformer, not a ControlNet of PixArt: it holds")
    refused({"pos_embed_input.proj.weight": torch.zeros(2)}, "is not a ControlNet of PixArt: it holds")
    other = "is a ControlNet for another kind of model than PixArt"
    refused({"controlnet_cond_embedding.conv_in.weight": torch.zeros(2)}, other)  # SDXL's
    refused({"controlnet_blocks.0.weight": torch.zeros(2, 2)}, other)  # Flux's, and of Stable Diffusion 3
    refused(
        weights | {"controlnet_blocks.0.nose": torch.zeros(2)}, "holds controlnet_blocks.0.nose, which no"
    )
    lora = "controlnet_blocks.0.transformer_block.attn1.to_q.lora_A.weight"
    refused(weights | {lora: torch.zeros(2, 2)}, "a LoRA for a ControlNet")
    name = "controlnet_blocks.1.transformer_block.attn1.to_q.weight"
    refused({key: weight for key, weight in weights.items() if key != name}, f"without {name}")
    refused({key: weight for key, weight in weights.items() if "blocks.0" not in key}, "without its layer 0")
    refused(weights | {name: weights[name][:5]}, r"is \(5, 144\) where its width makes it \(144, 144\)")
    refused(weights | {name: weights[name][None]}, r"is \(1, 144, 144\) where its width makes it")
    refused(weights | {name: weights[name].long()}, "holds torch.int64 numbers")
    refused(weights | {name: weights[name].to(torch.int8)}, r"a quantised ControlNet \(int8\)")
    scale = {name.replace("weight", "scale_weight"): torch.ones(())}
    refused(
        weights | scale, r"a quantised ControlNet \(ComfyUI's scaled fp8\), .* Use its weights in float32"
    )
    refused(weights | {"controlnet_blocks.0.after_proj.bias": torch.zeros(0)}, "without its layer 0")
    refused(weights | {name: weights[name] * float("nan")}, f"{name} is not finite", load_controlnet)
    refused(
        weights | {"controlnet_blocks.1.before_proj.bias": torch.zeros(144)},
        "which no ControlNet of PixArt has",
    )
    refused(weights | {f"x.{name}": weights[name].clone()}, "twice")


@pytest.mark.parametrize("shape", [(433, 144), (432,), ()])
def test_a_fused_weight_of_another_shape_is_named(weights, to_original, tmp_path, shape):
    authors = as_authors(weights, to_original)
    authors["controlnet.1.copied_block.attn.qkv.weight"] = torch.zeros(shape)
    torch.save(authors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"damaged: controlnet_blocks.1.transformer_block.attn1.to_q"):
        inspect_controlnet(tmp_path / "x.pth")


def test_no_code_in_it_is_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"controlnet.0.after_proj.weight": Code()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="code to run"):
        is_controlnet(tmp_path / "x.pth")
