"""SIGTERM and Ctrl-C: the first one ends a run in good order, a second one at once.

Python runs a signal's handler only when the main thread comes back from the call that it is in, which with a GPU can be
a whole step later. So the bytes that the interpreter writes for each signal as it arrives are read by a thread of its
own: it sees a second signal, and that patience has run out, whatever the main thread is doing.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from hunyuan_staged.errors import SIGNALLED, InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal ends this run. `after` says how far it came and how to go on, for the one line that the user sees."""

    def __init__(self, signum: int, after: str = "; run the same command again") -> None:
        super().__init__(signum, after)
        self.signum, self.after = signum, after

    @property
    def status(self) -> int:
        """The exit status: 130 for Ctrl-C, 143 for SIGTERM."""
        return SIGNALLED + self.signum

    def __str__(self) -> str:
        return f"was interrupted by {signal.Signals(self.signum).name}{self.after}"


class Interrupts:
    """Inside its context SIGTERM and SIGINT raise Interrupted, or, while they are deferred, are only noted.

    A second signal ends the process at once. patience: so many seconds after the first one the process ends at once,
    too; None waits for ever. cleanups: called before the process ends at once, on another thread or within a signal's
    handler. Outside the main thread, where Python allows no handlers, it does nothing.

    Where the exception would be lost, the process ends at once, after last_words(Interrupted), whose result is the
    status: within an import, which may swallow it or abort, and within __del__ and callbacks, of which Python only warns.
    """

    def __init__(self) -> None:
        self.received = 0  # the first signal's number
        self.patience: float | None = None
        self.cleanups: list[Callable[[], None]] = []
        self.last_words: Callable[[Interrupted], int] | None = None
        self._deferred = False
        self._notice: Callable[[int], None] | None = None
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is not threading.main_thread():
            return self
        read, write = os.pipe()
        os.set_blocking(write, False)
        handlers: dict[signal.Signals, Any] = {number: signal.signal(number, self._handle) for number in SIGNALS}
        former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(read,), name="interrupts", daemon=True)
        watcher.start()
        unraisable, sys.unraisablehook = sys.unraisablehook, self._unraisable
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

        def restore() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            signal.set_wakeup_fd(former)
            sys.unraisablehook = unraisable
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.close(write)  # which ends the watcher
            watcher.join()
            os.close(read)

        self._restore = restore
        return self

    def __exit__(self, *_: object) -> None:
        self._deferred = True
        if self._restore:
            self._restore()

    def unblock(self) -> None:
        """Let signals in that were held back until now, by `hold_back` or by a launcher."""
        if self._restore:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    @contextlib.contextmanager
    def deferred(self, notice: Callable[[int], None] | None = None) -> Iterator[None]:
        """Let a first signal only be noted in `received`; what is still unanswered at the end raises Interrupted.

        notice(signum) is called when it arrives, on another thread.
        """
        self._deferred, self._notice = True, notice
        try:
            yield
        finally:
            self._deferred, self._notice = False, None
        if self.received:
            raise Interrupted(self.received)

    def cause_of(self, error: BaseException) -> BaseException:
        """What ended a run: the signal, if one has come, unless the user's input did.

        Code of others that a signal interrupts, an import for one, may raise anything later on.
        """
        if not self.received or isinstance(error, InputError | Interrupted):
            return error
        cause = Interrupted(self.received)
        cause.__cause__ = error
        return cause

    def check(self) -> None:
        """Raise Interrupted where a signal has come whose exception somebody swallowed."""
        if self.received and not self._deferred:
            raise Interrupted(self.received)

    def ignore(self) -> None:
        """Raise nothing any more: the process is on its way out. A second signal still ends it at once."""
        self._deferred = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = signum
        if self._deferred:
            return
        if _imports(frame):
            self._end(signum)
        raise Interrupted(signum)

    def _unraisable(self, lost: "sys.UnraisableHookArgs") -> None:
        """What Python does with an exception that it cannot raise: a warning, and it goes on."""
        if isinstance(lost.exc_value, Interrupted):
            self._end(lost.exc_value.signum)
        sys.__unraisablehook__(lost)

    def _end(self, signum: int) -> NoReturn:
        """End the process at once, on its main thread, as if Interrupted had been raised and caught."""
        self._clean_up()
        error = Interrupted(signum)
        status = self.last_words(error) if self.last_words else error.status
        sys.stdout.flush()
        os._exit(status)

    def _exit(self, signum: int) -> NoReturn:
        self._clean_up()
        os._exit(SIGNALLED + signum)

    def _clean_up(self) -> None:
        for cleanup in self.cleanups:
            with contextlib.suppress(OSError):
                cleanup()

    def _watch(self, pipe: int) -> None:
        first = None
        while True:
            left = None
            if first is not None and self.patience is not None:
                left = max(0.0, first[1] + self.patience - time.monotonic())
            # Every second, since patience may change meanwhile.
            ready = select.select([pipe], [], [], 1.0 if left is None else min(left, 1.0))[0]
            if not ready:
                if first is not None and left == 0.0:
                    self._exit(first[0])
                continue
            data = os.read(pipe, 1)
            if not data:
                return
            if data[0] not in SIGNALS:
                continue
            if first is not None:
                self._exit(data[0])
            first = data[0], time.monotonic()
            if self._notice:
                self._notice(data[0])


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, is Python's own of an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def hold_back() -> None:
    """Before a script's work: signals wait until Interrupts.unblock, and after Interrupts' end do nothing.

    Else Ctrl-C in a script's first or last moments would be a traceback. For a process's main thread alone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, _do_nothing)


def ignore_signals() -> None:
    """After a script's work: while Python ends it takes handlers away, and a thread of a library may get the signal."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _do_nothing(signum: int, _: FrameType | None) -> None:
    """Not SIG_IGN, which would forget a signal that waits, and which child processes would inherit."""
