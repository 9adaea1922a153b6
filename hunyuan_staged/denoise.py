"""The denoising loop: noise to latents, with guidance, over one schedule."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from hunyuan_staged import quiet
from hunyuan_staged.parallel import Layout
from hunyuan_staged.schedule import euler_step, timesteps_of
from hunyuan_staged.transformer import Conditioning

Velocity = Callable[..., torch.Tensor]  # of (hidden_states, timestep, conditioning, timestep_r[, through])


def draw_noise(shape: Sequence[int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The starting noise [1, 32, T, h, w]: drawn on the CPU in the transformer's dtype, so that it depends on no device."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)


def condition_channels(noise: torch.Tensor, image_latents: torch.Tensor | None) -> torch.Tensor:
    """Condition latents and mask [1, 33, T, h, w]: zeros, or in frame 0 the image's latents [1, 32, 1, h, w] and mask 1."""
    condition = torch.zeros_like(noise)
    mask = torch.zeros_like(noise[:, :1])
    if image_latents is not None:
        condition[:, :, :1] = image_latents.to(condition)
        mask[:, :, 0] = 1
    return torch.cat([condition, mask], dim=1)


def guide(velocities: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance over [negative, positive], in float32; a single row is its own result."""
    if len(velocities) == 1:
        return velocities[0].float()
    negative, positive = (velocity.float() for velocity in velocities)
    return negative + guidance_scale * (positive - negative)


def denoise(
    velocity: Velocity,
    noise: torch.Tensor,
    condition: torch.Tensor,
    rows: Sequence[Conditioning],
    sigmas: torch.Tensor,
    *,
    guidance_scale: float = 1.0,
    use_meanflow: bool = False,
    layout: Layout | None = None,
    cache: Callable[..., torch.Tensor] | None = None,
    start: int = 0,
    progress: Callable[..., Iterable[Any]] = quiet,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Latents [1, 32, T, h, w] in float32 from noise of that shape, by Euler steps along the guided velocity.

    velocity: one transformer forward. condition [1, 33, T, h, w]: condition latents and mask. rows: one Conditioning
    without guidance, [negative, positive] with it. sigmas [steps + 1], from 1 to 0. With use_meanflow the transformer
    also gets the timestep it steps to. cache: a cache.Cache. start: how many steps have been done; noise is then the
    latents that on_step got after them, in float32, from which the loop goes on bit for bit. on_step(i, latents) is
    called after step i, counted from 0; it must not change the latents, which stay as they are after it.
    """
    layout = layout or Layout()
    latents, condition = noise.float(), condition.to(noise.device)
    levels = sigmas.tolist()
    timesteps = timesteps_of(sigmas).to(noise.device)
    steps = len(levels) - 1
    for i in progress(range(start, steps), desc="denoising", unit="step", initial=start, total=steps):
        hidden_states = torch.cat([latents.to(condition.dtype), condition], dim=1)
        timestep_r = timesteps[i + 1 : i + 2] if use_meanflow else None
        mine = [
            velocity(
                hidden_states,
                timesteps[i : i + 1],
                rows[row],
                timestep_r,
                *([partial(cache, row, i)] if cache else []),
            )
            for row in layout.my_rows(len(rows))
        ]
        velocities = layout.gather_rows(mine[0]) if layout.rows > 1 else mine
        latents = euler_step(latents, guide(velocities, guidance_scale), levels[i], levels[i + 1])
        if on_step:
            on_step(i, latents)
    return latents
