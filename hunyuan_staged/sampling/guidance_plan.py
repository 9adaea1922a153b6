"""At which steps both branches of guidance run, and its flags. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hunyuan_staged.errors import InputError

UNCONDITIONAL, CONDITIONAL = 0, 1  # places of the branches
WHOLE_RUN = (0.0, 1.0)


@dataclass(frozen=True)
class GuidancePlan:
    """Which branches each of `steps` steps runs: both where step / steps is in [start, stop), else the conditional alone.

    reuse: with n > 0 both run at one in n of those steps, and every later step without the unconditional branch goes on
    with the last difference of the two. With 0 it goes on without guidance. cached: steps that a cache takes over by a
    fixed plan, at which reuse > 0 runs the conditional branch alone; they do not count.

    Sources: an interval, Kynkäänniemi et al. 2024 (arXiv 2404.07724), by shares of the steps as in diffusers' guiders;
    the last difference, FastVideo's PR 1372.
    """

    steps: int
    start: float = 0.0
    stop: float = 1.0
    reuse: int = 0
    cached: Collection[int] = field(default=(), compare=False)

    @cached_property
    def guided(self) -> tuple[int, ...]:
        """The steps that run both branches."""
        inside = [step for step in range(self.steps) if self.start <= step / self.steps < self.stop]
        return tuple([step for step in inside if step not in self.cached][:: self.reuse] if self.reuse else inside)

    def branches(self, step: int) -> tuple[int, ...]:
        """The branches that a step runs."""
        return (UNCONDITIONAL, CONDITIONAL) if step in self.guided else (CONDITIONAL,)

    def reuses(self, step: int) -> bool:
        """Whether a step goes on with the difference of an earlier one."""
        return bool(self.reuse and self.guided and step > self.guided[0] and step not in self.guided)

    def keeps(self, done: int) -> bool:
        """Whether a step after the first `done` needs the difference that the last guided one of those had."""
        return done < self.steps and self.reuses(done)

    @property
    def forwards(self) -> int:
        """Forwards of the transformer over all steps."""
        return self.steps + len(self.guided)

    def describe(self) -> str:
        """A phrase for the log, e.g. "both branches at 15 of 30 steps"."""
        after = ", the last difference at others" if self.reuse else ""
        return f"both branches at {len(self.guided)} of {self.steps} steps{after}"

    def record(self) -> dict[str, Any]:
        """The plan as JSON, for metadata and for telling runs apart."""
        return {"interval": [self.start, self.stop], "reuse": self.reuse}


def parse_interval(text: str) -> tuple[float, float]:
    """START and STOP of --guidance_interval; InputError where they are no shares, or in the wrong order."""
    try:
        start, stop = (float(word) for word in text.split(","))
    except ValueError:
        start = stop = math.nan
    if not 0 <= start < stop <= 1:
        raise InputError(f"{text!r} is not START,STOP with 0 <= START < STOP <= 1", option="guidance_interval")
    return start, stop


def check_flags(interval: str | None, reuse: int | None, guidance_scale: float) -> None:
    """InputError for a value that is wrong whatever the steps, and for flags of a run without guidance."""
    if interval is not None:
        parse_interval(interval)
    if reuse is not None and reuse < 0:
        raise InputError(f"{reuse} is neither 0 (no reuse) nor a number of steps", option="guidance_reuse")
    given = _given(interval, reuse)
    if given and guidance_scale == 1:
        raise InputError("needs guidance, and this run has none: --guidance_scale is 1", option=given[0])


def _given(interval: str | None, reuse: int | None) -> list[str]:
    """Which of the two flags ask for something."""
    asked = {"guidance_interval": interval, "guidance_reuse": reuse or None}
    return [name for name, value in asked.items() if value is not None]


def resolve(
    interval: str | None, reuse: int | None, *, steps: int, guidance_scale: float, cached: Collection[int] = ()
) -> GuidancePlan | None:
    """The plan of a run; None where every step runs every branch.

    InputError for flags of a run without guidance, and for an interval that holds no step.
    """
    check_flags(interval, reuse, guidance_scale)
    if not _given(interval, reuse):
        return None
    start, stop = parse_interval(interval) if interval else WHOLE_RUN
    plan = GuidancePlan(steps, start, stop, reuse or 0, frozenset(cached))
    if not plan.guided:
        raise InputError(f"{interval} holds none of {steps} steps", option="guidance_interval")
    return plan if len(plan.guided) < steps else None
