"""The latent upsamplers of super resolution: they correct latents that interpolation has enlarged, at the same size.

Module names are those of the official checkpoints. Everything is causal in time and nothing mixes frames but the
convolutions, so a video goes through in chunks of frames, each convolution remembering the last two frames of its input.

Letters: T latent frames, H x W positions, C channels.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.vae_modules import Cache, CausalConv, ChannelNorm

# Config entries of each kind; with a default where the official code has one.
REQUIRED = {"720p": ("in_channels", "out_channels"), "1080p": ("z_channels", "out_channels")}
DEFAULT_HIDDEN_CHANNELS, DEFAULT_BLOCKS, DEFAULT_RES_BLOCKS = 64, 6, 2
# Of 512 channels at 1080p a chunk of as many is 63 MiB.
FRAMES_PER_CHUNK = 4


class ResidualBlock(nn.Module):
    """A block of the 720p upsampler: three convolutions with SiLU between them, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # At 1 and 3 of the official list stand activations.
        self.block = nn.ModuleDict({name: CausalConv(channels, channels) for name in ("0", "2", "4")})

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        h = self.block["0"](x, cache)
        for name in ("2", "4"):
            h = self.block[name](F.silu(h), cache)
        return x + h


class LatentUpsampler720p(nn.Module):
    """Plain residual blocks without norms; with global_residual the input is added to the output."""

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int, num_blocks: int, global_residual: bool
    ) -> None:
        super().__init__()
        self.in_conv = CausalConv(in_channels, hidden_channels)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_channels) for _ in range(num_blocks))
        self.out_conv = CausalConv(hidden_channels, out_channels)
        self.global_residual = global_residual

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One chunk of frames [1, C, T, H, W] → [1, C', T, H, W]."""
        h = self.in_conv(x, cache)
        for block in self.blocks:
            h = block(h, cache)
        h = self.out_conv(h, cache)
        return h + x if self.global_residual else h


class ResnetBlock(nn.Module):
    """A block of the 1080p upsampler: norm, SiLU and convolution twice; a 1 x 1 x 1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(in_channels), CausalConv(in_channels, out_channels)
        self.norm2, self.conv2 = ChannelNorm(out_channels), CausalConv(out_channels, out_channels)
        self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)), cache)
        h = self.conv2(F.silu(self.norm2(h)), cache)
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Level(nn.Module):
    """The blocks of one width in the 1080p upsampler; the first one changes to it."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(*pair) for pair in pairwise(widths))


class LatentUpsampler1080p(nn.Module):
    """The VAE decoder's kind of blocks, on a grid that stays as it is."""

    def __init__(self, z_channels: int, out_channels: int, block_out_channels: list[int], num_res_blocks: int) -> None:
        super().__init__()
        first = block_out_channels[0]
        self.repeats = first // z_channels
        self.conv_in = CausalConv(z_channels, first)
        widths = [first, *block_out_channels]
        self.up = nn.ModuleList(Level(*pair, num_res_blocks + 1) for pair in pairwise(widths))
        self.norm_out, self.conv_out = ChannelNorm(widths[-1]), CausalConv(widths[-1], out_channels)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One chunk of frames [1, C, T, H, W] → [1, C', T, H, W]."""
        h = self.conv_in(x, cache) + x.repeat_interleave(self.repeats, dim=1)
        for level in self.up:
            for block in level.block:  # type: ignore[union-attr]
                h = block(h, cache)
        return self.conv_out(F.silu(self.norm_out(h)), cache)


LatentUpsampler = LatentUpsampler720p | LatentUpsampler1080p


def build_upsampler(kind: str, config: Mapping[str, Any]) -> LatentUpsampler:
    """The upsampler of a kind, with weights as torch initialises them, from the entries of an official config.json.

    Entries that it does not know are passed over. Raises InputError for one that is absent or makes no sense.
    """

    def number(name: str, default: int | None = None) -> int:
        value = default if config.get(name) is None else config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; allowed is a whole number above 0")
        return value

    inputs, outputs = (number(name) for name in REQUIRED[kind])
    if kind == "720p":
        residual = config.get("global_residual") or False
        if residual and inputs != outputs:
            raise InputError(f"global_residual adds {inputs} channels to {outputs}; allowed are as many")
        hidden, blocks = number("hidden_channels", DEFAULT_HIDDEN_CHANNELS), number("num_blocks", DEFAULT_BLOCKS)
        return LatentUpsampler720p(inputs, outputs, hidden, blocks, bool(residual))
    widths = config.get("block_out_channels")
    whole = isinstance(widths, list) and all(isinstance(width, int) and width > 0 for width in widths)
    if not widths or not whole or widths[0] % inputs:
        raise InputError(f"block_out_channels is {widths!r}; allowed is a list of widths, the first of n x {inputs}")
    return LatentUpsampler1080p(inputs, outputs, widths, number("num_res_blocks", DEFAULT_RES_BLOCKS))


@torch.no_grad()
def run_upsampler(
    upsampler: LatentUpsampler, latents: torch.Tensor, frames_per_chunk: int = FRAMES_PER_CHUNK
) -> torch.Tensor:
    """Latents [1, 32, T, H, W] → the same shape, float32, on the upsampler's device. Chunks change only the rounding.

    In true float32: cuDNN would take TF32 by default, for no speed that matters here.
    """
    weight = next(upsampler.parameters())
    latents, cache = latents.to(weight.device, torch.float32), Cache()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([upsampler(chunk, cache) for chunk in latents.split(frames_per_chunk, dim=2)], dim=2)
