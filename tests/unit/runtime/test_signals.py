"""What a signal makes of errors that come after it."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

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


def run(program: str, folder: object = ROOT) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}"]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)


LISTENS = """
from hunyuan_staged.runtime.signals import Interrupts
def last_words(error):
    print("told", error)
    return error.status
def kill():
    os.kill(os.getpid(), signal.SIGTERM)
with Interrupts() as interrupts:
    interrupts.last_words = last_words
    interrupts.cleanups.append(lambda: print("cleaned"))
    {}
    print("went on")
"""
SWALLOWS = "try:\n    import os, signal\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    pass\n"
LOST = {
    "import": "import swallows",
    "__del__": "class A:\n        __del__ = lambda self: kill()\n    A()",
    "callback": "import weakref\n    class A: pass\n    a = A(); b = weakref.ref(a, lambda _: kill()); del a",
}


@pytest.mark.parametrize("where", LOST)
def test_where_an_exception_would_be_lost_a_signal_ends_the_process(tmp_path, where):
    """The stage went on: one signal in thirty of its start, status 0."""
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    ended = run(LISTENS.format(LOST[where]), tmp_path)
    assert (ended.returncode, ended.stderr) == (143, "")
    assert ended.stdout == "cleaned\ntold was interrupted by SIGTERM; run the same command again\n"


def test_elsewhere_it_is_raised_and_what_swallows_it_gains_little():
    with Interrupts() as interrupts:
        interrupts.check()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="was interrupted by SIGTERM"):
            interrupts.check()
        interrupts.ignore()
        interrupts.check()


def test_what_python_cannot_raise_is_warned_of_as_ever():
    ended = run(LISTENS.format("class A:\n        def __del__(self): 1 / 0\n    A()"))
    assert (ended.returncode, ended.stdout) == (0, "went on\n")
    assert "ZeroDivisionError" in ended.stderr


def test_a_signal_while_python_ends_does_nothing():
    """Python takes handlers away before modules: the process died of it, with its work done."""
    ended = run(
        """
import utils
class A:
    def __del__(self, kill=os.kill, me=os.getpid()):
        kill(me, 15)
        kill(me, 2)
a = A()
utils.run_script(lambda: 0)
"""
    )
    assert (ended.returncode, ended.stderr) == (0, "")
