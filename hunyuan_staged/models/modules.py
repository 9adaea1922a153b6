"""The transformer's modules: its weights under diffusers' names, and the forwards of its small parts.

What a block computes is in models/blocks.py, the whole forward in models/transformer.py. The modules mirror diffusers'
HunyuanVideo15Transformer3DModel, from which every name, default and epsilon here is taken.

Letters: B batch, L text tokens, S video tokens; H heads, D head width, C = H*D.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_staged.models.layers import (
    EPSILON,
    SINUSOID_CHANNELS,
    FeedForward,
    Gates,
    ModulatedNorm,
    OutputNorm,
    RmsNorm,
    SelfAttention,
    TwoLayers,
    plain_norm,
    sinusoid,
)

GLYPH_HIDDEN = 2048  # of the glyph projection, whatever the transformer's width
TOKEN_KINDS = 3  # language, glyph, image


@dataclass(frozen=True)
class TransformerConfig:
    """diffusers' arguments of the transformer. target_size and task_type are kept, and change nothing here.

    Raises TypeError for an argument that it does not have, ValueError for a qk_norm other than rms_norm.
    """

    in_channels: int = 65
    out_channels: int = 32
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    num_layers: int = 54
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 1
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    text_embed_dim: int = 3584
    text_embed_2_dim: int = 1472
    image_embed_dim: int = 1152
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    target_size: int = 640
    task_type: str | None = "i2v"
    use_meanflow: bool = False

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm":
            raise ValueError(f"qk_norm is {self.qk_norm!r}; allowed: 'rms_norm'")

    @property
    def width(self) -> int:
        """C."""
        return self.num_attention_heads * self.attention_head_dim


# -- embedders --


class TimeEmbedding(nn.Module):
    """The timestep's embedding; for meanflow, plus that of the timestep that the step leads to."""

    def __init__(self, width: int, *, use_meanflow: bool) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(SINUSOID_CHANNELS, width)
        self.timestep_embedder_r = TwoLayers(SINUSOID_CHANNELS, width) if use_meanflow else None

    def forward(self, timestep: torch.Tensor, timestep_r: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C] from timesteps [B]; timestep_r is for meanflow models alone."""
        dtype = self.timestep_embedder.linear_1.weight.dtype
        temb = self.timestep_embedder(sinusoid(timestep).to(dtype))
        if timestep_r is not None:
            assert self.timestep_embedder_r is not None, "timestep_r is for meanflow models"
            temb = temb + self.timestep_embedder_r(sinusoid(timestep_r).to(dtype))
        return temb


class TimeTextEmbedding(nn.Module):
    """What modulates the token refiner: the timestep's embedding plus that of the mean language token."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(SINUSOID_CHANNELS, width)
        self.text_embedder = TwoLayers(text_width, width)

    def forward(self, timestep: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """[B, C] from timesteps [B] and mean tokens [B, text_width]."""
        return self.timestep_embedder(sinusoid(timestep).to(pooled.dtype)) + self.text_embedder(pooled)


class PatchEmbedding(nn.Module):
    """A linear map of patches of the latents, stored as the convolution that it also is."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.width, kernel_size=patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, T, h, w] → [B, S, C]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class GlyphEmbedding(nn.Module):
    """The glyph encoder's tokens [B, L, glyph_width] → [B, L, C]."""

    def __init__(self, glyph_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(glyph_width)
        self.linear_1 = nn.Linear(glyph_width, GLYPH_HIDDEN)
        self.linear_2 = nn.Linear(GLYPH_HIDDEN, GLYPH_HIDDEN)
        self.linear_3 = nn.Linear(GLYPH_HIDDEN, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_3(F.gelu(self.linear_2(F.gelu(self.linear_1(self.norm(x))))))


class ImageEmbedding(nn.Module):
    """The image encoder's tokens [B, L, image_width] → [B, L, C]."""

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(image_width)
        self.linear_1 = nn.Linear(image_width, image_width)
        self.linear_2 = nn.Linear(image_width, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(x)))))


class KindEmbedding(nn.Module):
    """What is added to a text token by its kind. Not nn.Embedding, which on the meta device imports torch's compiler."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(TOKEN_KINDS, width))


# -- blocks and the whole --


class JointAttention(nn.Module):
    """The weights of attention over video and text, each with projections of its own. blocks.py computes it."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        width = heads * head_width
        self.heads = heads
        self.norm_q, self.norm_k = RmsNorm(head_width), RmsNorm(head_width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_k_proj, self.add_v_proj, self.add_q_proj = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)
        self.norm_added_q, self.norm_added_k = RmsNorm(head_width), RmsNorm(head_width)


class RefinerBlock(nn.Module):
    """A block of the token refiner: attention and feed-forward over language tokens, both gated by temb."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        width = heads * head_width
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = SelfAttention(heads, head_width)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.ff = FeedForward(width, 4.0, activation="silu")
        self.norm_out = Gates(width)

    def forward(self, x: torch.Tensor, temb: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L, C], temb [B, C] → [B, L, C]; mask: which keys are seen, broadcast to [B, H, L, L]."""
        attention_gate, feed_forward_gate = self.norm_out(temb)
        x = x + self.attn(self.norm1(x), mask) * attention_gate
        return x + self.ff(self.norm2(x)) * feed_forward_gate


class RefinerBlocks(nn.Module):
    """The list of a refiner's blocks, which has a module around it in the names."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads, config.attention_head_dim
        self.refiner_blocks = nn.ModuleList([RefinerBlock(*heads) for _ in range(config.num_refiner_layers)])


class TokenRefiner(nn.Module):
    """The language model's tokens → the transformer's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(config.text_embed_dim, config.width)
        self.proj_in = nn.Linear(config.text_embed_dim, config.width)
        self.token_refiner = RefinerBlocks(config)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, pooled: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L, text_width] → [B, L, C]; timestep [B], pooled: the mean token [B, text_width], mask as in a block."""
        temb = self.time_text_embed(timestep, pooled)
        x = self.proj_in(x)
        for block in self.token_refiner.refiner_blocks:
            x = block(x, temb, mask)
        return x


class TransformerBlock(nn.Module):
    """The weights of a double-stream block; *_context and added ones are the text's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm1_context = ModulatedNorm(width, 6), ModulatedNorm(width, 6)
        self.attn = JointAttention(config.num_attention_heads, config.attention_head_dim)
        self.norm2 = plain_norm(width)
        self.ff = FeedForward(width, config.mlp_ratio, activation="gelu")
        self.norm2_context = plain_norm(width)
        self.ff_context = FeedForward(width, config.mlp_ratio, activation="gelu")


class TransformerModules(nn.Module):
    """All weights of the transformer. On the meta device, shapes without memory."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbedding(config)
        self.image_embedder = ImageEmbedding(config.image_embed_dim, width)
        self.context_embedder = TokenRefiner(config)
        self.context_embedder_2 = GlyphEmbedding(config.text_embed_2_dim, width)
        self.time_embed = TimeEmbedding(width, use_meanflow=config.use_meanflow)
        self.cond_type_embed = KindEmbedding(width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.num_layers)])
        self.norm_out = OutputNorm(width)
        outputs = config.patch_size_t * config.patch_size**2 * (config.out_channels or config.in_channels)
        self.proj_out = nn.Linear(width, outputs)
