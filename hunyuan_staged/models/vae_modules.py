"""The VAE's modules: its weights under diffusers' names, on the meta device shapes without memory.

They mirror diffusers' AutoencoderKLHunyuanVideo15, from which every name and default here is taken. The levels of the
VAE go from pixels to latents; the decoder has them in reverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class VaeConfig:
    """diffusers' arguments of the VAE. Raises TypeError for an argument that it does not have."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: Sequence[int] = (128, 256, 512, 1024, 1024)
    layers_per_block: int = 2
    spatial_compression_ratio: int = 16
    temporal_compression_ratio: int = 4
    downsample_match_channel: bool = True
    upsample_match_channel: bool = True
    scaling_factor: float = 1.03682


class CausalConv(nn.Module):
    """A 3 x 3 x 3 convolution that sees the two frames before and none after; edges are repeated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel_size=3)


class ChannelNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut that is linear where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs)
        self.norm2 = ChannelNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs)
        self.conv_shortcut = nn.Conv3d(inputs, outputs, kernel_size=1) if inputs != outputs else None


class FrameCausalAttention(nn.Module):
    """Attention of one head, in which a position sees its own frame and all earlier ones, and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_q, self.to_k, self.to_v, self.proj_out = (
            nn.Conv3d(channels, channels, kernel_size=1) for _ in range(4)
        )


class MidBlock(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels) for _ in range(2)])


class Upsample(nn.Module):
    """Twice as high and wide, and with add_temporal_upsample twice as long but for a video's first frame.

    repeats: how often the shortcut has each channel of the input.
    """

    def __init__(self, inputs: int, outputs: int, *, add_temporal_upsample: bool) -> None:
        super().__init__()
        positions = 8 if add_temporal_upsample else 4
        self.conv = CausalConv(inputs, outputs * positions)
        self.add_temporal_upsample = add_temporal_upsample
        self.repeats = positions * outputs // inputs


class Downsample(nn.Module):
    """Half as high and wide, and with add_temporal_downsample half as long but for a video's first frame.

    group_size: how many channels of the packed input the shortcut has the mean of.
    """

    def __init__(self, inputs: int, outputs: int, *, add_temporal_downsample: bool) -> None:
        super().__init__()
        positions = 8 if add_temporal_downsample else 4
        self.conv = CausalConv(inputs, outputs // positions)
        self.add_temporal_downsample = add_temporal_downsample
        self.group_size = positions * inputs // outputs


class UpBlock(nn.Module):
    """A level of the decoder."""

    def __init__(self, inputs: int, outputs: int, layers: int, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList([ResnetBlock(*widths[i : i + 2]) for i in range(layers)])
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])


class DownBlock(nn.Module):
    """A level of the encoder."""

    def __init__(self, inputs: int, outputs: int, layers: int, downsample: Downsample | None) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList([ResnetBlock(*widths[i : i + 2]) for i in range(layers)])
        self.downsamplers = None if downsample is None else nn.ModuleList([downsample])


class VaeDecoder(nn.Module):
    """All weights of the decoder. repeat: how often the first shortcut has each channel of the latents."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = [*reversed(config.block_out_channels)]
        self.repeat = widths[0] // config.latent_channels
        self.conv_in = CausalConv(config.latent_channels, widths[0])
        blocks, inputs = [], widths[0]
        for level, width in enumerate(widths):
            upsample, outputs = None, width
            longer = 2**level < config.temporal_compression_ratio
            if longer or 2**level < config.spatial_compression_ratio:
                outputs = widths[level + 1] if config.upsample_match_channel else width
                upsample = Upsample(width, outputs, add_temporal_upsample=longer)
            blocks.append(UpBlock(inputs, width, config.layers_per_block + 1, upsample))
            inputs = outputs
        self.up_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[0])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.out_channels)


class VaeEncoder(nn.Module):
    """All weights of the encoder. group_size: how many channels the last shortcut has the mean of."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        widths, outputs = [*config.block_out_channels], 2 * config.latent_channels
        self.group_size = widths[-1] // outputs
        self.conv_in = CausalConv(config.in_channels, widths[0])
        blocks, inputs = [], widths[0]
        for level, width in enumerate(widths):
            downsample, behind = None, width
            if 2**level < config.spatial_compression_ratio:
                shorter = 2**level >= config.spatial_compression_ratio // config.temporal_compression_ratio
                behind = widths[level + 1] if config.downsample_match_channel else width
                downsample = Downsample(width, behind, add_temporal_downsample=shorter)
            blocks.append(DownBlock(inputs, width, config.layers_per_block, downsample))
            inputs = behind
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], outputs)


class Vae(nn.Module):
    """Encoder and decoder, as one file holds them."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VaeEncoder(config)
        self.decoder = VaeDecoder(config)
