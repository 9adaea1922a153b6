"""Classifier-free guidance."""

from collections.abc import Mapping, Sequence

import torch

from hunyuan_staged.models.embeddings import Conditioning


def guidance_branches(
    embeddings: Mapping[str, torch.Tensor], guidance_scale: float, *, device: torch.device, dtype: torch.dtype
) -> list[Conditioning]:
    """The branches of stage 1's tensors: [unconditional, conditional], or [conditional] where the scale is 1."""
    return [
        Conditioning.from_embeddings(embeddings, negative=negative, device=device, dtype=dtype)
        for negative in ((True, False) if guidance_scale != 1 else (False,))
    ]


def guide(velocities: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance over [unconditional, conditional], in float32; a single branch is its own result."""
    if len(velocities) == 1:
        return velocities[0].float()
    unconditional, conditional = (velocity.float() for velocity in velocities)
    return unconditional + guidance_scale * (conditional - unconditional)
