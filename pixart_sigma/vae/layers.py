"""The decoder of an SDXL VAE, of diffusers or ComfyUI, as a list of layers, and what each of them needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Resnet:
    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None


@dataclass(frozen=True)
class Attention:
    norm: nn.GroupNorm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module


@dataclass(frozen=True)
class Upsample:
    conv: nn.Conv2d


@dataclass(frozen=True)
class Decoder:
    """The layers of a decoder of the SDXL VAE's kind, in the order they run."""

    quant: nn.Conv2d | None
    conv_in: nn.Conv2d
    blocks: tuple[Resnet | Attention | Upsample, ...]
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d


def read_decoder(vae: nn.Module) -> Decoder | None:
    """The decoder of a diffusers AutoencoderKL or of ComfyUI's, None for another kind of VAE."""
    decoder: Any = getattr(vae, "decoder", None)
    try:
        if hasattr(decoder, "mid_block"):
            blocks, norm_out = _diffusers_blocks(decoder), decoder.conv_norm_out
        elif hasattr(decoder, "mid"):
            blocks, norm_out = _original_blocks(decoder), decoder.norm_out
        else:
            return None
        return Decoder(
            getattr(vae, "post_quant_conv", None),
            _same_size(decoder.conv_in),
            tuple(blocks),
            norm_out,
            _same_size(decoder.conv_out),
        )
    except AttributeError:
        return None


def _diffusers_blocks(decoder) -> Iterator:
    def resnet(block):
        return _resnet_of(block, block.conv_shortcut)

    middle = decoder.mid_block
    yield resnet(middle.resnets[0])
    for attention, following in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            yield Attention(
                attention.group_norm, attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
            )
        yield resnet(following)
    for level in decoder.up_blocks:
        yield from map(resnet, level.resnets)
        for upsampler in level.upsamplers or ():
            yield Upsample(_same_size(upsampler.conv))


def _original_blocks(decoder) -> Iterator:
    def resnet(block):
        return _resnet_of(block, getattr(block, "nin_shortcut", None))

    middle = decoder.mid
    yield resnet(middle.block_1)
    attention = middle.attn_1
    yield Attention(attention.norm, attention.q, attention.k, attention.v, attention.proj_out)
    yield resnet(middle.block_2)
    for level in reversed(decoder.up):
        if len(level.attn):
            raise AttributeError("attention above the middle")
        yield from map(resnet, level.block)
        if hasattr(level, "upsample"):
            yield Upsample(_same_size(level.upsample.conv))


def _resnet_of(block, shortcut) -> Resnet:
    return Resnet(block.norm1, _same_size(block.conv1), block.norm2, _same_size(block.conv2), shortcut)


def _same_size(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution, which must be one that a strip of rows can be given to with a row above and below.

    It is not copied: a host may say on the module, when it loads it, where its weights are.
    """
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3) or conv.padding != (1, 1):
        raise AttributeError("another kind of convolution")
    return conv


@dataclass(frozen=True)
class Layer:
    """A layer, the map (height, width) it makes, and what it needs, in numbers rather than bytes.

    channels: of the map it reads. at_work: what a strip needs per pixel of the map it reads, which are its
    rows, the same normalised, and at the picture's edge the same with zeros around. waiting: the most that
    waits between two strips. beside: what stays on the device throughout.
    """

    block: Any  # nn.Conv2d, Resnet, Attention or Upsample
    channels: int
    height: int
    width: int
    at_work: int
    waiting: int
    beside: int = 0

    @property
    def scale(self) -> int:
        """Rows that a row of the map it reads becomes."""
        return 2 if isinstance(self.block, Upsample) else 1

    @property
    def rows(self) -> int:
        """Rows that it makes, in all its passes."""
        return self.height * (2 if isinstance(self.block, Resnet | Attention) else 1)


def layers_of(decoder: Decoder, height: int, width: int) -> Iterator[Layer]:
    """The layers of the decode of a latent (1, 4, height, width)."""
    for block in (decoder.conv_in, *decoder.blocks, decoder.conv_out):
        pixels = height * width
        if isinstance(block, Resnet):
            wide, narrow = block.conv1.in_channels, block.conv1.out_channels
            waiting = wide + narrow if block.shortcut is None else max(wide, 2 * narrow)
            yield Layer(block, wide, height, width, 3 * max(wide, narrow), waiting * pixels)
        elif isinstance(block, Attention):
            wide = block.norm.num_channels
            yield Layer(block, wide, height, width, 6 * wide, wide * pixels, 2 * wide * pixels)
        elif isinstance(block, Upsample):
            wide, height, width = block.conv.in_channels, 2 * height, 2 * width
            yield Layer(block, wide, height, width, 12 * wide, wide * 4 * pixels)
        else:
            wide = max(block.in_channels, block.out_channels)
            yield Layer(block, block.in_channels, height, width, 3 * wide, wide * pixels)
