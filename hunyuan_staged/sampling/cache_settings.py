"""Which steps a feature cache reuses, and its flags. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hunyuan_staged import versions
from hunyuan_staged.errors import InputError

# Of a run of CACHE_STEPS steps, as in the official code; other schedules keep their share of it (resolve).
CACHE_STEPS = 50
CACHE_FLAGS = {"cache_start_step": 11, "cache_end_step": 45, "cache_step_interval": 4}
# Which further flags a type of cache has, with their defaults. The thresholds are diffusers' (FirstBlockCacheConfig and
# MagCacheConfig); the block is the last of the 54, as in the official code.
CACHE_TYPES: dict[str, dict[str, Any]] = {
    "deepcache": {"no_cache_block_id": "53"},
    "teacache": {},
    "taylorcache": {},
    "firstblock": {"cache_threshold": 0.05},
    "magcache": {"cache_threshold": 0.06},
}
DEFAULT_CACHE_TYPE = "deepcache"
TAYLOR_ORDER = 1
# Activations (a rank's tokens x channels) that a type keeps from step to step for each guidance branch, and those that it
# holds besides while the blocks run: their input, and firstblock also what the first block gave and added.
_KEPT = {"deepcache": 1, "teacache": 1, "taylorcache": TAYLOR_ORDER + 1, "firstblock": 2, "magcache": 1}
_HELD = {"firstblock": 3}


@dataclass(frozen=True)
class CacheSettings:
    """Which steps a cache may reuse: those in [start, end), at most interval - 1 in a row; step `start` is computed.

    edge: deepcache's first block that reused steps compute. threshold: of firstblock and magcache, see versions.
    """

    type: str
    steps: int
    start: int
    end: int
    interval: int
    edge: int | None = None
    threshold: float | None = None

    @property
    def adapts(self) -> bool:
        """Whether what was computed decides which steps are reused."""
        return self.threshold is not None

    def may_reuse(self, step: int) -> bool:
        """Whether a step, from 0, is reused; where the cache adapts, whether it can be."""
        if not self.start < step < min(self.end, self.steps):
            return False
        return self.adapts or (step - self.start) % self.interval != 0

    @property
    def last_reuse(self) -> int:
        """The last step that may be reused; -1 where there is none."""
        return max((step for step in range(self.steps) if self.may_reuse(step)), default=-1)

    @property
    def first_kept(self) -> int:
        """The first step from which something is kept: before `start` where a rate of change is needed."""
        before = {"taylorcache": TAYLOR_ORDER, "magcache": 1}.get(self.type, 0)
        return max(0, self.start - before)

    def kept(self, branches: int) -> int:
        """Activations that it takes on a rank that computes so many guidance branches."""
        return branches * _KEPT[self.type] + _HELD.get(self.type, 1)

    @property
    def reused(self) -> int | None:
        """How many steps are reused; None where what was computed decides."""
        return None if self.adapts else sum(map(self.may_reuse, range(self.steps)))

    def record(self) -> dict[str, Any]:
        """The settings as JSON, for metadata and for telling runs apart."""
        chosen = {"type": self.type, "start_step": self.start, "end_step": self.end, "step_interval": self.interval}
        if self.edge is not None:
            chosen["no_cache_block_id"] = self.edge
        if self.threshold is not None:
            # JSON has no infinity.
            chosen["threshold"] = self.threshold if math.isfinite(self.threshold) else "inf"
        return chosen


def check_flags(cache_type: str, given: Mapping[str, Any]) -> None:
    """InputError for a value that is wrong whatever the run, and for a flag that the type does not have.

    given: the flags' values by their names without dashes, None where a flag is absent.
    """
    if cache_type not in CACHE_TYPES:
        raise InputError(f"--cache_type {cache_type!r} is unknown; known: {', '.join(CACHE_TYPES)}")
    for name, value in given.items():
        if value is None:
            continue
        owners = [known for known, flags in CACHE_TYPES.items() if name in flags]
        if name not in CACHE_FLAGS and cache_type not in owners:
            raise InputError(f"--{name} belongs to --cache_type {' and '.join(owners)}, not to {cache_type}")
    start, end, interval, threshold = (given.get(name) for name in (*CACHE_FLAGS, "cache_threshold"))
    if start is not None and start < 0:
        raise InputError(f"--cache_start_step {start} is below 0, the first step")
    if end is not None and end < 1:
        raise InputError(f"--cache_end_step {end} is below 1, the second step")
    if start is not None and end is not None and end <= start:
        raise InputError(f"--cache_end_step {end} is not behind --cache_start_step {start}")
    if interval is not None and interval < 2:
        raise InputError(f"--cache_step_interval {interval} reuses no step; 2 computes every other one")
    if threshold is not None and not threshold >= 0:
        raise InputError(f"--cache_threshold {threshold} is not a number from 0 on")
    if given.get("no_cache_block_id") is not None:
        parse_blocks(given["no_cache_block_id"])


def parse_blocks(text: str) -> range:
    """Which blocks --no_cache_block_id names: one, or FIRST-LAST."""
    return versions.parse_block_range("--no_cache_block_id", f"{text}-{text}" if text.isdigit() else text)


def resolve(cache_type: str, given: Mapping[str, Any], steps: int, layers: int) -> CacheSettings:
    """The settings of a run of so many steps on a transformer of so many blocks, absent flags from versions.

    The defaults are those of 50 steps, and keep their share of a schedule of another length: of 30 steps they reuse the
    same stretch, with reused steps as far from computed ones. InputError where no step is left to reuse, and for blocks
    that do not reach to the last one: a reused step takes the outcome of all blocks before.
    """
    check_flags(cache_type, given)

    def scaled(name: str, least: int) -> int:
        if given.get(name) is not None:
            return given[name]
        return max(least, round(CACHE_FLAGS[name] * steps / CACHE_STEPS))

    own = CACHE_TYPES[cache_type]
    edge = threshold = None
    if "no_cache_block_id" in own:
        asked = given.get("no_cache_block_id")
        blocks = range(layers - 1, layers) if asked is None else parse_blocks(asked)
        if blocks.stop != layers or blocks.start < 1:
            raise InputError(
                f"--no_cache_block_id {asked}: reused steps compute the last blocks; of {layers} blocks that is "
                f"{layers - 1}, or FIRST-{layers - 1} with FIRST from 1 on"
            )
        edge = blocks.start
    if "cache_threshold" in own:
        threshold = given.get("cache_threshold")
        threshold = own["cache_threshold"] if threshold is None else threshold
    settings = CacheSettings(
        cache_type,
        steps,
        scaled("cache_start_step", 1),
        scaled("cache_end_step", 1),
        scaled("cache_step_interval", 2),
        edge,
        threshold,
    )
    if settings.last_reuse < 0:
        raise InputError(
            f"--enable_cache: of {steps} steps none between --cache_start_step {settings.start} and --cache_end_step "
            f"{settings.end} can be reused; run without a cache, or set them apart"
        )
    return settings
