"""Progress wrappers, and whom a stage tells how it goes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def quiet(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    """The progress wrapper that shows nothing; takes tqdm's keywords and ignores them."""
    return iterable


class Reporter:
    """Whom a stage tells how it goes. This one keeps all to itself; the scripts' shows bars and writes a log."""

    def info(self, text: str) -> None:
        """A line for the log."""

    def warn(self, text: str) -> None:
        """A warning for the log."""

    def progress(self, iterable: Iterable[Any], **options: Any) -> Iterable[Any]:
        """Wrap what is iterated over; options: tqdm's keywords."""
        return quiet(iterable, **options)

    def set_postfix(self, text: str) -> None:
        """Show a few words behind the newest bar."""

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Time a part of a stage: load, compute, write. Parts of one name add up."""
        return nullcontext()


SILENT = Reporter()
