"""What was recorded of a checkpoint for teacache's polynomial and magcache: data, and how a run reads it. Knows no torch.

calibrations.json has what others recorded of the published versions, with its source and conditions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError

PUBLISHED = Path(__file__).with_name("calibrations.json")
# Of a checkpoint's own calibration: LightX2V's for 480p_i2v.
RETENTION, IN_A_ROW, THRESHOLD = 0.2, 6, 0.24


def noise_levels(steps: int, flow_shift: float) -> list[float]:
    """The sigmas of a schedule at its steps, from 1 on; schedule.flow_sigmas has them as a tensor."""
    times = (1 - step / steps for step in range(steps))
    return [flow_shift * time / (1 + (flow_shift - 1) * time) for time in times]


@dataclass(frozen=True)
class Polynomial:
    """TeaCache's: relative change of the first block's modulated input → of what comes of it; highest power first."""

    coefficients: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Curve:
    """MagCache's: ratios[branch][i] is the mean over tokens of ‖residual_i‖ / ‖residual_(i-1)‖, 1 at step 0, of what all
    blocks add; branches are (unconditional, conditional).

    threshold, in_a_row (reused steps), retention (the share of the steps that is always computed): of its source.
    """

    steps: int
    flow_shift: float
    ratios: tuple[tuple[float, ...], ...]
    source: str
    threshold: float = THRESHOLD
    in_a_row: int = IN_A_ROW
    retention: float = RETENTION

    def sizes_of(self, levels: Sequence[float]) -> list[list[float]]:
        """The size of what the blocks add at each step of another schedule, to any scale, for each branch: of the step
        that was recorded at the nearest sigma. levels: the sigmas of the steps."""
        recorded = noise_levels(self.steps, self.flow_shift)
        places = [min(range(self.steps), key=lambda place: abs(recorded[place] - level)) for level in levels]
        sizes = [list(accumulate(ratios, mul)) for ratios in self.ratios]
        return [[size[place] for place in places] for size in sizes]


@dataclass(frozen=True)
class Calibration:
    """Of one checkpoint: a polynomial, and curves of schedules of different lengths."""

    polynomial: Polynomial | None = None
    curves: tuple[Curve, ...] = ()

    def curve(self, steps: int) -> Curve | None:
        """The curve whose number of steps is nearest."""
        return min(self.curves, key=lambda curve: abs(curve.steps - steps), default=None)


def flat(steps: int) -> Calibration:
    """A curve that never changes: magcache reuses all that its interval allows."""
    return Calibration(curves=(Curve(steps, 1.0, ((1.0,) * steps,), "none"),))


def parse(found: Any, origin: object) -> Calibration:
    """A calibration from its JSON; InputError, which names `origin`, where it is none."""
    try:
        polynomial = found.get("teacache")
        curves = [
            Curve(**(one | {"ratios": tuple(_numbers(ratios) for ratios in one["ratios"])}))
            for one in found.get("magcache", ())
        ]
        for curve in curves:
            if {len(ratios) for ratios in curve.ratios} != {curve.steps} or min(map(min, curve.ratios)) <= 0:
                raise ValueError(f"a curve of {curve.steps} steps needs as many ratios above 0 for each branch")
        return Calibration(
            Polynomial(_numbers(polynomial["coefficients"]), str(polynomial["source"])) if polynomial else None,
            tuple(curves),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{origin} is no calibration of caches ({error!r}); record it again") from error


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("not all are finite numbers")
    return numbers


def read(path: Path) -> Calibration | None:
    """The calibration in a file, None where there is none; InputError where it is broken."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); record it again") from error
    return parse(found, path)


@cache
def _published() -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return found


def published(version: str) -> Calibration | None:
    """What others recorded of a published version, by its name."""
    found = _published().get(version)
    return parse(found, PUBLISHED) if found else None
