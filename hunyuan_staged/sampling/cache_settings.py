"""Which steps a feature cache reuses, and its flags. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hunyuan_staged import versions
from hunyuan_staged.errors import InputError
from hunyuan_staged.sampling.calibration import Calibration

# Of a run of CACHE_STEPS steps, as in the official code; other schedules keep their share of it (resolve).
CACHE_STEPS = 50
CACHE_FLAGS = {"cache_start_step": 11, "cache_end_step": 45, "cache_step_interval": 4}
# Which further flags a type of cache has, with their defaults; None: by the calibration, and of teacache no threshold.
# firstblock's is diffusers' (FirstBlockCacheConfig); the block is the last of the 54, as in the official code.
CACHE_TYPES: dict[str, dict[str, Any]] = {
    "deepcache": {"no_cache_block_id": "53"},
    "teacache": {"cache_threshold": None},
    "taylorcache": {},
    "firstblock": {"cache_threshold": 0.05},
    "magcache": {"cache_threshold": None},
}
PLANNED_TYPES = ("deepcache", "teacache", "taylorcache")  # whose steps are chosen beforehand
DEFAULT_CACHE_TYPE = "deepcache"
TAYLOR_ORDER = 1
# Activations (a rank's tokens x channels) that a type keeps from step to step for each guidance branch, and those that it
# holds besides while the blocks run: their input, and firstblock also what the first block gave and added.
_KEPT = {"deepcache": 1, "teacache": 1, "taylorcache": TAYLOR_ORDER + 1, "firstblock": 2, "magcache": 1}
_HELD = {"firstblock": 3}
_POLYNOMIAL = 1  # more of each, for teacache with a threshold: the first block's modulated input


@dataclass(frozen=True)
class CacheSettings:
    """Which steps a cache may reuse: those in [start, end), at most interval - 1 in a row; step `start` is computed.

    edge: deepcache's first block that reused steps compute. threshold: of the types that have one. coefficients: of
    teacache's polynomial, the highest power first. chosen: the steps that are reused, where no interval says it.
    """

    type: str
    steps: int
    start: int
    end: int
    interval: int
    edge: int | None = None
    threshold: float | None = None
    coefficients: tuple[float, ...] = ()
    chosen: frozenset[int] | None = None

    @property
    def adapts(self) -> bool:
        """Whether what was computed decides which steps are reused."""
        return self.threshold is not None and self.chosen is None

    def may_reuse(self, step: int) -> bool:
        """Whether a step, from 0, is reused; where the cache adapts, whether it can be."""
        if not self.start < step < min(self.end, self.steps):
            return False
        if self.chosen is not None:
            return step in self.chosen
        return self.adapts or (step - self.start) % self.interval != 0

    @property
    def last_reuse(self) -> int:
        """The last step that may be reused; -1 where there is none."""
        return max((step for step in range(self.steps) if self.may_reuse(step)), default=-1)

    @property
    def first_kept(self) -> int:
        """The first step from which something is kept: before `start` where a rate of change is needed."""
        before = TAYLOR_ORDER if self.type == "taylorcache" else 0
        return max(0, self.start - before)

    def kept(self, branches: int) -> int:
        """Activations that it takes on a rank that computes so many guidance branches."""
        more = _POLYNOMIAL if self.coefficients else 0
        return branches * (_KEPT[self.type] + more) + _HELD.get(self.type, 1) + more

    def expected_change(self, change: float) -> float:
        """TeaCache's polynomial of the relative change of the first block's modulated input."""
        total = 0.0
        for coefficient in self.coefficients:
            total = total * change + coefficient
        return total

    @property
    def planned(self) -> frozenset[int]:
        """The steps that are reused whatever is computed; none where that decides."""
        return frozenset() if self.adapts else frozenset(filter(self.may_reuse, range(self.steps)))

    @property
    def reused(self) -> int | None:
        """How many steps are reused; None where what was computed decides."""
        return None if self.adapts else len(self.planned)

    def source(self, step: int) -> int:
        """The last step before this one that is computed by plan."""
        return max(before for before in range(step) if not self.may_reuse(before))

    def record(self) -> dict[str, Any]:
        """The settings as JSON, for metadata and for telling runs apart."""
        chosen = {"type": self.type, "start_step": self.start, "end_step": self.end, "step_interval": self.interval}
        if self.edge is not None:
            chosen["no_cache_block_id"] = self.edge
        if self.threshold is not None:
            # JSON has no infinity.
            chosen["threshold"] = self.threshold if math.isfinite(self.threshold) else "inf"
        if self.coefficients:
            chosen["coefficients"] = list(self.coefficients)
        if self.chosen is not None:
            chosen["reused_steps"] = sorted(self.chosen)
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
        if name == "cache_steps":
            _check_steps(cache_type, given)
        elif name not in CACHE_FLAGS and cache_type not in owners:
            raise InputError(f"--{name} belongs to --cache_type {', '.join(owners)}, not to {cache_type}")
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


def _check_steps(cache_type: str, given: Mapping[str, Any]) -> None:
    """InputError for cache_steps that are none, beside flags that choose otherwise, or of a type that chooses itself."""
    parse_steps(given["cache_steps"])
    other = next((name for name in (*CACHE_FLAGS, "cache_threshold") if given.get(name) is not None), None)
    if other:
        raise InputError(f"chooses the steps, and so does --{other}; give one of them", option="cache_steps")
    if cache_type not in PLANNED_TYPES:
        raise InputError(
            f"belongs to --cache_type {', '.join(PLANNED_TYPES)}, not to {cache_type}", option="cache_steps"
        )


def parse_steps(text: str) -> frozenset[int]:
    """The steps that --cache_steps names: N and FIRST-LAST, separated by commas; step 0 must be one of them."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 8:
            raise InputError(f"{part!r} is neither a step nor FIRST-LAST, as in 0-7,9,11", option="cache_steps")
        found |= set(range(int(first), int(last or first) + 1))
    if 0 not in found:
        raise InputError(f"{text} lacks step 0, which has nothing to take over", option="cache_steps")
    return frozenset(found)


def parse_blocks(text: str) -> range:
    """Which blocks --no_cache_block_id names: one, or FIRST-LAST."""
    return versions.parse_block_range("--no_cache_block_id", f"{text}-{text}" if text.isdigit() else text)


def needs_calibration(cache_type: str, given: Mapping[str, Any]) -> bool:
    """Whether a cache goes by what was recorded of its checkpoint."""
    return cache_type == "magcache" or (cache_type == "teacache" and given.get("cache_threshold") is not None)


def resolve(
    cache_type: str,
    given: Mapping[str, Any],
    steps: int,
    layers: int,
    calibration: Calibration | None = None,
    levels: Sequence[float] | None = None,
) -> CacheSettings:
    """The settings of a run of so many steps on a transformer of so many blocks.

    Flags that are absent have the official defaults for 50 steps, and keep their share of a schedule of another length:
    of 30 steps they reuse the same stretch, with reused steps as far from computed ones. magcache, and teacache with a
    threshold, need the checkpoint's calibration, which has defaults of its own; magcache also the sigmas of the steps.

    InputError where no step is left to reuse, for blocks that do not reach to the last one (a reused step takes the
    outcome of all blocks before), and where there is no calibration.
    """
    check_flags(cache_type, given)
    known = {name: value for name, value in given.items() if value is not None}
    own = CACHE_TYPES[cache_type]
    threshold = known.get("cache_threshold", own.get("cache_threshold"))
    edge = _edge(known.get("no_cache_block_id"), layers) if "no_cache_block_id" in own else None
    coefficients: tuple[float, ...] = ()
    if cache_type == "magcache":
        curve = _need(calibration.curve(steps) if calibration else None, cache_type)
        threshold = curve.threshold if threshold is None else threshold
        # The first reused step is the one after start.
        start = max(0, round(curve.retention * steps) - 1)
        usual = {"cache_start_step": start, "cache_end_step": steps, "cache_step_interval": curve.in_a_row + 1}
    elif needs_calibration(cache_type, known):
        coefficients = _need(calibration.polynomial if calibration else None, cache_type).coefficients
        usual = {"cache_start_step": 0, "cache_end_step": steps - 1, "cache_step_interval": steps}
    else:
        least = {"cache_start_step": 1, "cache_end_step": 1, "cache_step_interval": 2}
        usual = {name: max(least[name], round(value * steps / CACHE_STEPS)) for name, value in CACHE_FLAGS.items()}
    start, end, interval = (known.get(name, usual[name]) for name in CACHE_FLAGS)
    settings = CacheSettings(cache_type, steps, start, end, interval, edge, threshold, coefficients)
    if "cache_steps" in known:
        computed = parse_steps(known["cache_steps"])
        if max(computed) >= steps:
            raise InputError(f"step {max(computed)} is none of this run's {steps}", option="cache_steps")
        chosen = frozenset(range(steps)) - computed
        settings = CacheSettings(cache_type, steps, 0, steps, steps, edge, chosen=chosen)
    if settings.last_reuse < 0:
        raise InputError(
            f"--enable_cache: of {steps} steps none between --cache_start_step {settings.start} and --cache_end_step "
            f"{settings.end} can be reused; run without a cache, or set them apart"
        )
    if cache_type == "magcache":
        assert levels is not None
        settings = replace(settings, chosen=_by_drift(settings, curve.sizes_of(levels)))
    return settings


def check_steps(cache_type: str, given: Mapping[str, Any], steps: int) -> None:
    """InputError where a run of so many steps leaves a cache none to reuse, whatever the model's blocks.

    A cache that goes by a calibration is judged when that is at hand.
    """
    if not needs_calibration(cache_type, given):
        resolve(cache_type, {**given, "no_cache_block_id": None}, steps, layers=2)


Found = TypeVar("Found")


def _need(found: Found | None, cache_type: str) -> Found:
    """What a calibration has; InputError where there is none."""
    if not found:
        raise InputError(
            f"{cache_type}{' with --cache_threshold' * (cache_type == 'teacache')} needs a calibration of these weights, "
            "and there is none; python -m hunyuan_staged.calibrate records one, teacache without a threshold and "
            "firstblock need none",
            option="cache_type",
        )
    return found


def _edge(asked: str | None, layers: int) -> int:
    """deepcache's first block that reused steps compute."""
    blocks = range(layers - 1, layers) if asked is None else parse_blocks(asked)
    if blocks.stop != layers or blocks.start < 1:
        raise InputError(
            f"--no_cache_block_id {asked}: reused steps compute the last blocks; of {layers} blocks that is "
            f"{layers - 1}, or FIRST-{layers - 1} with FIRST from 1 on"
        )
    return blocks.start


def _by_drift(settings: CacheSettings, sizes: Sequence[Sequence[float]]) -> frozenset[int]:
    """The steps that magcache reuses: while the sum, since the last computed step, of how far the size of what all blocks
    add has gone from its size there is below the threshold, for every guidance branch.

    sizes: of each branch, by step, to any scale. Source: MagCache, arXiv 2506.09045.
    """
    assert settings.threshold is not None
    reused, last, errors = set(), 0, [0.0] * len(sizes)
    for step in range(settings.steps):
        allowed = settings.start < step < min(settings.end, settings.steps) and step - last < settings.interval
        if allowed:
            errors = [error + abs(1 - size[step] / size[last]) for error, size in zip(errors, sizes, strict=True)]
        if allowed and max(errors) < settings.threshold:
            reused.add(step)
        else:
            last, errors = step, [0.0] * len(sizes)
    return frozenset(reused)
