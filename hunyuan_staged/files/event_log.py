"""--log_json: what happens in a run, one JSON object a line. Knows no torch: the launcher writes to it, too."""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.files.atomic import check_output_dir

OPTION = "log_json"
FIRST_LINE_BYTES = 2**16  # so much of a file is read to see whether it is such a log


def check_log(name: str) -> None:
    """InputError where a file cannot be such a log: events are added to one, and to no other file."""
    path = Path(name)
    check_output_dir(f"--{OPTION}", path.parent)
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}", option=OPTION) from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{name} is no regular file", option=OPTION)
    if not os.access(path, os.R_OK | os.W_OK):
        raise InputError(f"{name} cannot be written", option=OPTION)
    if found.st_size and not _is_log(path):
        raise InputError(f"{name} holds something else than events, and is left as it is", option=OPTION)


def _is_log(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(FIRST_LINE_BYTES)
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and "event" in found


class EventLog:
    """Events of one stage, added to a file; without a file, or on another process than the first, to nothing.

    A disk that fills up costs the rest of the log, with a warning, and not the run.
    """

    def __init__(self, name: str | None, stage: str) -> None:
        """Open the file, and make its folder where it is absent. InputError where it cannot be written."""
        self.stage, self._handle = stage, -1
        if name is None:
            return
        check_log(name)
        try:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            # One write a line, at the file's end: what two processes add does not mix.
            self._handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"{name} cannot be written: {error.strerror}", option=OPTION) from error

    def write(self, event: str, **facts: Any) -> None:
        """Add one event; what JSON has no word for becomes text."""
        if self._handle < 0:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "stage": self.stage, "event": event, **facts}, default=str, allow_nan=False)
        try:
            os.write(self._handle, f"{line}\n".encode())
        except OSError as error:
            print(f"warning: --{OPTION} ends here: {one_line(error.strerror)}", file=sys.stderr, flush=True)
            self.close()

    def timed(self, what: str, iterable: Iterable[Any], *, total: int | None, initial: int = 0) -> Iterator[Any]:
        """Pass on what is iterated over, with an event for each item that is done, and the seconds it took."""
        started = perf_counter()
        for done, item in enumerate(iterable, initial + 1):
            yield item
            seconds = round(perf_counter() - started, 3)
            self.write("progress", what=what, done=done, total=total, seconds=seconds)
            started = perf_counter()

    def close(self) -> None:
        """Add nothing more."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.close(self._handle)
        self._handle = -1


NO_LOG = EventLog(None, "")
