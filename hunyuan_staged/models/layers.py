"""The layers that the transformer's modules are made of; their names and epsilons are diffusers'.

Letters: B batch, L text tokens, S video tokens; H heads, D head width, C = H*D.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SINUSOID_CHANNELS = 256  # what the timestep is expanded to
EPSILON = 1e-6  # of every norm but those of the glyph and image embedders, which have torch's default


def sinusoid(timestep: torch.Tensor) -> torch.Tensor:
    """[B] → [B, 256], float32: cosines, then sines, at frequencies 10000^(-i/128).

    Source: get_timestep_embedding in diffusers, with flip_sin_to_cos and no shift of the frequencies.
    """
    half = SINUSOID_CHANNELS // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep[:, None].float() * torch.exp(exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TwoLayers(nn.Module):
    """Linear, SiLU, linear: [..., inputs] → [..., C]."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, the mean in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPSILON)
        # Half precision is rounded before the product, as in diffusers; float32 is no other either way.
        return normed.to(self.weight.dtype) * self.weight


def plain_norm(width: int) -> nn.LayerNorm:
    """A layer norm without weights, as modulation supplies them."""
    return nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)


class ModulatedNorm(nn.Module):
    """A layer norm and the linear map from temb to what modulates it: `parts` vectors of C."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.norm = plain_norm(width)


class OutputNorm(ModulatedNorm):
    """The last norm; its linear map gives scale, then shift, the other way round than a block's."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """[B, S, C], temb [B, C] → [B, S, C]."""
        scale, shift = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Gates(nn.Module):
    """The refiner's modulation: two gates from temb [B, C], each [B, 1, C], for attention and feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)


class Projection(nn.Module):
    """The first linear map of a feed-forward."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)


class FeedForward(nn.Module):
    """Linear, SiLU or tanh-form GELU, linear: [B, L, C] → [B, L, C]."""

    def __init__(self, width: int, ratio: float, *, activation: str) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.activation = activation
        # diffusers has a dropout between the two, which takes a number in their names.
        self.net: Any = nn.ModuleList([Projection(width, hidden), nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.net[0].proj(x)
        return self.net[2](F.silu(hidden) if self.activation == "silu" else F.gelu(hidden, approximate="tanh"))


class SelfAttention(nn.Module):
    """q, k, v and output of H heads, all with a bias."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        width = heads * head_width
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L, C] → [B, L, C]; mask: which keys are seen, broadcast to [B, H, L, L]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
