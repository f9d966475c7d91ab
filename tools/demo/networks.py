"""The demo's networks before training, the reader that teaches T5, and the noise schedule."""

import math
import random
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from drawings import COLORS, POSITIONS, RELATIONS, SHAPES, SIZES, Scene, caption, random_scene
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

SCALING_FACTOR = 0.13025
# The noise of a drawn picture's latents, the posterior's.
LATENT_NOISE = 0.05 / SCALING_FACTOR
MAX_TOKENS = 300
# Patch-grid positions span [0, 32) as in every Sigma checkpoint: sample_size // 2 / scale.
SAMPLE_SIZE, INTERPOLATION_SCALE = 32, 0.5


def new_vae() -> AutoencoderKL:
    """Four levels, 96 wide where the last normalisation stands.

    Both ends of the VAE normalise in 32 groups just before their last convolution. A group of one channel
    loses the picture's mean colour, one of two keeps its sign alone; three channels let it through.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(96, 32, 32, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def start_linear(vae: AutoencoderKL):
    """Start as a chain of plain convolutions that passes colours; the residual blocks come in by learning.

    Before the two last normalisations, two opposite constants in each group of three channels let the third
    pass nearly linearly.
    """
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                # PyTorch's start shrinks the signal by sqrt(3) per layer; this one keeps it.
                module.weight *= 3**0.5
                module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight.zero_()
                module.to_out[0].bias.zero_()
        anchors = torch.tensor([0.0, 3.0, -3.0]).repeat(32)
        for resnet in (vae.encoder.mid_block.resnets[-1], vae.decoder.up_blocks[-1].resnets[-1]):
            resnet.conv2.bias += anchors


def freeze_ends(vae: AutoencoderKL):
    """Hold the constants and the last normalisations: they drift together and shift all colours at once."""
    vae.encoder.conv_norm_out.requires_grad_(False)
    vae.decoder.conv_norm_out.requires_grad_(False)
    vae.encoder.mid_block.resnets[-1].conv2.bias.requires_grad_(False)
    vae.decoder.up_blocks[-1].resnets[-1].conv2.bias.requires_grad_(False)


def make_tokenizer(work: Path) -> T5Tokenizer:
    folder = work / "tokenizer"
    if not (folder / "spiece.model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        corpus = [caption(random_scene(rng), rng) for _ in range(4000)]
        corpus += ["abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?'\"()-/&%+ " + name for name in COLORS] * 40
        (work / "captions.txt").write_text("\n".join(corpus))
        sentencepiece.SentencePieceTrainer.train(
            input=str(work / "captions.txt"),
            model_prefix=str(folder / "spiece"),
            vocab_size=256,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
        )
        (folder / "spiece.vocab").unlink()
    return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def new_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
        )
    )
    look_at_neighbours(text_encoder)
    return text_encoder


@torch.no_grad()
def look_at_neighbours(text_encoder: T5EncoderModel):
    """Start with one head that reads the token before, one the token after, and one the four on each side.

    Word order enters T5 by these biases alone. From T5's own start, near zero, they take thousands of steps
    to grow, and until then the encoder knows which colours are named but not of what.
    """
    bias = text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before, after = slice(1, 5), slice(17, 21)  # rows of the distances 1 to 4
    bias.zero_()
    bias[before.start, 0] = bias[after.start, 1] = 5
    bias[before, 2] = bias[after, 2] = 3


def encode_texts(tokenizer, text_encoder, texts):
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return hidden, tokens.attention_mask


class Reader(nn.Module):
    """Reads what a caption says by attention to its tokens, as the transformer does; used in training alone.

    Real T5 knows language before Sigma meets it. The transformer's error alone teaches this one the colours
    soon, but only very slowly what each was said of.
    """

    ANSWERS = (None, *COLORS, *SHAPES, *SIZES, *POSITIONS, *RELATIONS)

    def __init__(self, width: int):
        super().__init__()
        self.questions = nn.Parameter(torch.randn(10, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answer = nn.Linear(width, len(self.ANSWERS))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """Mean cross-entropy of the answers to ten questions about hidden (B, L, width)."""
        said = torch.tensor(
            [[self.ANSWERS.index(answer) for answer in self.facts(scene)] for scene in scenes]
        )
        questions = self.questions.expand(len(hidden), -1, -1)
        read = self.attention(questions, hidden, hidden, key_padding_mask=mask == 0, need_weights=False)[0]
        return functional.cross_entropy(self.answer(read).flatten(0, 1), said.flatten())

    @staticmethod
    def facts(scene: Scene) -> list[str | None]:
        facts = [scene.background, scene.relation]
        for thing in (*scene.objects, None)[:2]:
            facts += [thing.color, thing.shape, thing.size, thing.position] if thing else [None] * 4
        return facts


def new_transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=5,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=192,
        caption_channels=128,
        sample_size=SAMPLE_SIZE,
        interpolation_scale=INTERPOLATION_SCALE,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
        attention_bias=True,
    )


def initialise(transformer: PixArtTransformer2DModel):
    """Zero gates and a zero head, as DiT starts (arXiv 2212.09748, section 3.2)."""
    for layer in (transformer.proj_out, transformer.adaln_single.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def new_schedule() -> DDPMScheduler:
    """The schedule that Sigma was trained with."""
    return DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
