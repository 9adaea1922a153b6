"""bench stage2 --share_of: one rank's share of a step on one device, where its exchanges are copies of the same sizes."""

import statistics
from collections.abc import Sequence
from typing import Any

from hunyuan_staged.parallel.layout import LoneShare, plan_layout


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
