"""Qwen2.5's decoder as far as stage 1 runs it: text alone, no cache, no final norm. Weights are named as transformers'.

transformers' own class takes seconds to import; this one gives the same bits.

Letters: B batch, L tokens, C width, H heads of D.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class LanguageConfig:
    """What makes a LanguageModel; names and defaults are those of transformers' Qwen2_5_VLTextConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_theta": 1e6})


class Hidden(NamedTuple):
    """The states behind the last layer, [B, L, C]."""

    last_hidden_state: torch.Tensor


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32 up to the product."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] → [B, L, C]."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


class Rope(nn.Module):
    """Rotation by position. Text has one position on all three of Qwen2.5-VL's axes, so that its sections are no matter."""

    inv_freq: torch.Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size // config.num_attention_heads
        # Never on the meta device, where it would import torch's compiler; and of the CPU's bits wherever it goes.
        exponent = torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width
        self.register_buffer("inv_freq", 1.0 / config.rope_parameters["rope_theta"] ** exponent, persistent=False)

    def forward(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [L, D], computed in float32."""
        positions = torch.arange(length, device=self.inv_freq.device)
        angles = positions[:, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each head's first half and second half as the two parts of complex numbers, turned; x [B, H, L, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention in which several heads share keys and values."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.head_width = config.hidden_size, config.hidden_size // config.num_attention_heads
        shared = config.num_key_value_heads * self.head_width
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, shared)
        self.v_proj = nn.Linear(width, shared)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, L, C] → [B, L, C]."""
        q, k, v = (
            rearrange(projection(x), "b l (h d) -> b h l d", d=self.head_width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=x.shape[1] > 1, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(rearrange(attended, "b h l d -> b l (h d)"))


class Mlp(nn.Module):
    """SiLU-gated feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] → [B, L, C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, L, C] → [B, L, C]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """All layers of config, a LanguageConfig or transformers' own.

    Source: transformers' Qwen2_5_VLTextModel with attention by scaled_dot_product_attention.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        # Drawing an embedding on the meta device would import torch's compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.rotary_emb = Rope(config)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Hidden:
        """Tokens [B, L] → states [B, L, C]; padding may follow, which changes nothing before it.

        use_cache: as transformers' class has it; there is none here.
        """
        assert not use_cache
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(x.shape[1], x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return Hidden(x)
