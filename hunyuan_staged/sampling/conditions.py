"""The condition channels of the transformer's input."""

import torch


def condition_channels(noise: torch.Tensor, image_latents: torch.Tensor | None) -> torch.Tensor:
    """Condition latents and mask [1, 33, T, h, w]: zeros, or in frame 0 the image's latents [1, 32, 1, h, w] and mask 1."""
    condition = torch.zeros_like(noise)
    mask = torch.zeros_like(noise[:, :1])
    if image_latents is not None:
        condition[:, :, :1] = image_latents.to(condition)
        mask[:, :, 0] = 1
    return torch.cat([condition, mask], dim=1)
