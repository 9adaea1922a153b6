"""What enters the transformer's blocks: text and time embeddings, rotary position embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LANGUAGE, GLYPH, IMAGE = 0, 1, 2  # rows of cond_type_embed


@dataclass(frozen=True)
class Conditioning:
    """One guidance branch's valid text tokens: language [1, l, W1], glyph [1, g, W2], image [1, n, W3]; g, n may be 0."""

    language: torch.Tensor
    glyph: torch.Tensor
    image: torch.Tensor

    @property
    def length(self) -> int:
        """L, the text tokens that enter the blocks."""
        return self.language.shape[1] + self.glyph.shape[1] + self.image.shape[1]

    @classmethod
    def from_embeddings(
        cls, embeddings: Mapping[str, torch.Tensor], *, negative: bool = False, device: torch.device, dtype: torch.dtype
    ) -> "Conditioning":
        """The prompt, or the negative one, of stage 1's tensors, without its padding.

        An image whose embeddings are absent or all zero (text to video) contributes no token, as in the official code.
        """
        prefix = "negative_" if negative else ""
        language = embeddings[f"{prefix}prompt_embeds"][:, embeddings[f"{prefix}prompt_embeds_mask"][0].bool()]
        glyph = embeddings[f"{prefix}prompt_embeds_2"][:, embeddings[f"{prefix}prompt_embeds_mask_2"][0].bool()]
        image = embeddings.get("image_embeds")
        if image is None or not image.any():
            image = language.new_zeros(1, 0, 0)
        return cls(*(part.to(device, dtype) for part in (language, glyph, image)))


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
    return model.time_embed(timestep, timestep_r)


def embed_text(model: Any, conditioning: Conditioning, timestep: torch.Tensor) -> torch.Tensor:
    """Text tokens [1, L, C] in the order image, glyph, language, each with its kind's embedding added."""
    kinds = model.cond_type_embed.weight
    pooled = conditioning.language.float().mean(dim=1).to(conditioning.language.dtype)
    parts = [model.context_embedder(conditioning.language, timestep, pooled) + kinds[LANGUAGE]]
    if conditioning.glyph.shape[1]:
        parts.insert(0, model.context_embedder_2(conditioning.glyph) + kinds[GLYPH])
    if conditioning.image.shape[1]:
        parts.insert(0, model.image_embedder(conditioning.image) + kinds[IMAGE])
    return torch.cat(parts, dim=1)
