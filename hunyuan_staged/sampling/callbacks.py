"""What happens after each step of the denoising loop: a look at the latents, at signals, and whatever else is given.

A callback takes an AfterStep. One that is a context manager, too, is entered for as long as the loop runs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hunyuan_staged.errors import InputError, Stopped
from hunyuan_staged.parallel.world import MaxAcrossRanks, World
from hunyuan_staged.runtime.signals import Interrupted, Interrupts
from hunyuan_staged.sampling.state import StateSaver


@dataclass(frozen=True)
class AfterStep:
    """A step that has been done: its number, from 0; the latents [1, 32, T, h, w] after it, not to be changed; clean(),
    what the step took the noiseless latents to be, on the device; what else a run would need to go on from here, which
    every rank calls together where one does."""

    index: int
    latents: torch.Tensor
    clean: Callable[[], torch.Tensor]
    more: Callable[[], dict[str, torch.Tensor]] = dict


Callback = Callable[[AfterStep], None]


@contextlib.contextmanager
def active(callbacks: Sequence[Callback]) -> Iterator[Callback]:
    """All callbacks as one, in their order; the last is entered first and left last."""
    with contextlib.ExitStack() as stack:
        for callback in reversed(callbacks):
            if isinstance(callback, contextlib.AbstractContextManager):
                stack.enter_context(callback)

        def call(step: AfterStep) -> None:
            for callback in callbacks:
                callback(step)

        yield call


class FiniteGuard:
    """Stops the loop, on every rank, with an InputError once the latents hold NaN or Inf.

    describe(step): what to say of latents that are broken after so many steps. On a GPU it is noticed a step later.
    """

    def __init__(self, world: World, describe: Callable[[int], str]) -> None:
        self.describe = describe
        self._agree = MaxAcrossRanks(world)

    def __call__(self, step: AfterStep) -> None:
        at, broken = self._agree(step.index, ~torch.isfinite(step.latents).all()) or (0, 0)
        if broken:
            raise InputError(self.describe(at + 1))


class StopOnSignal(contextlib.AbstractContextManager["StopOnSignal"]):
    """At a signal lets the step end, saves the state, and raises Interrupted on every rank.

    A rank that left first would have its launcher end the rest.
    """

    def __init__(self, interrupts: Interrupts, saver: StateSaver) -> None:
        self.interrupts, self.saver = interrupts, saver
        self._agree = MaxAcrossRanks(saver.world)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "StopOnSignal":
        self._stack.enter_context(self.interrupts.deferred(self._notice))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def _notice(self, _: int) -> None:
        if self.saver.world.is_main:
            self.saver.report.info("stopping at the end of this step; a second signal stops at once")

    def __call__(self, step: AfterStep) -> None:
        (signum,) = self._agree(self.interrupts.received) or (0,)
        if self.saver.world.size == 1:
            signum = self.interrupts.received
        if not signum:
            return
        self.interrupts.patience = None
        failure = self.saver.save_now(step.index + 1, {"latents": step.latents} | step.more())
        done = f"after step {step.index + 1} of {self.saver.steps}"
        if failure:
            raise Interrupted(signum, f" {done}, whose state could not be saved: {failure}")
        raise Interrupted(signum, f" {done}; the same command with --resume goes on from there")


class StopAfter:
    """After so many steps saves the state and raises Stopped, on every rank. InputError: it cannot be saved."""

    def __init__(self, saver: StateSaver, steps: int) -> None:
        self.saver, self.steps = saver, steps

    def __call__(self, step: AfterStep) -> None:
        if step.index + 1 != self.steps or self.steps >= self.saver.steps:
            return
        failure = self.saver.save_now(self.steps, {"latents": step.latents} | step.more())
        if failure:
            raise InputError(failure)
        check_stopped(self.steps, self.steps, self.saver.steps)


def check_stopped(done: int, stop_after: int | None, steps: int) -> None:
    """Raise Stopped where as many steps are done as were asked for."""
    if stop_after and done >= stop_after:
        raise Stopped(f"stopped after step {done} of {steps}")


def no_draft(stop_after: int, steps: int) -> str:
    """What to say where a run has no more steps than it is to be stopped after."""
    return (
        f"--stop_after {stop_after} is not below this run's {steps} steps: it is no draft, its latents will be finished; "
        "with --resume and without --stop_after the same command decodes them"
    )


class SaveState(contextlib.AbstractContextManager["SaveState"]):
    """Saves the state every few steps, as `saver` says; where the one before is still being written, a step later.

    On a slow disk no step waits for it, on no rank.
    """

    def __init__(self, saver: StateSaver) -> None:
        self.saver = saver
        self._agree = MaxAcrossRanks(saver.world)
        self._due = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "SaveState":
        self._stack.enter_context(self.saver.writing())
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def __call__(self, step: AfterStep) -> None:
        if not self.saver.every:
            return
        # On several GPUs the answer is that of the step before: what was free then is free now.
        (writing,) = self._agree(int(self.saver.is_writing)) or (0,)
        if self.saver.world.size == 1:
            writing = self.saver.is_writing
        done = step.index + 1
        self._due = (self._due or self.saver.due(done)) and done < self.saver.steps
        if self._due and not writing:
            self._due = False
            self.saver.save(step.index + 1, {"latents": step.latents} | step.more())


def watching(
    saver: StateSaver, interrupts: Interrupts, looking: Sequence[Callback] = (), stop_after: int | None = None
) -> list[Callback]:
    """What watches a run whose state is kept: broken latents, signals, saving; signals only where states are saved.

    looking: what sees every step that is sound, also one after which the run ends. stop_after: so many steps, for Stopped.
    """
    stop: list[Callback] = [StopOnSignal(interrupts, saver)] if saver.every else []
    stop += [StopAfter(saver, stop_after)] if stop_after else []
    return [FiniteGuard(saver.world, saver.not_finite), *looking, *stop, SaveState(saver)]
