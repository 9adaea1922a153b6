"""Progress wrappers, and whom a stage tells how it goes."""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hunyuan_staged.errors import InputError


def quiet(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    """The progress wrapper that shows nothing; takes tqdm's keywords and ignores them."""
    return iterable


class LineBar:
    """A progress bar as lines, for a log: one every 10 %, with the seconds of a unit and those that are left.

    Takes tqdm's desc, unit, initial and total; without a total, and of an iterable without a length, it says nothing.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        *,
        say: Callable[[str], None],
        desc: str = "progress",
        unit: str = "step",
        initial: int = 0,
        total: int | None = None,
    ) -> None:
        self.iterable, self.say, self.desc, self.unit, self.initial = iterable, say, desc, unit, initial
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.postfix = ""

    def __iter__(self) -> Iterator[Any]:
        started, told = time.perf_counter(), 10 * self.initial // (self.total or 1)
        for done, item in enumerate(self.iterable, self.initial + 1):
            yield item
            tenths = 10 * done // self.total if self.total else told
            if tenths > told:
                told = tenths
                self._tell(done, (time.perf_counter() - started) / (done - self.initial))

    def _tell(self, done: int, each: float) -> None:
        assert self.total
        left = f"{each:.2f} s a {self.unit}, {each * (self.total - done):.0f} s left"
        postfix = f", {self.postfix}" if self.postfix else ""
        self.say(f"{self.desc}: {100 * done // self.total}% ({done} of {self.total}), {left}{postfix}")

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """A few words for the end of the next line; there is nothing to refresh."""
        self.postfix = text

    def close(self) -> None:
        """There is nothing to clear away."""


class Reporter:
    """Whom a stage tells how it goes. This one keeps all to itself; the scripts' shows bars and writes a log."""

    def info(self, text: str) -> None:
        """A line for the log."""

    def warn(self, text: str) -> None:
        """A warning for the log."""

    def warn_or_refuse(self, reason: str | None, *, strict: bool) -> None:
        """Warn of files that do not belong together; with --strict, InputError."""
        if reason and strict:
            raise InputError(f"{reason}; --strict refuses that")
        if reason:
            self.warn(reason)

    def progress(self, iterable: Iterable[Any], **options: Any) -> Iterable[Any]:
        """Wrap what is iterated over; options: tqdm's keywords."""
        return quiet(iterable, **options)

    def set_postfix(self, text: str) -> None:
        """Show a few words behind the newest bar."""

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Time a part of a stage: load, compute, write. Parts of one name add up."""
        return nullcontext()


SILENT = Reporter()
