"""What teacache's polynomial and magcache's curve are made from, recorded in a run without a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.sampling.cache import mean_ratio

if TYPE_CHECKING:
    import torch

    from hunyuan_staged.parallel.layout import Layout
    from hunyuan_staged.parallel.world import World

DEGREE = 4  # of the polynomial, as of most published ones


@dataclass
class BranchRecord:
    """Of a guidance branch: a number for each step but the first, and the tensors [1, s, C] of the step before."""

    ratios: list[float] = field(default_factory=list)
    inputs: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    before: dict[str, torch.Tensor] = field(default_factory=dict)


class Recorder:
    """Stands where a Cache stands, runs every block, and records from step to step, for each guidance branch:

    ratios: the mean over tokens of the norm of what all blocks add, over its norm before (MagCache); inputs: the relative
    change of the first block's modulated input (TeaCache); changes: that of what all blocks add, which reusing ignores.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.branches: dict[int, BranchRecord] = {}

    def __call__(self, branch: int, step: int, blocks: Any, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        import torch

        record, modulated = self.branches.setdefault(branch, BranchRecord()), blocks.modulated(video)
        out = blocks(video, text, 0, None)[0]
        now = {"input": modulated, "residual": out - video}
        if record.before:
            sizes, sizes_before = (
                torch.linalg.vector_norm(one["residual"], dim=-1, dtype=torch.float32) for one in (now, record.before)
            )
            ones = torch.ones_like(sizes)
            record.ratios.append(mean_ratio(self.layout, sizes / sizes_before, ones))
            for name, found in (("input", record.inputs), ("residual", record.changes)):
                before = record.before[name]
                found.append(mean_ratio(self.layout, (now[name] - before).abs(), before.abs()))
        record.before = now
        return out

    def numbers(self, world: World) -> dict[int, tuple[list[float], list[float], list[float]]]:
        """(ratios, inputs, changes) of every branch, on every rank. Every rank must call it."""
        import torch

        own = {
            str(branch): torch.tensor([one.ratios, one.inputs, one.changes], dtype=torch.float64)
            for branch, one in self.branches.items()
        }
        found = dict(own)
        if self.layout.branches > 1:
            for branch in range(self.layout.branches):
                found |= world.broadcast_tensors(
                    own if self.layout.branch == branch else {}, branch * self.layout.shards
                )
        return {int(branch): tuple(numbers.tolist()) for branch, numbers in sorted(found.items())}


def fit(inputs: list[float], changes: list[float]) -> list[float]:
    """The polynomial of DEGREE, highest power first, that takes relative changes of inputs to those of what the blocks
    add, by least squares (numpy.polyfit); InputError for too few."""
    import numpy as np

    if len(inputs) <= DEGREE:
        raise InputError(f"{len(inputs)} changes from step to step are too few for a polynomial of degree {DEGREE}")
    return [float(value) for value in np.polyfit(inputs, changes, DEGREE)]
