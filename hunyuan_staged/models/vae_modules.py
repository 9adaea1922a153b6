"""The VAE's modules: its weights under diffusers' names, and forwards for training, over batches and with gradients.

The stages compute the same otherwise, in chunks: vae_encoder.py, vae_decoder.py. The modules mirror diffusers'
AutoencoderKLHunyuanVideo15, from which every name and default here is taken. Its levels go from pixels to latents; the
decoder has them in reverse.

Letters: B clips, T frames, H x W positions, C channels of a level; every x is [B, C, T, H, W].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from hunyuan_staged.models.vae_attention import frame_causal_attention

Cache = dict[nn.Module, torch.Tensor]  # the last two frames [B, C, 2, H, W] of each convolution's input


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

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """[B, C, T, H, W] → [B, C', T, H, W]. For a video in chunks, cache takes what this one leaves for the next."""
        front = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        if cache is not None:
            front = cache.get(self, front)
        x = torch.cat([front, x], dim=2)
        if cache is not None:
            cache[self] = x[:, :, -2:].clone()
        return self.conv(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))


class ChannelNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.float(), dim=1).to(x.dtype) * len(self.gamma) ** 0.5 * self.gamma


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut that is linear where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs)
        self.norm2 = ChannelNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs)
        self.conv_shortcut = nn.Conv3d(inputs, outputs, kernel_size=1) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))) + shortcut


class FrameCausalAttention(nn.Module):
    """Attention of one head, in which a position sees its own frame and all earlier ones, and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_q, self.to_k, self.to_v, self.proj_out = (
            nn.Conv3d(channels, channels, kernel_size=1) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        query, key, value = (
            rearrange(project(normed), "b c t h w -> b t (h w) c") for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = frame_causal_attention(query, key, value)
        return self.proj_out(rearrange(attended, "b t (h w) c -> b c t h w", h=x.shape[3])) + x


class MidBlock(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def to_channels(x: torch.Tensor, time: int) -> torch.Tensor:
    """[B, C, T * time, 2 H, 2 W] → [B, time * 2 * 2 * C, T, H, W]."""
    return rearrange(x, "n c (t a) (h b) (w d) -> n (a b d c) t h w", a=time, b=2, d=2)


def to_positions(x: torch.Tensor, time: int) -> torch.Tensor:
    """The inverse of to_channels."""
    return rearrange(x, "n (a b d c) t h w -> n c (t a) (h b) (w d)", a=time, b=2, d=2)


def channel_means(x: torch.Tensor, channels: int) -> torch.Tensor:
    """[B, C, ...] → [B, channels, ...], each the mean of C / channels neighbours."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.conv(x)
        if not self.add_temporal_upsample:
            return to_positions(values, 1) + to_positions(x.repeat_interleave(self.repeats, dim=1), 1)
        # The first frame stays one: of its two halves in time the earlier.
        first = to_positions(values[:, :, :1], 1).chunk(2, dim=1)[0]
        first = first + to_positions(x[:, :, :1], 1).repeat_interleave(self.repeats // 2, dim=1)
        later = to_positions(values[:, :, 1:], 2) + to_positions(x[:, :, 1:], 2).repeat_interleave(self.repeats, dim=1)
        return torch.cat([first, later], dim=2)


class Downsample(nn.Module):
    """Half as high and wide, and with add_temporal_downsample half as long but for a video's first frame."""

    def __init__(self, inputs: int, outputs: int, *, add_temporal_downsample: bool) -> None:
        super().__init__()
        positions = 8 if add_temporal_downsample else 4
        self.conv = CausalConv(inputs, outputs // positions)
        self.add_temporal_downsample = add_temporal_downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.conv(x)
        if not self.add_temporal_downsample:
            values, x = to_channels(values, 1), to_channels(x, 1)
            return values + channel_means(x, values.shape[1])
        # The first frame has no partner in time: its channels stand for both.
        first, later = to_channels(values[:, :, :1], 1).repeat(1, 2, 1, 1, 1), to_channels(values[:, :, 1:], 2)
        first = first + channel_means(to_channels(x[:, :, :1], 1), first.shape[1])
        return torch.cat([first, later + channel_means(to_channels(x[:, :, 1:], 2), later.shape[1])], dim=2)


class UpBlock(nn.Module):
    """A level of the decoder."""

    def __init__(self, inputs: int, outputs: int, layers: int, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList([ResnetBlock(*widths[i : i + 2]) for i in range(layers)])
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *(self.upsamplers or ())):
            x = layer(x)
        return x


class DownBlock(nn.Module):
    """A level of the encoder."""

    def __init__(self, inputs: int, outputs: int, layers: int, downsample: Downsample | None) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList([ResnetBlock(*widths[i : i + 2]) for i in range(layers)])
        self.downsamplers = None if downsample is None else nn.ModuleList([downsample])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *(self.downsamplers or ())):
            x = layer(x)
        return x


class VaeDecoder(nn.Module):
    """All weights of the decoder. repeat: how often the first shortcut has each channel of the latents."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
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

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, latent channels, t, h, w] → [B, 3, T, H, W] of about [-1, 1]."""
        x = self.mid_block(self.conv_in(latents) + latents.repeat_interleave(self.repeat, dim=1))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VaeEncoder(nn.Module):
    """All weights of the encoder. time_ratio, space_ratio: frames to latents, px to latents."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.time_ratio, self.space_ratio = config.temporal_compression_ratio, config.spatial_compression_ratio
        widths, outputs = [*config.block_out_channels], 2 * config.latent_channels
        self.conv_in = CausalConv(config.in_channels, widths[0])
        blocks, inputs = [], widths[0]
        for level, width in enumerate(widths):
            downsample, behind = None, width
            if 2**level < self.space_ratio:
                shorter = 2**level >= self.space_ratio // self.time_ratio
                behind = widths[level + 1] if config.downsample_match_channel else width
                downsample = Downsample(width, behind, add_temporal_downsample=shorter)
            blocks.append(DownBlock(inputs, width, config.layers_per_block, downsample))
            inputs = behind
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], outputs)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """[B, 3, T, H, W] in [-1, 1] → the posterior's means, then log-variances, [B, 2 x latent channels, t, h, w]."""
        x = self.conv_in(video)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.norm_out(x))) + channel_means(x, self.conv_out.conv.out_channels)


class Vae(nn.Module):
    """Encoder and decoder, as one file holds them."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VaeEncoder(config)
        self.decoder = VaeDecoder(config)
