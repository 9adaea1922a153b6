"""The condition channels of the transformer's input: none, the first image, low-resolution latents.

Super resolution gives the base run's latents, enlarged by interpolation, corrected by the latent upsampler and partly
noised, while the noise is strong. Source: the super-resolution pipeline of the official implementation.

Letters: T latent frames; h x w of the base run's latents; H x W of the larger ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hunyuan_staged.models.upsampler import LatentUpsampler, run_upsampler
from hunyuan_staged.sampling.schedule import initial_noise

Condition = Callable[[float], torch.Tensor]  # of a timestep; gives the channels [1, C, T, h, w] behind the latents

# How much noise the enlarged latents get: 0.7 of it, and 0.3 of them.
NOISE_STRENGTH = 0.7
# Below this timestep the transformer sees nothing of the enlarged latents.
LAST_TIMESTEP = 700.0


def condition_channels(noise: torch.Tensor, image_latents: torch.Tensor | None) -> torch.Tensor:
    """Condition latents and mask [1, 33, T, h, w]: zeros, or in frame 0 the image's latents [1, 32, 1, h, w] and mask 1."""
    condition = torch.zeros_like(noise)
    mask = torch.zeros_like(noise[:, :1])
    if image_latents is not None:
        condition[:, :, :1] = image_latents.to(condition)
        mask[:, :, 0] = 1
    return torch.cat([condition, mask], dim=1)


def noise_and_condition(
    shape: Sequence[int],
    seed: int,
    image_latents: torch.Tensor | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(starting noise of the shape [1, 32, T, h, w], its condition_channels), on the device."""
    noise = initial_noise(shape, seed, dtype).to(device)
    return noise, condition_channels(noise, image_latents)


def resize_latents(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[1, 32, T, h, w] → [1, 32, T, H, W], float32: each frame bilinearly, corners not aligned, no antialiasing."""
    frames = latents[0].float().transpose(0, 1)
    resized = F.interpolate(frames, size=(height, width), mode="bilinear", align_corners=False)
    return resized.transpose(0, 1)[None]


def upsample_latents(
    upsampler: LatentUpsampler, latents: torch.Tensor, height: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """The base run's latents [1, 32, T, h, w], as its loop left them, enlarged to [1, 32, T, H, W], in dtype."""
    device = next(upsampler.parameters()).device
    return run_upsampler(upsampler, resize_latents(latents.to(device), height, width)).to(dtype)


def augment(upsampled: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The enlarged latents with noise [1, 32, T, H, W] mixed in, float32."""
    return (1 - NOISE_STRENGTH) * upsampled.float() + NOISE_STRENGTH * noise.to(upsampled.device).float()


@dataclass(frozen=True)
class LowResolutionCondition:
    """Condition channels by step. image [1, 33, T, H, W]: condition_channels of the image; latents: what augment gave."""

    image: torch.Tensor
    latents: torch.Tensor

    def __call__(self, timestep: float) -> torch.Tensor:
        """[1, 66, T, H, W]: the image's latents and mask, then the enlarged latents and a mask of ones.

        The last 33 are zeros at timesteps below LAST_TIMESTEP.
        """
        seen = timestep >= LAST_TIMESTEP
        latents = self.latents.to(self.image) if seen else torch.zeros_like(self.image[:, :-1])
        mask = torch.full_like(self.image[:, -1:], float(seen))
        return torch.cat([self.image, latents, mask], dim=1)
