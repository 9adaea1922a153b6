"""Errors of the user, in one line; exit statuses."""

import re
import sys
from collections.abc import Callable

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


BAD_INPUT = 2  # the exit status of an InputError


class InputError(ValueError):
    """Something a user gave cannot be used. One line: the culprit, what was given, what is allowed.

    option: the option that is the culprit, without dashes; the command line then shows `--option text`, a job file its
    own place.
    """

    def __init__(self, text: str, option: str | None = None) -> None:
        super().__init__(f"--{option} {text}" if option else text)
        self.text, self.option = text, option


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


def printable(text: str) -> str:
    """Text with every control character, line breaks included, replaced by its escape (\\x1b, \\n)."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
