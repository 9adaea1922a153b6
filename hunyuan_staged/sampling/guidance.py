"""Classifier-free guidance, at all steps or at some."""

from collections.abc import Mapping, Sequence

import torch

from hunyuan_staged.errors import InputError
from hunyuan_staged.models.embeddings import Conditioning
from hunyuan_staged.sampling.guidance_plan import GuidancePlan

DIFFERENCE = "guidance.difference"  # of the branches, in a saved state


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


class Guidance:
    """Guidance of one run by a plan, with the last difference of its branches, [1, 32, T, h, w] in float32."""

    def __init__(self, plan: GuidancePlan) -> None:
        self.plan = plan
        self.difference: torch.Tensor | None = None

    def branches(self, step: int) -> tuple[int, ...]:
        """The branches that a step runs."""
        return self.plan.branches(step)

    def velocity(self, step: int, velocities: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
        """The velocity of a step, in float32, from those of the branches that it ran."""
        guided = guide(velocities, guidance_scale)
        if len(velocities) == 2 and self.plan.reuse:
            unconditional, conditional = (velocity.float() for velocity in velocities)
            self.difference = conditional - unconditional
        elif self.plan.reuses(step):
            assert self.difference is not None
            guided = guided + (guidance_scale - 1) * self.difference
        return guided

    def tensors(self, done: int) -> dict[str, torch.Tensor]:
        """What the steps after the first `done` need, as it goes into a saved state."""
        return {DIFFERENCE: self.difference} if self.difference is not None and self.plan.keeps(done) else {}

    def restore(self, tensors: Mapping[str, torch.Tensor], done: int, like: torch.Tensor) -> None:
        """Take over what `tensors` gave after `done` steps. like: latents. InputError where it does not fit."""
        if not self.plan.keeps(done):
            return
        difference = tensors.get(DIFFERENCE)
        if difference is None or difference.shape != like.shape:
            raise InputError(
                "the saved state lacks the guidance of this run; run without --resume to start from the beginning"
            )
        self.difference = difference.to(like.device)
