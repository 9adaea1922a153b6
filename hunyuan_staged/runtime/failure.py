"""How a run ends badly: what is said, by which of its processes, and with which status."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from hunyuan_staged.errors import BAD_INPUT, FAULT, InputError, print_error
from hunyuan_staged.parallel.environment import rank_info
from hunyuan_staged.runtime.signals import Interrupted, Interrupts

if TYPE_CHECKING:
    from hunyuan_staged.parallel.world import World

# A launcher ends every process as soon as one ends badly: the others wait this long, so that the first gets to speak.
SILENCE_SECONDS = 15.0


def is_first() -> bool:
    """Whether this process is the one that speaks, as its environment tells before there is a process group."""
    try:
        return rank_info().rank == 0
    except InputError:
        return True  # each process has the same to say, and nobody knows how many there are


def say_error(text: object) -> None:
    """Print an error on the first process; another process gives the first the time to do so."""
    if is_first():
        print_error(text)
    else:
        time.sleep(SILENCE_SECONDS)


def status_of_error(name: str, error: BaseException, debug: bool) -> int:
    """Say in one line why a stage ends, on the first process, and return its status; a fault of ours is raised again."""
    if isinstance(error, InputError):
        if debug:
            traceback.print_exception(error)
        # The others fail the same check; one of them speaks.
        say_error(error)
        return BAD_INPUT
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(signal.SIGINT)
    if isinstance(error, Interrupted):
        if debug and error.__cause__:
            traceback.print_exception(error.__cause__)
        if is_first():
            print_error(f"{name} {error}")
        return error.status
    raise error


def leave(name: str, error: BaseException, debug: bool, world: World, interrupts: Interrupts) -> NoReturn:
    """End this process of several. Of all that fail, the first one speaks, the others are silent and give it the time.

    Without the interpreter's own end: taking down the process group waits for processes that are gone.
    """
    interrupts.ignore()
    if isinstance(error, Interrupted):
        # All have been told to stop, or have agreed to; but a launcher also ends the others so when one has failed.
        speaks, status = world.is_main and not world.error_reported(), error.status
    else:
        speaks, status = _is_the_cause(error, world, interrupts), BAD_INPUT if isinstance(error, InputError) else FAULT
    if speaks and (status == FAULT or (debug and status == BAD_INPUT)):
        traceback.print_exception(error)
    if speaks and status != FAULT:
        print_error(f"{name} {error}" if isinstance(error, Interrupted) else error)
    if speaks:
        world.report_error()
    else:
        # A signal: the launcher already knows of the failure.
        _wait_until(lambda: bool(interrupts.received) or world.error_reported())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_the_cause(error: BaseException, world: World, interrupts: Interrupts) -> bool:
    """Whether this process's error is the one to show: its own, and the first of the run.

    An exchange that failed is most often the consequence of another process's error or death. That process, or the
    launcher, then says so; if nobody does, the failed exchange is all that there is to show.
    """
    if _failed_exchange(error) and _wait_until(lambda: bool(interrupts.received) or world.error_reported()):
        return False
    claimed = world.claims_report()
    if claimed is None:
        # The process that held the store has ended, most often with the same error; the launcher then ends this one.
        return not _wait_until(lambda: bool(interrupts.received))
    return claimed


def _failed_exchange(error: BaseException) -> bool:
    """Whether an exception comes from torch.distributed: by its class, or, with gloo, by where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename if frames else ""
    return type(error).__name__.startswith(("Dist", "PeerFailed")) or "/torch/distributed/" in last


def _wait_until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, SILENCE_SECONDS at most; whether it came true."""
    deadline = time.monotonic() + SILENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
