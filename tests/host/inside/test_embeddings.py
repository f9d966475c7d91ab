"""Prompt embeddings on disk say where they are from, as far as it is true."""

import folder_paths
import pytest
import torch
from pack.nodes.embeddings import LoadEmbeddings, SaveEmbeddings
from pack.nodes.host.embeddings import choices, find
from pack.nodes.host.text_encoder import load_clip
from pack.nodes.text import TextEncode
from pack.pixart_sigma import DEMO
from pack.pixart_sigma.text.embeddings import PromptEmbeddings
from pack.pixart_sigma.text.identity import identify
from safetensors.torch import save_file

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
