"""What an actor does: it keeps one stage loaded, on processes of its own, and has it make one job after the other.

The processes are those that run_staged.sh would start. Where the actor is killed, the kernel sends them SIGTERM: they
save their state and leave. Knows no Ray.
"""

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import SIGNALLED, InputError, one_line
from hunyuan_staged.jobs.outcomes import Outcome, read_outcome
from hunyuan_staged.runtime.processes import Supervisor

TAIL_BYTES = 4096  # of a log, for its last line


@dataclass(frozen=True)
class StageCommand:
    """What an actor runs. script: of the stage; words: its flags; processes: that make a job together; folder: the one
    that relative paths start from; log: the file that they write to; gpus: whether they have any; threads: OMP_NUM_THREADS,
    where the user has set it."""

    script: str
    words: tuple[str, ...]
    processes: int
    folder: str
    log: str
    gpus: bool
    threads: str | None


@dataclass(frozen=True)
class Reply:
    """What became of a job, or, where its processes have ended, why."""

    outcome: Outcome | None
    ended: str = ""


class StageActor:
    """A stage on processes of its own. `stop` may be called while `make` waits, on another thread."""

    def __init__(self, command: StageCommand) -> None:
        self.command = command
        os.chdir(command.folder)
        log = os.open(command.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):  # what this process says of its children belongs there, too
            os.dup2(log, stream)
        os.close(log)
        # Ray's own number is that of the cores it was told of.
        if command.threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = command.threads
        if not command.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._supervisor = Supervisor()
        self._watcher: threading.Thread | None = None
        self._status = 0
        self._from = 0  # where the log of the processes that run begins
        self._asked: Any = None
        self._answers: Any = None

    def start(self) -> str:
        """Start the processes unless they run, which imports what they need; the host and process id of the actor."""
        if self._watcher is None or not self._watcher.is_alive():
            self._start()
        return f"{socket.gethostname()}, process {os.getpid()}"

    def _start(self) -> None:
        for pipe in (self._asked, self._answers):
            if pipe is not None:
                pipe.close()
        asked, to_ask = os.pipe()
        to_hear, answers = os.pipe()
        self._asked, self._answers = os.fdopen(to_ask, "wb", buffering=0), os.fdopen(to_hear, "rb")
        self._from = Path(self.command.log).stat().st_size
        words = [sys.executable, self.command.script, *self.command.words]
        name = Path(self.command.script).name
        try:
            group = self._supervisor.start(
                words, self.command.processes, name=name, began=time.monotonic(), pipes=(asked, answers)
            )
        finally:
            os.close(asked)
            os.close(answers)

        def watch() -> None:
            self._status = self._supervisor.finish(group)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()

    def make(self, line: str) -> Reply:
        """Have the processes make a job, a line of a .jsonl file."""
        if self._supervisor.received:
            return Reply(None, f"was told to stop by signal {self._supervisor.received}")
        try:
            self.start()
            self._asked.write(f"{line}\n".encode())
        except InputError as error:
            return Reply(None, str(error))
        except BrokenPipeError:
            return Reply(None, self._ended())
        answer = self._answers.readline()
        return Reply(read_outcome(answer.decode())) if answer.endswith(b"\n") else Reply(None, self._ended())

    def _ended(self) -> str:
        """Why there is no answer: the status of the processes, and the last line that they wrote."""
        assert self._watcher is not None
        self._watcher.join()
        status = self._status
        how = f"was ended by signal {status - SIGNALLED}" if status > SIGNALLED else f"ended with status {status}"
        with Path(self.command.log).open("rb") as log:
            log.seek(max(self._from, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{how}: {one_line(last)}"

    def stop(self, signum: int) -> None:
        """Have the processes save their state and leave; a second time, leave at once."""
        self._supervisor.pass_on(signum)
