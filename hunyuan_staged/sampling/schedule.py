"""The flow-matching schedule: sigmas from 1 (noise) to 0 (video), their timesteps, and the Euler step."""

from collections.abc import Sequence

import torch

TIMESTEPS = 1000.0


def flow_sigmas(steps: int, shift: float) -> torch.Tensor:
    """Sigmas [steps + 1], float32, from 1 to 0: s' = shift * s / (1 + (shift - 1) * s) over a linear s.

    Source: FlowMatchDiscreteScheduler of the official implementation; golden/schedules.json.
    """
    sigmas = torch.linspace(1, 0, steps + 1)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def timesteps_of(sigmas: torch.Tensor) -> torch.Tensor:
    """The timesteps [...] that the transformer takes for sigmas [...]: sigma x 1000, as float."""
    return sigmas * TIMESTEPS


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
    """latents + velocity * (next_sigma - sigma), in float32."""
    return latents + velocity.float() * (next_sigma - sigma)


def clean_estimate(latents: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """The noiseless latents that a velocity points to: x - sigma v, since x = (1 - sigma) x0 + sigma noise.

    Along one velocity it is the same before and after an Euler step.
    """
    return latents - sigma * velocity.float()


def initial_noise(shape: Sequence[int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The starting noise [1, 32, T, h, w]: drawn on the CPU in the transformer's dtype, so that it depends on no device."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)


def super_resolution_noise(shape: Sequence[int], seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(starting noise, noise for the enlarged latents), each of shape [1, 32, T, H, W]: two draws of one CPU generator.

    The official code takes the second from the device's own generator, which nothing seeds; drawn so, runs repeat.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    first, second = (torch.randn(tuple(shape), generator=generator, dtype=dtype) for _ in range(2))
    return first, second
