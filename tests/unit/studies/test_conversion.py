"""What a converted transformer costs: the errors are those of runs and layers computed by hand."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pixart_sigma import DEMO
from pixart_sigma.errors import SigmaError
from pixart_sigma.memory.stages import Stages
from pixart_sigma.prompt_embeds import Prompts
from pixart_sigma.sampling.denoise import denoise
from pixart_sigma.sampling.guidance import guide
from pixart_sigma.sampling.noise import get_noise
from pixart_sigma.settings import Settings, Ways
from pixart_sigma.studies.conversion import Conversion, Trial, convert_and_measure, trial_of
from pixart_sigma.text.embeddings import PromptEmbeddings
from pixart_sigma.transformer.checkpoint import inspect, load_transformer_state_dict
from pixart_sigma.transformer.converting import LayerError
from pixart_sigma.transformer.loading import load_transformer
from pixart_sigma.transformer.stage import TransformerStage

CPU = torch.device("cpu")
SETTINGS = Settings(width=64, height=64, binning=False, steps=2, seed=3)


def make_stage(path, dtype=torch.float32):
    return TransformerStage(inspect(path), CPU, dtype, Stages(CPU))


@pytest.fixture(scope="module")
def trial():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (
        torch.randn(1, 5, 128, generator=generator),
        torch.randn(1, 3, 128, generator=generator),
    )
    return Trial(SETTINGS, Prompts(positive, negative_embeds=negative))


def by_hand(path, trial):
    """The run, and what went into the first query layer at each step."""
    transformer, seen = load_transformer(path), []
    transformer.transformer_blocks[0].attn1.to_q.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    noise = get_noise(1, 64, 64, 3, torch.float32, CPU)
    latents = denoise(guide(transformer, trial.prompts, SETTINGS), noise, SETTINGS)
    return latents, seen


@pytest.mark.parametrize(("to", "ending"), [("int8", "safetensors"), ("q4_0", "gguf")])
def test_the_error_is_that_of_the_same_run_by_hand(tmp_path, trial, to, ending):
    out, told = tmp_path / f"out.{ending}", []
    made = convert_and_measure(
        make_stage(DEMO), to, out, trial, on_stage=told.append, on_written=lambda: told.append(out.exists())
    )
    (before, seen), (after, _) = by_hand(DEMO, trial), by_hand(out, trial)
    assert made.run_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    assert made.run_error > 1e-4
    assert told == ["the original's run", f"writing {to}", True, "the converted one's run"]
    assert made.bytes_after == out.stat().st_size
    assert made.bytes_before == sum(
        weight.nbytes for weight in load_transformer_state_dict(inspect(DEMO)).values()
    )
    # Its output's error, on all tokens of all steps where the study takes some of them.
    error = next(layer for layer in made.layers if layer.name == "blocks.0.attn.qkv.weight")
    names = [f"transformer_blocks.0.attn1.to_{letter}.weight" for letter in "qkv"]
    weight, changed = (_joined(path, names) for path in (DEMO, out))
    inputs = torch.cat(seen)
    expected = (inputs @ (changed - weight).T).norm() / (inputs @ weight.T).norm()
    assert error.output == pytest.approx(float(expected), rel=0.2)
    assert all(layer.output is not None for layer in made.layers)


def _joined(path, names):
    state = load_transformer_state_dict(inspect(path))
    parts = [state[name] for name in names]
    return torch.cat(
        [part if isinstance(part, torch.Tensor) else part.dequantise() for part in parts]
    ).float()


def test_what_goes_into_a_layer_is_seen_at_each_step(trial):
    name = "transformer_blocks.0.attn1.to_q.weight"
    latents, inputs = trial.run(make_stage(DEMO), Ways(), watched=[name])
    by_hands, seen = by_hand(DEMO, trial)
    assert torch.equal(latents, by_hands) and inputs.keys() == {name}
    # Two steps of a guided picture of 4 x 4 tokens, of which 8 are kept, the first and the last among them.
    chosen = torch.tensor([0, 4, 8, 13, 17, 22, 26, 31])
    assert torch.equal(inputs[name], torch.cat([tokens[chosen] for tokens in seen]))


def test_nothing_is_lost_where_nothing_changes(tmp_path, trial):
    weights = {name: weight.bfloat16() for name, weight in load_transformer_state_dict(inspect(DEMO)).items()}
    folder = tmp_path / "demo"
    folder.mkdir()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((DEMO / "transformer" / "config.json").read_bytes())
    made = convert_and_measure(make_stage(folder), "bf16", tmp_path / "out.safetensors", trial)
    assert made.run_error == 0
    assert {(layer.weight, layer.output) for layer in made.layers} == {(0.0, 0.0)}


def test_one_transformer_is_in_memory_at_a_time(tmp_path, trial, monkeypatch):
    held = []
    stage = make_stage(DEMO)

    def load(self, place, load=TransformerStage.load):
        held.append(len(stage.stages._held))
        return load(self, place)

    monkeypatch.setattr(TransformerStage, "load", load)
    convert_and_measure(stage, "fp8", tmp_path / "out.safetensors", trial)
    assert held == [0, 0] and not stage.stages._held


def test_without_a_run_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(TransformerStage, "load", lambda *_: 1 / 0)
    made = convert_and_measure(make_stage(DEMO), "q8_0", tmp_path / "out.gguf")
    assert made.run_error is None and made.settings is None
    assert all(layer.output is None and 0 < layer.weight < 0.02 for layer in made.layers)
    assert made.as_dict()["run"] is None
    assert "output" not in made.table() and "latents" not in made.table()


def test_prompts_of_another_width_are_named():
    embeddings = PromptEmbeddings(torch.zeros(1, 2, 64), torch.zeros(1, 2, 64))
    with pytest.raises(SigmaError, match="64 wide, and .* reads 128"):
        trial_of(SETTINGS, embeddings, make_stage(DEMO))


def test_without_guidance_there_is_no_negative_prompt():
    embeddings = PromptEmbeddings(torch.zeros(1, 2, 128), torch.zeros(1, 3, 128), "yes", "no")
    made = trial_of(replace(SETTINGS, guidance_scale=1.0), embeddings, make_stage(DEMO))
    assert made.prompts.negative_embeds is None and made.settings.prompt == "yes"


def test_the_table_has_the_worst_first(tmp_path):
    layers = [LayerError(f"blocks.{n}.x.weight", "Q8_0", 0.01, n / 1000) for n in range(30)]
    made = Conversion("q8_0", tmp_path, layers, 10**7, 6 * 10**6, SETTINGS, 0.0123)
    lines = made.table().splitlines()
    assert lines[0].split() == ["layer", "form", "weight", "output"]
    assert lines[1].split() == ["blocks.29.x", "Q8_0", "1.00%", "2.90%"]
    assert lines[12].split()[0] == "blocks.18.x" and lines[13].startswith("median of all 30")
    assert lines[13].endswith("1.45%")
    assert lines[15] == "q8_0: 10.0 MB -> 6.0 MB (60%)"
    assert lines[16] == "a run of 2 steps at 64x64 from seed 3: latents 1.23% off"


def test_the_ways_of_a_run_are_kept(tmp_path, trial):
    """Prompts in turn give the same."""
    errors = [
        convert_and_measure(
            make_stage(DEMO),
            "int8",
            tmp_path / f"{in_turn}.safetensors",
            trial,
            Ways(guidance_in_turn=in_turn),
        ).run_error
        for in_turn in (False, True)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
