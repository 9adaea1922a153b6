"""bench stage2 --share_of: one rank's share of a step on one device, where its exchanges are copies of the same sizes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hunyuan_staged.parallel.layout import Layout, plan_layout


@dataclass(frozen=True)
class LoneShare(Layout):
    """A layout of which only this rank is there: what it would get from others it copies from what it would send.

    sent: bytes that would leave this rank, one entry an exchange.
    """

    sent: list[int] = field(default_factory=list)

    def _all_to_all(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        self.sent.append((sum(sent) - sent[self.shard]) * outgoing.itemsize)
        size = min(len(incoming), len(outgoing))
        incoming[:size] = outgoing[:size]
        incoming[size:] = 0  # where heads do not divide, a rank gets more than it sends

    def _all_gather(self, tensor: torch.Tensor, count: int, group: Any) -> list[torch.Tensor]:
        self.sent.append((count - 1) * tensor.nbytes)
        return [tensor.clone() for _ in range(count)]


def lone_share(ranks: int, branches: int, cfg_parallel: str) -> LoneShare:
    """The first rank of so many, which has no less to do than any other; InputError as plan_layout."""
    return LoneShare(*plan_layout(ranks, branches, cfg_parallel))


def describe_share(layout: LoneShare, whole: float, seconds: Sequence[float], steps: int) -> dict[str, Any]:
    """What bench prints. whole: seconds of a step on one device; seconds: of the timed shares; steps: all that were run."""
    ranks, median = layout.branches * layout.shards, statistics.median(seconds)
    return {
        "share_of": ranks,
        "share_layout": layout.describe(),
        "share_seconds": round(median, 4),
        "share_times_an_even_part": round(median * ranks / whole, 4),
        "all_shares": [round(t, 4) for t in seconds],
        "exchanged_bytes_per_step": sum(layout.sent) // steps,
    }
