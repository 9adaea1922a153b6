"""Errors of the user, in one line; exit statuses."""

import argparse
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


BAD_INPUT = 2  # the exit status of an InputError
JOBS_FAILED = 3  # of many jobs some failed, and the others are done
FAULT = 1  # what Python itself ends with after a traceback
SIGNALLED = 128  # plus the signal's number: the shell's status of a process that a signal ended
MAX_LINE = 1900  # characters of a message, whatever it quotes: what stands before it may have another hundred


class Stopped(Exception):
    """A run was stopped after a step, as asked for, and its state is saved; the text says after which."""


class InputError(ValueError):
    """Something a user gave cannot be used. One line: the culprit, what was given, what is allowed.

    option: the option that is the culprit, without dashes; the command line then shows `--option text`, a job file its
    own place.
    """

    def __init__(self, text: str, option: str | None = None) -> None:
        super().__init__(f"--{option} {text}" if option else text)
        self.text, self.option = text, option


# The machine's or the user's, not a fault of ours: no space, over the quota or the limit, read-only, no right, broken.
DENIED = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG),
)


def refusal_of(error: BaseException) -> BaseException:
    """The InputError that names a file which the machine denies, wherever it was met; any other error as it is."""
    if not isinstance(error, OSError) or error.errno not in DENIED or error.filename is None:
        return error
    refusal = InputError(f"{os.fsdecode(error.filename)}: {error.strerror}")
    refusal.__cause__ = error
    return refusal


def one_line(text: object) -> str:
    """A message as one line of printable text: line breaks become spaces, other control characters their escapes.

    Of more than MAX_LINE characters the middle is left out: the culprit stands first, what is allowed last.
    """
    line = printable(" ".join(str(text).split()))
    if len(line) <= MAX_LINE:
        return line
    gap = " […] "
    head = (MAX_LINE - len(gap)) // 2
    return line[:head] + gap + line[len(line) - (MAX_LINE - len(gap) - head) :]


def print_error(text: object) -> None:
    """Print the one line that says why a run ends, on stderr. Every such line goes through here, and so has a limit."""
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)


def open_standard_streams() -> None:
    """Put the null device in the place of each standard stream that this process was started without (`>&-`).

    The next file or pipe that is opened would take its number, and get what libraries and child processes print.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def run_tool(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """What a tool's main returns, its exit status: what run gave (None: 0), or the parser's where it ends the tool.

    InputError is one line on stderr and BAD_INPUT, Ctrl-C the line `interrupted` and 130; any other exception is our
    fault and goes on. With --debug an InputError's traceback comes first.
    """
    open_standard_streams()
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    try:
        return run(args) or 0
    except Exception as raised:
        error = refusal_of(raised)
        if not isinstance(error, InputError):
            raise
        if args.debug:
            traceback.print_exception(error)
        print_error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        print_error(interrupted)
        return SIGNALLED + signal.SIGINT


def printable(text: str) -> str:
    """Text with every control character, line breaks included, replaced by its escape (\\x1b, \\n)."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def write_stdout(text: str) -> None:
    """Print text as it stands; what the terminal's encoding lacks becomes an escape. InputError: it cannot be written."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except OSError as error:
        # What is left in the buffer would fail once more when Python ends, and change the status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"cannot write to standard output: {error.strerror}") from error
