"""The denoising loop: noise to latents, with guidance, over one schedule."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.models.transformer import RunBlocks
from hunyuan_staged.parallel.layout import Layout
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.sampling.conditions import Condition
from hunyuan_staged.sampling.guidance import Guidance, guide
from hunyuan_staged.sampling.schedule import clean_estimate, euler_step, timesteps_of

OnStep = Callable[[int, torch.Tensor, Callable[[], torch.Tensor]], None]


class VelocityModel(Protocol):
    """A transformer's forward: see models/transformer.py."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        timestep_r: torch.Tensor | None = None,
        run_blocks: RunBlocks | None = None,
    ) -> torch.Tensor:
        """The velocity [1, 32, T, h, w]."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How to sample. start: how many steps have been done; cache: a cache.Cache. guidance: where not every step runs all
    branches. before_step(i) is called before step i.

    With use_meanflow the transformer also gets the timestep it steps to.
    """

    guidance_scale: float = 1.0
    use_meanflow: bool = False
    layout: Layout | None = None
    cache: Callable[..., torch.Tensor] | None = None
    start: int = 0
    guidance: Guidance | None = None
    before_step: Callable[[int], None] | None = None


PLAIN = Sampling()


def denoise(
    velocity: VelocityModel,
    noise: torch.Tensor,
    condition: torch.Tensor | Condition,
    branches: Sequence[Conditioning],
    sigmas: torch.Tensor,
    sampling: Sampling = PLAIN,
    *,
    progress: Callable[..., Iterable[Any]] = quiet,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Latents [1, 32, T, h, w] in float32 from noise of that shape, by Euler steps along the guided velocity.

    Args:
        velocity: one transformer forward.
        noise: where a number of steps have been done, the latents that on_step got after them, in float32, from which
            the loop goes on bit for bit.
        condition: the channels behind the latents, [1, 33, T, h, w] at every step, or what gives those of a step's
            timestep.
        branches: one Conditioning without guidance, [unconditional, conditional] with it.
        sigmas: [steps + 1], from 1 to 0.
        sampling: guidance, layout, cache, and the steps that have been done.
        on_step: on_step(i, latents, clean) is called after step i, counted from 0; it must not change the latents, which
            stay as they are after it. clean() is what the step took the noiseless latents to be.
    """
    layout, cache, start = sampling.layout or Layout(), sampling.cache, sampling.start
    latents = noise.float()
    # On the host, too, so that no step waits for the device.
    levels, times = sigmas.tolist(), timesteps_of(sigmas).tolist()
    timesteps = timesteps_of(sigmas).cpu()
    steps = len(levels) - 1
    for i in progress(range(start, steps), desc="denoising", unit="step", initial=start, total=steps):
        channels = (condition(times[i]) if callable(condition) else condition).to(noise.device)
        hidden_states = torch.cat([latents.to(channels.dtype), channels], dim=1)
        timestep_r = timesteps[i + 1 : i + 2] if sampling.use_meanflow else None
        if sampling.before_step:
            sampling.before_step(i)
        running = sampling.guidance.branches(i) if sampling.guidance else range(len(branches))
        found = {
            branch: velocity(
                hidden_states,
                timesteps[i : i + 1],
                branches[branch],
                timestep_r,
                *([partial(cache, branch, i)] if cache else []),
            )
            for branch in layout.my_branches(len(branches))
            if branch in running
        }
        guided = _guided(sampling, i, layout.all_velocities(found, running, latents))
        latents = euler_step(latents, guided, levels[i], levels[i + 1])
        if on_step:
            on_step(i, latents, partial(clean_estimate, latents, guided, levels[i + 1]))
    return latents


def _guided(sampling: Sampling, step: int, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
    """The velocity of a step, in float32."""
    if sampling.guidance:
        return sampling.guidance.velocity(step, velocities, sampling.guidance_scale)
    return guide(velocities, sampling.guidance_scale)
