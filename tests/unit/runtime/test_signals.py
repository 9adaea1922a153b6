"""What a signal makes of errors that come after it."""

import os
import signal

from hunyuan_staged.errors import InputError
from hunyuan_staged.runtime.failure import status_of_error
from hunyuan_staged.runtime.signals import Interrupted, Interrupts


def interrupted_by(number: int) -> Interrupts:
    with Interrupts() as interrupts, interrupts.deferred():
        os.kill(os.getpid(), number)
        interrupts.ignore()
        received = interrupts.received
        interrupts.received = 0  # so that deferred() raises nothing
    interrupts.received = received
    return interrupts


def test_what_an_interrupted_import_raises_later_is_the_signals_doing(capsys):
    """numpy swallowed the signal within an import, and recursed without end later: a traceback and status 1."""
    interrupts = interrupted_by(signal.SIGTERM)
    cause = interrupts.cause_of(RecursionError("numpy"))
    assert isinstance(cause, Interrupted)
    assert status_of_error("stage 1", cause, debug=False) == 143
    assert capsys.readouterr().err == "error: stage 1 was interrupted by SIGTERM; run the same command again\n"
    assert status_of_error("stage 1", cause, debug=True) == 143
    assert "RecursionError: numpy" in capsys.readouterr().err


def test_a_refusal_stays_one_and_without_a_signal_every_error_does():
    refusal, fault = InputError("bad"), RuntimeError("ours")
    assert interrupted_by(signal.SIGTERM).cause_of(refusal) is refusal
    assert Interrupts().cause_of(fault) is fault
