"""Tiny random checkpoints in every published format; made once per session, so tests must not write to them.

Two transformer layers of 2 heads of 72, a T5 of width 64 with a real SentencePiece tokenizer, and a VAE of
4 levels of 32 channels. Tests that change a checkpoint copy it, or write their own with `write_original`.
"""

import json
import shutil
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

WIDTH, HEADS, HEAD_DIM, LAYERS, CAPTION_CHANNELS = 144, 2, 72, 2, 64
SENTENCES = """A small red house stands beside a quiet lake.
The old sailor looks at the grey sea and smiles.
Two cats sleep on a warm window in the sun.
A photo of an astronaut riding a white horse on the moon.
Green hills under a wide blue sky, painted in oil.
The robot holds a yellow flower in its metal hand.
Night city with neon signs, rain and many people.
A bowl of fresh fruit: apples, pears, grapes and plums.
Snow falls on the dark forest; a fox walks slowly.
Portrait of a woman with long black hair, studio light.
An ancient castle on a rock above the river.
The train leaves the station at 7:45 in the morning.
Five wooden boats are waiting near the stone bridge.
A child draws a large dragon with orange wings!
Low quality, blurry, cropped, worst quality, jpeg artifacts.
Is there a lighthouse behind the golden clouds?
A market full of spices, silk, lamps and music.
Macro picture of a blue butterfly on a leaf.
A knight in silver armor guards the open gate.
Isometric view of a tiny kitchen, cute, very detailed.
Mountains are reflected in the clear water at dawn.
The quick brown fox jumps over the lazy dog.
Pack my box with five dozen liquor jugs.
A bicycle made of glass, floating in space, 8k render.""".splitlines()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fails a test in which anything was looked up or connected to, also where that error was caught."""
    asked, connect = [], socket.socket.connect

    def connecting(self, address):
        if self.family != getattr(socket, "AF_UNIX", None):
            asked.append(address)
            raise ConnectionRefusedError("tests have no network")
        return connect(self, address)

    def looking_up(host, *arguments, **options):
        asked.append(host)
        raise socket.gaierror("tests have no network")

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", looking_up)
    yield
    assert not asked, f"the network was asked for {asked}"


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> Path:
    """The user's cache directory, empty, in place of the real one."""
    folder = tmp_path_factory.mktemp("cache")
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer as PixArt publishes it: spiece.model (pad 0, eos 1, unk 2) and its config."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tiny") / "tokenizer"
    folder.mkdir()
    printable = "".join(map(chr, range(33, 127)))
    with open(folder / "spiece.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=model,
            vocab_size=320,
            hard_vocab_limit=False,
            model_type="unigram",
            required_chars=printable,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    extra = [f"<extra_id_{index}>" for index in range(100)]
    special = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": extra,
    }
    settings = {
        **special,
        "extra_ids": 100,
        "model_max_length": 512,
        "legacy": True,
        "tokenizer_class": "T5Tokenizer",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_transformer():
    """A random diffusers PixArtTransformer2DModel with 1024's positions, float32, in eval mode."""
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=4,
            out_channels=8,
            num_layers=LAYERS,
            cross_attention_dim=WIDTH,
            sample_size=128,
            interpolation_scale=2,
            caption_channels=CAPTION_CHANNELS,
            use_additional_conditions=False,
        )
    return transformer.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def diffusers_state_dict(tiny_transformer) -> dict[str, torch.Tensor]:
    """The weights of `tiny_transformer` under diffusers' keys."""
    return {key: tensor.clone() for key, tensor in tiny_transformer.state_dict().items()}


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory, tokenizer_folder, tiny_transformer) -> Path:
    """A whole pipeline in the layout of PixArt-Sigma-XL-2-1024-MS, by diffusers' save_pretrained."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(tokenizer_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=-(-len(tokenizer) // 64) * 64,
                d_model=CAPTION_CHANNELS,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                dropout_rate=0.0,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            latent_channels=4,
            sample_size=512,
            scaling_factor=0.13025,
            force_upcast=False,
        )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    folder = tmp_path_factory.mktemp("pipeline") / "PixArt-Sigma-Tiny-1024-MS"
    PixArtSigmaPipeline(tokenizer, text_encoder, vae, tiny_transformer, scheduler).save_pretrained(folder)
    # transformers 5 writes a tokenizer.json, which the published folders do not have.
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def transformer_folder(tmp_path_factory, pipeline_folder) -> Path:
    """A transformer-only folder, as the 256, 512 and 2K repositories are: config.json and one safetensors."""
    folder = tmp_path_factory.mktemp("transformer") / "tiny"
    shutil.copytree(pipeline_folder / "transformer", folder)
    return folder


@pytest.fixture(scope="session")
def diffusers_file(tmp_path_factory, diffusers_state_dict) -> Path:
    """The transformer as one safetensors file in diffusers' keys, with no config beside it."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("single") / "tiny_diffusers.safetensors"
    save_file(diffusers_state_dict, path)
    return path


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory, tiny_transformer) -> Path:
    """The transformer in several safetensors shards with an index, by diffusers."""
    folder = tmp_path_factory.mktemp("sharded") / "tiny"
    tiny_transformer.save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.fixture(scope="session")
def to_original():
    """`to_original(state_dict) -> dict`: diffusers' keys to the authors', with q, k, v and k, v fused."""
    return invert_keys


@pytest.fixture(scope="session")
def write_original(diffusers_state_dict):
    """`write_original(path, top=None, prefix="", pos_embed=0, dtype=None, extra=None, **trained) -> Path`:
    the tiny transformer in the authors' keys, as the suffix of `path` says; `trained` as
    for `trained_state_dict`.

    `top` is the key of the pickle that holds the weights, `pos_embed` its number of patches (0: left out).
    """

    def write(path, top=None, prefix="", pos_embed=0, dtype=None, extra=None, **trained):
        weights = invert_keys(with_trained_extras(diffusers_state_dict, **trained))
        weights["y_embedder.y_embedding"] = torch.zeros(300, CAPTION_CHANNELS)
        if pos_embed:
            weights["pos_embed"] = torch.zeros(1, pos_embed, WIDTH)
        weights |= extra or {}
        weights = {
            prefix + key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in weights.items()
        }
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(weights, path)
        else:
            torch.save({top: weights, "epoch": 3} if top else weights, path)
        return Path(path)

    return write


@pytest.fixture(scope="session")
def trained_state_dict(diffusers_state_dict):
    """`trained_state_dict(kv_layers=(), kv_ratio=2, qk_norm=False)`: diffusers' keys, trained extras."""

    return partial(with_trained_extras, diffusers_state_dict)


def with_trained_extras(state_dict, kv_layers=(), kv_ratio=2, qk_norm=False):
    generator = torch.Generator().manual_seed(2)

    def near(value, *shape):
        return value + 0.1 * torch.randn(shape, generator=generator)

    state_dict = dict(state_dict)
    for layer in range(LAYERS):
        attention = f"transformer_blocks.{layer}.attn1"
        if layer in kv_layers:
            state_dict[f"{attention}.sr.weight"] = near(1 / kv_ratio**2, WIDTH, 1, kv_ratio, kv_ratio)
            state_dict[f"{attention}.sr.bias"] = near(0, WIDTH)
        for name, wanted in (("norm", layer in kv_layers), ("norm_q", qk_norm), ("norm_k", qk_norm)):
            if wanted:
                state_dict[f"{attention}.{name}.weight"] = near(1, WIDTH)
                state_dict[f"{attention}.{name}.bias"] = near(0, WIDTH)
    return state_dict


# Written down a second time, the other way round, so that a slip in the engine's map shows.
ORIGINAL_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
    "attn1.to_out.0": "attn.proj",
    "attn1.sr": "attn.sr",
    "attn1.norm": "attn.norm",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def invert_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    original = {}
    for key, tensor in state_dict.items():
        block, rest = "", key
        if key.startswith("transformer_blocks."):
            _, number, rest = key.split(".", 2)
            block = f"blocks.{number}."
        if rest == "scale_shift_table":
            original[block + rest if block else "final_layer.scale_shift_table"] = tensor
            continue
        module, parameter = rest.rsplit(".", 1)
        if module in ("attn1.to_k", "attn1.to_v", "attn2.to_v"):
            continue
        beside = key.removesuffix(f"{module}.{parameter}")
        if module == "attn1.to_q":
            parts = [state_dict[f"{beside}attn1.to_{letter}.{parameter}"] for letter in "qkv"]
            original[f"{block}attn.qkv.{parameter}"] = torch.cat(parts)
        elif module == "attn2.to_k":
            parts = [state_dict[f"{beside}attn2.to_{letter}.{parameter}"] for letter in "kv"]
            original[f"{block}cross_attn.kv_linear.{parameter}"] = torch.cat(parts)
        else:
            original[f"{block}{ORIGINAL_NAMES[module]}.{parameter}"] = tensor
    return original


@pytest.fixture(scope="session")
def small_pipeline_folder(tmp_path_factory, pipeline_folder) -> Path:
    """The same pipeline at the base of 256 px, so that a run is quick."""
    folder = tmp_path_factory.mktemp("small") / "PixArt-Sigma-Tiny-256"
    shutil.copytree(pipeline_folder, folder)
    config_file = folder / "transformer" / "config.json"
    config = json.loads(config_file.read_text()) | {"sample_size": 32, "interpolation_scale": 0.5}
    config_file.write_text(json.dumps(config))
    return folder
