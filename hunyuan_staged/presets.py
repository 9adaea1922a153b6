"""--preset: sets of stage 2's flags from draft to exact, chosen by docs/presets.md's measurements. Knows no torch.

Each flag that the user gives stands in the place of the preset's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# (share, n): up to this share of the steps one in n is computed.
Stretches = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Preset:
    """steps: share of the version's own. computed: which of those run the transformer, where not all do; the others take
    over what all blocks added at the last of them (teacache)."""

    steps: float = 1.0
    computed: Stretches = ()


EXACT = "exact"  # equals no preset
PRESETS = {
    "draft": Preset(0.2),
    "fast": Preset(0.32),
    "balanced": Preset(1.0, ((0.1, 1), (0.36, 2), (0.75, 3), (1.0, 2))),
    EXACT: Preset(),
}
CACHE_TYPE = "teacache"


def computed_steps(stretches: Stretches, steps: int) -> list[int]:
    """The steps that are computed, of so many; the last is always one of them: what it takes over stays in the video."""
    found, step = [], 0
    while step < steps:
        found.append(step)
        step += next(every for share, every in stretches if step / steps < share)
    return found if found[-1] == steps - 1 else [*found, steps - 1]


def flags_of(name: str, steps: int) -> dict[str, Any]:
    """The flags of a preset for a run of so many steps, without the number of steps."""
    stretches = PRESETS[name].computed
    if not stretches:
        return {}
    text = ",".join(map(str, computed_steps(stretches, steps)))
    return {"enable_cache": True, "cache_type": CACHE_TYPE, "cache_steps": text}


def fill(name: str, steps: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's flags that stand beside those `given` (None: not given) in a run of so many steps.

    A flag of the cache's own schedule, or disable_cache, stands in the place of the preset's steps.
    """
    found = flags_of(name, steps)
    if given.get("disable_cache"):
        return {}
    if any(given.get(flag) is not None for flag in SCHEDULE) or given.get("cache_type") in ADAPTIVE:
        found.pop("cache_steps", None)
    return {flag: value for flag, value in found.items() if given.get(flag) in (None, False)}


# Flags that choose the steps of a cache in another way, and types that do so themselves.
SCHEDULE = ("cache_start_step", "cache_end_step", "cache_step_interval", "cache_threshold")
ADAPTIVE = ("firstblock", "magcache")


def cache_type(name: str | None) -> str | None:
    """The type of a preset's cache, None where it has none."""
    return CACHE_TYPE if name and PRESETS[name].computed else None


def described(name: str, steps: int) -> str:
    """A preset's flags as a command line of a version that takes so many steps."""
    taken = round(PRESETS[name].steps * steps)
    words = [f"--num_inference_steps {taken}"] if taken != steps else []
    for flag, value in flags_of(name, taken).items():
        words.append(f"--{flag}" if value is True else f"--{flag} {value}")
    return " ".join(words)
