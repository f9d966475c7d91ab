"""Prompt embeddings on disk say where they are from, as far as it is true; what the loaders offer."""

import shutil

import folder_paths
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from pack.nodes.embeddings import LoadEmbeddings, SaveEmbeddings
from pack.nodes.host import folders
from pack.nodes.host.embeddings import choices, find
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.host.transformer import load_model
from pack.nodes.host.vae import load_vae
from pack.nodes.loaders import LoadTextEncoder, LoadTransformer, LoadVAE
from pack.nodes.text import TextEncode
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.files.writing import UNFINISHED
from pack.pixart_sigma.text.embeddings import PromptEmbeddings
from pack.pixart_sigma.text.identity import identify
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

import nodes as host_nodes

WORDS = "A (Red:1.2) Circle", "red circle " * 400


@pytest.fixture(scope="module")
def clip():
    return load_clip(DEMO, "int8", "cpu")


@pytest.fixture
def encoded(clip):
    """Both conditionings of WORDS."""
    return TextEncode.execute(clip, *WORDS, False, "free").result


def saved(positive, negative):
    """The choice of a file, and what is in it."""
    (choice,) = SaveEmbeddings.execute(positive, negative, "x").ui.as_dict()["text"]
    assert choice in choices()
    return choice, PromptEmbeddings.load(find(choice))


def test_a_file_says_where_its_embeddings_are_from(clip, encoded):
    shown, unwanted = encoded
    for _ in range(2):  # encoded, then cached
        _, file = saved(shown, unwanted)
        assert torch.equal(file.positive, shown[0][0]) and torch.equal(file.negative, unwanted[0][0])
        assert (file.positive_text, file.negative_text, file.clean_caption) == (*WORDS, False)
        assert (file.precision, file.fingerprint) == ("int8", ""), "a terminal knows no weights"
        assert file.positive_truncated == "" and "red circle" in file.negative_truncated
        shown, unwanted = TextEncode.execute(clip, *WORDS, False, "keep").result
        assert clip.cond_stage_model.encoder is None, "it was loaded for a cached prompt"


def test_only_plain_words_are_known_by_their_encoder(clip):
    """Elsewhere the words alone would not make these embeddings again."""
    for options, text, plain in (
        ({}, "A red circle", True),
        ({}, "red circle " * 400, True),
        ({}, r"a \(red\) circle", False),
        ({}, "a (red:1.2) circle", False),
        ({}, "red embedding:nothing circle", False),
        ({"t5xxl_min_length": 77}, "A red circle", False),
    ):
        other = clip.clone()
        for option, value in options.items():
            other.set_tokenizer_option(option, value)
        _, file = saved(*TextEncode.execute(other, text, "", False, "keep").result)
        negative_too = not options  # it is padded as well
        assert file.fingerprint == (identify(DEMO).fingerprint if plain and negative_too else ""), text


def test_a_changed_embedding_is_encoded_anew(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], set()))
    made = []
    for value in (1.0, 2.0, 2.0):
        save_file({"emb": torch.full((1, 128), value)}, tmp_path / "Style.safetensors")
        shown, _ = TextEncode.execute(clip, "a red embedding:Style circle", "", False, "free").result
        made.append(shown[0][0])
    assert not torch.equal(made[0], made[1]) and torch.equal(made[1], made[2])


def test_loaded_and_saved_again_nothing_is_lost(clip):
    choice, file = saved(*TextEncode.execute(clip, "A red circle", WORDS[1], False, "free").result)
    assert file.fingerprint
    _, again = saved(*LoadEmbeddings.execute(choice).result)
    assert torch.equal(again.positive, file.positive) and torch.equal(again.negative, file.negative)
    for name in ("positive_text", "precision", "fingerprint", "negative_truncated"):
        assert getattr(again, name) == getattr(file, name), name


def test_changed_embeddings_are_not_those_of_the_words(encoded):
    shown, unwanted = encoded
    (averaged,) = host_nodes.ConditioningAverage().addWeighted(shown, unwanted, 0.5)
    _, mixed = saved(averaged, unwanted)
    assert mixed.positive_text == "" and mixed.fingerprint == "" and mixed.negative_text == WORDS[1]


def test_the_hosts_own_conditioning_is_saved(clip):
    (plain,) = host_nodes.CLIPTextEncode().encode(clip, "a red circle")
    assert torch.equal(saved(plain, plain)[1].positive, plain[0][0])


def test_a_layer_of_its_own_is_another_answer(clip, encoded):
    (lower,) = host_nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    deep, _ = TextEncode.execute(lower, WORDS[0], "", False, "free").result
    assert not torch.equal(deep[0][0], encoded[0][0][0])


# The lists of the three loaders


@pytest.fixture
def root(tmp_path):
    """A folder that the host reads beside its own for each category, as by extra_model_paths.yaml."""
    categories = {name for names in folders.CATEGORIES.values() for name in names}
    before = {name: list(folder_paths.folder_names_and_paths[name][0]) for name in categories}
    for name in categories:
        (tmp_path / name).mkdir()
        folder_paths.add_model_folder_path(name, str(tmp_path / name))
    yield tmp_path
    for name, paths in before.items():
        folder_paths.folder_names_and_paths[name][0][:] = paths
        folder_paths.filename_list_cache.pop(name, None)


def test_the_loaders_offer_every_folder_and_no_single_shard(root):
    network = PixArtTransformer2DModel.from_pretrained(DEMO / "transformer")
    network.save_pretrained(root / "diffusers" / "only" / "transformer", variant="fp16", max_shard_size="2MB")
    network.save_pretrained(root / "diffusion_models" / "parts", max_shard_size="2MB")
    shutil.copytree(DEMO, root / "diffusers" / "owner" / "whole")
    cached = root / "diffusers" / "models--owner--cached"
    shutil.copytree(DEMO / "transformer", cached / "blobs")
    (cached / "snapshots" / "abc" / "transformer").mkdir(parents=True)
    for file in (cached / "blobs").iterdir():
        (cached / "snapshots" / "abc" / "transformer" / file.name).symlink_to(file)
    for place in ("t5", "text_encoders"):
        shutil.copytree(DEMO / "text_encoder", root / place / "encoder")
    T5EncoderModel.from_pretrained(DEMO / "text_encoder").save_pretrained(root / "t5", max_shard_size="500KB")
    (root / "t5" / "config.json").unlink()
    weights = load_file(DEMO / "transformer" / "diffusion_pytorch_model.safetensors")
    whole = weights | {f"vae.{key}": tensor for key, tensor in vae_weights().items()}
    save_file(whole, root / "checkpoints" / "whole.safetensors")
    save_file(weights, root / "checkpoints" / "transformer.safetensors")
    for place in ("diffusion_models", "text_encoders"):
        (root / place / "quantised").mkdir()
        (root / place / "quantised" / "Q5_0.gguf").write_bytes(b"GGUF")

    offered = {kind: set(folders.choices(kind)) for kind in folders.CATEGORIES}
    assert offered["transformer"] >= {
        "diffusers/only",
        "parts",
        "diffusers/owner/whole",
        "diffusers/models--owner--cached",
        "checkpoints/whole.safetensors",
        "checkpoints/transformer.safetensors",
        "quantised/Q5_0.gguf",
    }
    index = "t5/model.safetensors.index.json"
    encoders = {"diffusers/owner/whole", "t5/encoder", "encoder", index, "quantised/Q5_0.gguf"}
    assert offered["text_encoder"] >= encoders
    assert offered["vae"] >= {"diffusers/owner/whole", "checkpoints/whole.safetensors"}
    assert not {
        "diffusers/only",
        "diffusers/models--owner--cached",
        "checkpoints/transformer.safetensors",
    } & (offered["text_encoder"] | offered["vae"])
    assert not [name for names in offered.values() for name in names if "-of-" in name]

    expected = load_model(DEMO).model.fingerprint
    for choice in ("diffusers/only", "parts", "diffusers/models--owner--cached"):
        assert load_model(folders.find("transformer", choice)).model.fingerprint == expected, choice
        assert LoadTransformer.validate_inputs(choice) is True
    decoder = load_vae(folders.find("vae", "checkpoints/whole.safetensors")).first_stage_model.decoder
    assert torch.equal(decoder.conv_in.weight.float().cpu(), vae_weights()["decoder.conv_in.weight"].float())

    shard = sorted((root / "diffusion_models" / "parts").glob("*-00001-of-*"))[0].name
    assert "is one of 8 parts of a model. Choose the folder" in LoadTransformer.validate_inputs(
        f"parts/{shard}"
    )
    assert "There is no model '../x'" in LoadVAE.validate_inputs("../x")
    assert LoadTextEncoder.validate_inputs(None) is True


def test_what_a_killed_quantize_t5_left_is_not_offered(root):
    shutil.copytree(DEMO / "text_encoder", root / "text_encoders" / f".ab12{UNFINISHED}")
    shutil.copytree(DEMO, root / "diffusers" / "owner" / f".cd34{UNFINISHED}")
    shutil.copytree(DEMO / "text_encoder", root / "text_encoders" / "whole")
    offered = folders.choices("text_encoder")
    assert "whole" in offered and not [name for name in offered if UNFINISHED in name]


def test_files_are_found_as_another_packs_nodes_name_them(root):
    """ExtraModels', which ours replace: by the name in models/checkpoints or models/t5, T5 by a shard."""
    shutil.copy(
        DEMO / "transformer" / "diffusion_pytorch_model.safetensors", root / "checkpoints" / "old.pth"
    )
    encoder = T5EncoderModel.from_pretrained(DEMO / "text_encoder")
    for folder in (root / "t5", root / "t5" / "inside"):
        encoder.save_pretrained(folder, max_shard_size="500KB")
    (root / "t5" / "config.json").unlink()
    shutil.copytree(DEMO / "text_encoder", root / "t5" / "other")
    shard = sorted((root / "t5").glob("*-00001-of-*"))[0].name
    for kind, written, meant in (
        ("transformer", "old.pth", root / "checkpoints" / "old.pth"),
        ("text_encoder", "other/model.safetensors", root / "t5" / "other" / "model.safetensors"),
        ("text_encoder", f"inside/{shard}", root / "t5" / "inside"),
        ("text_encoder", shard, root / "t5" / "model.safetensors.index.json"),
    ):
        assert folders.find(kind, written) == meant
    assert "There is no model 'old.pth'" in LoadVAE.validate_inputs("old.pth"), "it holds no VAE"
    for outside in ("../t5/other/model.safetensors", "../checkpoints/old.pth"):
        assert "There is no model" in LoadTextEncoder.validate_inputs(outside)


def vae_weights():
    return load_file(DEMO / "vae" / "diffusion_pytorch_model.safetensors")
