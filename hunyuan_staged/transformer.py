"""One forward of the HunyuanVideo-1.5 transformer over unpadded tokens.

The modules are diffusers' HunyuanVideo15Transformer3DModel; its own forward pads the text and builds an N x N mask,
this one lets only valid tokens in, so no attention needs a mask. It knows neither ranks nor kernels: `layout` moves
tokens (and does nothing on one process), `attention` computes.

Letters: T h w latent frames, rows and columns after patching; S = T*h*w video tokens, s this rank's; L text tokens;
H heads, D head width, C = H*D; P = values in a patch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from hunyuan_staged.attention import AttentionMode
from hunyuan_staged.offload import StreamedBlocks
from hunyuan_staged.parallel import Layout

LANGUAGE, GLYPH, IMAGE = 0, 1, 2  # rows of cond_type_embed

Through = Callable[[Callable[..., tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Conditioning:
    """One guidance row's valid text tokens: language [1, l, W1], glyph [1, g, W2], image [1, n, W3]; g, n may be 0."""

    language: torch.Tensor
    glyph: torch.Tensor
    image: torch.Tensor

    @property
    def length(self) -> int:
        """L, the text tokens that enter the blocks."""
        return self.language.shape[1] + self.glyph.shape[1] + self.image.shape[1]


def conditioning_of(
    embeddings: Mapping[str, torch.Tensor], prefix: str, *, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """One guidance row of stage 1's tensors without its padding; prefix is "" or "negative_".

    An image whose embeddings are absent or all zero (text to video) contributes no token, as in the official code.
    """
    language = embeddings[f"{prefix}prompt_embeds"][:, embeddings[f"{prefix}prompt_embeds_mask"][0].bool()]
    glyph = embeddings[f"{prefix}prompt_embeds_2"][:, embeddings[f"{prefix}prompt_embeds_mask_2"][0].bool()]
    image = embeddings.get("image_embeds")
    if image is None or not image.any():
        image = language.new_zeros(1, 0, 0)
    return Conditioning(*(part.to(device, dtype) for part in (language, glyph, image)))


def rope_table(model: Any, frames: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [S, D], float32, for a grid of T x h x w patches, on the CPU; all blocks and steps share them.

    Each axis rotates its own part of the head (rope_axes_dim), frequencies 1 / theta^(2i/dim), each twice in a row.
    Source: HunyuanVideo15RotaryPosEmbed in diffusers, get_nd_rotary_pos_embed in the official code.
    """
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (frames, rows, columns)), indexing="ij")
    angles = []
    for positions, width in zip(grid, model.config.rope_axes_dim, strict=True):
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        angles.append(torch.outer(positions.flatten(), 1.0 / model.config.rope_theta**exponents))
    angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


def apply_rope(x: torch.Tensor, rope: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Rotate each pair of neighbouring channels of x [1, s, H, D] by its position's angle, in float32."""
    cos, sin = (table[None, :, None] for table in rope)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin).to(x.dtype)


def embed_time(model: Any, timestep: torch.Tensor, timestep_r: torch.Tensor | None) -> torch.Tensor:
    """[1, C] from a timestep [1] (and, for meanflow, the timestep it steps to). The sinusoid is taken in float32."""
    embed = model.time_embed
    dtype = embed.timestep_embedder.linear_1.weight.dtype
    temb = embed.timestep_embedder(embed.time_proj(timestep).to(dtype))
    if timestep_r is not None:
        temb = temb + embed.timestep_embedder_r(embed.time_proj_r(timestep_r).to(dtype))
    return temb


def embed_text(model: Any, conditioning: Conditioning, timestep: torch.Tensor) -> torch.Tensor:
    """Text tokens [1, L, C] in the order image, glyph, language, each with its kind's embedding added."""
    kinds = model.cond_type_embed.weight
    refiner = model.context_embedder
    pooled = conditioning.language.float().mean(dim=1).to(conditioning.language.dtype)
    temb = refiner.time_text_embed(timestep, pooled)
    language = refiner.proj_in(conditioning.language)
    for block in refiner.token_refiner.refiner_blocks:
        language = block(language, temb)
    parts = [language + kinds[LANGUAGE]]
    if conditioning.glyph.shape[1]:
        parts.insert(0, model.context_embedder_2(conditioning.glyph) + kinds[GLYPH])
    if conditioning.image.shape[1]:
        parts.insert(0, model.image_embedder(conditioning.image) + kinds[IMAGE])
    return torch.cat(parts, dim=1)


def modulate(x: torch.Tensor, norm: nn.Module, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer norm: norm(x) * (1 + scale) + shift."""
    return norm(x) * (1 + scale) + shift


def modulation(norm: Any, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Six [1, 1, C] from an AdaLayerNormZero: shift, scale, gate for attention, then for the feed-forward."""
    return norm.linear(F.silu(temb))[:, None].chunk(6, dim=-1)


def project_qkv(x: torch.Tensor, projections: tuple, norms: tuple, heads: int) -> list[torch.Tensor]:
    """q, k, v [1, s, H, D] of tokens [1, s, C], with q and k normalised."""
    q, k, v = (projection(x).unflatten(-1, (heads, -1)) for projection in projections)
    return [norms[0](q), norms[1](k), v]


@torch.library.custom_op("hunyuan_staged::linear_gelu", mutates_args=())
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x W^T + b), tanh form, [1, s, C] → [1, s, F], on a GPU with the activation inside the product (cuBLASLt).

    As an op of its own, because a compiler would take it apart again, and write and read the product once more.
    """
    if x.is_cuda:
        return torch._addmm_activation(bias, x[0], weight.mT, use_gelu=True)[None]
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(1, x.shape[1], weight.shape[0])


def feed_forward(ff: Any, x: torch.Tensor) -> torch.Tensor:
    """diffusers' FeedForward with gelu-approximate, [1, s, C] → [1, s, C]."""
    first, last = ff.net[0].proj, ff.net[2]
    return last(linear_gelu(x, first.weight, first.bias))


def before_attention(
    block: Any, video: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, rope: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A block up to its attention: q, k, v [1, s, H, D] of the video [1, s, C], and [1, L, H, D] of the text [1, L, C]."""
    attn = block.attn
    shift, scale = modulation(block.norm1, temb)[:2]
    q, k, v = project_qkv(
        modulate(video, block.norm1.norm, shift, scale),
        (attn.to_q, attn.to_k, attn.to_v),
        (attn.norm_q, attn.norm_k),
        attn.heads,
    )
    shift, scale = modulation(block.norm1_context, temb)[:2]
    text_qkv = project_qkv(
        modulate(text, block.norm1_context.norm, shift, scale),
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        (attn.norm_added_q, attn.norm_added_k),
        attn.heads,
    )
    return [apply_rope(q, rope), apply_rope(k, rope), v], text_qkv


def joint_qkv(*args: Any) -> tuple[torch.Tensor, ...]:
    """before_attention where all tokens are here: q, k, v [1, S + L, H, D], text behind video."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(*before_attention(*args), strict=True))


def packed_qkv(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """before_attention for an exchange: [3, s, H, D] of the video and [3, L, H, D] of the text."""
    video, text = before_attention(*args)
    return torch.cat(video), torch.cat(text)


def add_attention(
    block: Any,
    video: torch.Tensor,
    text: torch.Tensor,
    video_out: torch.Tensor,
    text_out: torch.Tensor,
    temb: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Video [1, s, C] and text [1, L, C] with what attention gave, [s, H, D] and [L, H, D], projected, gated and added."""
    gates = modulation(block.norm1, temb)[2], modulation(block.norm1_context, temb)[2]
    video = video + block.attn.to_out[0](video_out.flatten(1)[None]) * gates[0]
    return video, text + block.attn.to_add_out(text_out.flatten(1)[None]) * gates[1]


def add_feed_forward(
    block: Any, video: torch.Tensor, text: torch.Tensor, temb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rest of a block, behind its attention: video [1, s, C] and text [1, L, C] → the same.

    Apart from add_attention so that what attention gave is freed before the feed-forward's hidden layer, the largest
    activation of all, comes to be.
    """
    shift, scale, gate = modulation(block.norm1, temb)[3:]
    video = video + feed_forward(block.ff, modulate(video, block.norm2, shift, scale)) * gate
    shift, scale, gate = modulation(block.norm1_context, temb)[3:]
    text = text + feed_forward(block.ff_context, modulate(text, block.norm2_context, shift, scale)) * gate
    return video, text


class Transformer:
    """The forward of one loaded model on one layout, with what stays the same from step to step computed once.

    model: diffusers' HunyuanVideo15Transformer3DModel in eval mode. attention: what choose_attention gave.
    latent_size: (frames, height, width) of the latents. blocks: what a slice of yields these blocks of the model in order,
    each with its weights in place (offload.StreamedBlocks); by default the model's own list. compile: let torch.compile
    fuse what is around attention. Its three parts are compiled once, for all blocks and every text length.
    """

    def __init__(
        self,
        model: Any,
        attention: AttentionMode,
        latent_size: tuple[int, int, int],
        layout: Layout | None = None,
        blocks: StreamedBlocks | None = None,
        *,
        compile: bool = False,
    ) -> None:
        self.model, self.layout = model, layout or Layout()
        self.blocks: Any = list(model.transformer_blocks) if blocks is None else blocks
        self.before: Callable[..., Any] = packed_qkv if self.layout.shards > 1 else joint_qkv
        self.parts: tuple[Callable[..., Any], ...] = add_attention, add_feed_forward
        if compile:
            # Without padding products whose number of tokens is odd: for no speed it costs a copy of the activations.
            how: dict[str, Any] = {"fullgraph": True, "options": {"shape_padding": False}}
            self.before, *parts = (torch.compile(part, **how) for part in (self.before, *self.parts))
            self.parts = tuple(parts)
        config = model.config
        self.patch = {"pt": config.patch_size_t, "ph": config.patch_size, "pw": config.patch_size}
        self.grid = tuple(n // p for n, p in zip(latent_size, self.patch.values(), strict=True))
        self.total = self.grid[0] * self.grid[1] * self.grid[2]
        self.attention = attention.kernels(self.grid, len(model.transformer_blocks))
        weight = model.x_embedder.proj.weight
        self.device, self.dtype = weight.device, weight.dtype
        cos, sin = rope_table(model, *self.grid)
        self.rope = tuple(self.layout.scatter(table, dim=0).to(self.device) for table in (cos, sin))

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        timestep_r: torch.Tensor | None = None,
        through: Through | None = None,
    ) -> torch.Tensor:
        """The velocity [1, 32, T, h, w] for the input [1, 65, T, h, w] at a timestep [1] (sigma x 1000, float32).

        timestep_r [1] is for meanflow models alone. through(blocks, video, text) gives the video behind the last block,
        from blocks(video, text, first, last), which runs some of them: what a cache may do otherwise than to run all.
        Every rank of the layout gets the whole velocity.
        """
        model, layout = self.model, self.layout
        temb = embed_time(model, timestep, timestep_r)
        text = embed_text(model, conditioning, timestep)
        patches = rearrange(
            hidden_states.to(self.dtype),
            "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)",
            **self.patch,
        )
        embed = model.x_embedder.proj

        def tokens() -> torch.Tensor:
            return F.linear(layout.scatter(patches), embed.weight.flatten(1), embed.bias)

        if through is None:
            # Not held by a name here: it is as large as any activation, and the first block is done with it.
            video = self._run(temb, tokens(), text, 0, None)[0]
        else:
            video = through(partial(self._run, temb), tokens(), text)
        scale, shift = model.norm_out.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        patches = layout.gather(model.proj_out(modulate(video, model.norm_out.norm, shift, scale)), self.total)
        frames, rows, columns = self.grid
        return rearrange(
            patches,
            "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)",
            t=frames,
            h=rows,
            w=columns,
            **self.patch,
        )

    def _run(
        self, temb: torch.Tensor, video: torch.Tensor, text: torch.Tensor, first: int, last: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video [1, s, C] and text [1, L, C] through the blocks [first, last), all from first on with None."""
        part = slice(first, last)
        for block, attention in zip(self.blocks[part], self.attention[part], strict=True):
            torch._dynamo.mark_dynamic(text, 1)
            q, k, v = self._query_key_value(block, video, text, temb)
            attended = attention(q, k, v).squeeze(0)
            del q, k, v
            outs = self.layout.heads_to_tokens(attended, block.attn.heads, self.total)
            torch._dynamo.mark_dynamic(outs[1], 0)
            video, text = self.parts[0](block, video, text, *outs, temb)
            del attended, outs
            torch._dynamo.mark_dynamic(text, 1)
            video, text = self.parts[1](block, video, text, temb)
        return video, text

    def _query_key_value(
        self, block: Any, video: torch.Tensor, text: torch.Tensor, temb: torch.Tensor
    ) -> Iterable[torch.Tensor]:
        """q, k, v [1, S + L, h, D]: all tokens, and the heads that are this rank's."""
        if self.layout.shards == 1:
            return self.before(block, video, text, temb, self.rope)
        qkv, text_qkv = self.before(block, video, text, temb, self.rope)
        return self.layout.tokens_to_heads(qkv, text_qkv, self.total)[:, None]
