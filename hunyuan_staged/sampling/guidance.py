"""Classifier-free guidance."""

from collections.abc import Sequence

import torch


def guide(velocities: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance over [negative, positive], in float32; a single row is its own result."""
    if len(velocities) == 1:
        return velocities[0].float()
    negative, positive = (velocity.float() for velocity in velocities)
    return negative + guidance_scale * (positive - negative)
