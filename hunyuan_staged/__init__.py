"""The engine of the staged HunyuanVideo-1.5 suite: everything but flags, logs and reports."""

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


BAD_INPUT = 2  # the exit status of an InputError


class InputError(ValueError):
    """Something a user gave cannot be used. One line: the culprit, what was given, what is allowed."""


def one_line(text: object) -> str:
    """A message as one line of printable text: line breaks become spaces, other control characters their escapes."""
    return printable(" ".join(str(text).split()))


def status_of(work: Callable[[], object]) -> int:
    """The exit status of a command: 0, or BAD_INPUT after one line on stderr where the work raised InputError."""
    try:
        work()
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def check_output_dir(flag: str, folder: str | Path) -> None:
    """InputError where a folder cannot be made or written, before the work whose result it is for."""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{flag} {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: {place} cannot be written")


def quiet(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    """The progress wrapper that shows nothing; takes tqdm's keywords and ignores them."""
    return iterable


def printable(text: str) -> str:
    """Text with every control character, line breaks included, replaced by its escape (\\x1b, \\n)."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
