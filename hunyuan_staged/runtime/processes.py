"""One command on several processes of this machine, as torchrun would start them, without torch in the parent."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from hunyuan_staged.errors import BAD_INPUT, JOBS_FAILED, SIGNALLED, InputError, print_error
from hunyuan_staged.parallel.environment import STORE_SOCKET
from hunyuan_staged.runtime.environment import JOB_PIPES, RUN_FLAGS, TURN_PIPE, WHOLE_RUN, cores, library_settings
from hunyuan_staged.runtime.signals import SIGNALS, Interrupted

KILL_SECONDS = 30.0  # after one process has failed and the others were told to stop
# What another launcher may have left in the environment.
LEFT_OVER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STORE_SOCKET, TURN_PIPE, RUN_FLAGS, JOB_PIPES)
LEFT_OVER_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def child_environment(count: int, began: float | None = None) -> dict[str, str]:
    """What each of `count` processes is started in; what the user set stays. began: when the whole run did."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LEFT_OVER and not name.startswith(LEFT_OVER_PREFIXES)
    }
    share = max(1, cores() // count)
    defaults = library_settings(share, os.environ)
    if count > 1:
        defaults["OMP_NUM_THREADS"] = str(share)
        # The store ends with rank 0: the others' pages about that would hide the line that says why.
        defaults["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if kept.get("PYTHONOPTIMIZE", "").isdecimal() and int(kept["PYTHONOPTIMIZE"]) > 1:
        kept["PYTHONOPTIMIZE"] = "1"  # transformers needs its docstrings
    return defaults | kept | ({} if began is None else {WHOLE_RUN: repr(began)})


@dataclass
class Group:
    """The processes of one command. turn: the pipe whose bytes they wait for, one each, if they were started early."""

    name: str
    processes: list[subprocess.Popen[bytes]]
    turn: int | None = None

    def release(self) -> None:
        """Let processes that were started early begin."""
        if self.turn is not None:
            with contextlib.suppress(BrokenPipeError):  # they have ended, and their status says how
                os.write(self.turn, bytes(len(self.processes)))
            os.close(self.turn)
            self.turn = None

    def kill(self) -> None:
        """End processes whose turn does not come, and what they started: they are silent, and write nothing."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        if self.turn is not None:
            os.close(self.turn)


class Supervisor:
    """Runs commands, one after the other; inside its context SIGTERM and Ctrl-C go on to the one that runs.

    received: the first signal's number, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._running: list[subprocess.Popen[bytes]] = []
        self._groups: list[Group] = []  # started, not finished
        self._former: dict[signal.Signals, Any] = {}
        self._mask: set[int] = set()

    def __enter__(self) -> "Supervisor":
        for number in SIGNALS:
            # A shell starts what runs in the background so that Ctrl-C does not reach it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._handle)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for group in self._groups:
            group.kill()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def start(
        self,
        command: Sequence[str],
        count: int,
        *,
        name: str,
        stdout: int | None = None,
        began: float | None = None,
        early: str | None = None,
        pipes: tuple[int, int] | None = None,
    ) -> Group:
        """Start `count` processes of a command.

        Args:
            name: what the line on stderr calls the command where its processes cannot have spoken themselves.
            stdout: a file descriptor, else this process's own.
            began: when the whole run did that it is a stage of, which its environment says.
            early: it gets ready and waits for `finish`, see environment.await_turn; what it is told as run_flags.
            pipes: by which its first process gets jobs and says what became of them, see environment.job_pipes.

        InputError: it cannot be started.
        """
        environment = child_environment(count, began)
        if pipes is not None:
            environment[JOB_PIPES] = f"{pipes[0]},{pipes[1]}"
            group = Group(name, self._start(command, environment, count, stdout, of_first=pipes))
        elif early is not None:
            read, write = os.pipe()
            try:
                processes = self._start(
                    command, environment | {TURN_PIPE: str(read), RUN_FLAGS: early}, count, stdout, (read,)
                )
            except BaseException:
                os.close(write)
                raise
            finally:
                os.close(read)
            group = Group(name, processes, write)
        else:
            group = Group(name, self._start(command, environment, count, stdout))
        self._groups.append(group)
        return group

    def run(
        self, command: Sequence[str], count: int, *, name: str, stdout: int | None = None, began: float | None = None
    ) -> int:
        """`start`, then `finish`."""
        return self.finish(self.start(command, count, name=name, stdout=stdout, began=began))

    def finish(self, group: Group) -> int:
        """The status of the processes of a command: 0, or that of the first to fail, which ends the others.

        As a shell gives it: 128 and the number for a process that a signal ended.
        """
        name, count = group.name, len(group.processes)
        self._groups.remove(group)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._running, missed = group.processes, self.received
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            group.release()
            if missed:
                self._send(missed)
            rank, code = self._wait()
        except BaseException:
            self._send(signal.SIGKILL, group=True)
            raise
        if code:
            self._send(signal.SIGKILL, group=True)  # an ffmpeg that outlived its process
        self._running = []
        if code < 0 and -code == self.received:
            print_error(f"{name} {Interrupted(-code)}")
        elif code < 0 or (
            count > 1 and code not in (0, BAD_INPUT, JOBS_FAILED, *(SIGNALLED + number for number in SIGNALS))
        ):
            which = f"{name}: process {rank} of {count}" if count > 1 else name
            print_error(f"{which} ended with status {code}")
        return code if code >= 0 else SIGNALLED - code

    def _start(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        count: int,
        stdout: int | None,
        passed: Sequence[int] = (),
        of_first: Sequence[int] = (),
    ) -> list[subprocess.Popen[bytes]]:
        """Start the processes; passed: the descriptors that each gets, of_first: that only the first one gets."""
        started: list[subprocess.Popen[bytes]] = []
        end_with_parent = partial(_end_with_parent, os.getpid(), _prctl()) if sys.platform == "linux" else None
        # Blocked in the child until it has its own handlers, see Interrupts.unblock, and here until all are started.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with contextlib.ExitStack() as stack:
                listener = stack.enter_context(socket.create_server(("127.0.0.1", 0))) if count > 1 else None
                for rank in range(count):
                    own, files = dict(environment), [*passed, *(of_first if rank == 0 else ())]
                    if listener is not None:
                        own |= _rank_environment(rank, count, listener.getsockname()[1])
                    if listener is not None and rank == 0:
                        own[STORE_SOCKET] = str(listener.fileno())
                        files.append(listener.fileno())
                    started.append(
                        subprocess.Popen(
                            command,
                            env=own,
                            stdout=stdout,
                            pass_fds=files,
                            process_group=0,  # a terminal's Ctrl-C reaches it once, from here
                            preexec_fn=end_with_parent,
                        )
                    )
        except BaseException as error:
            for process in started:
                process.kill()
            if isinstance(error, OSError):
                raise InputError(f"cannot start {Path(command[0]).name}: {error.strerror}") from error
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return started

    def _wait(self) -> tuple[int, int]:
        """(rank, exit code) of the first process that failed, else (0, 0), once all have ended."""
        ended: SimpleQueue[tuple[int, int]] = SimpleQueue()
        for rank, process in enumerate(self._running):
            threading.Thread(target=lambda r, p: ended.put((r, p.wait())), args=(rank, process), daemon=True).start()
        first, left, patience = (0, 0), len(self._running), None
        while left:
            try:
                rank, code = ended.get(timeout=patience)
            except Empty:
                self._send(signal.SIGKILL)
                patience = None
                continue
            left -= 1
            if code and not first[1]:
                first, patience = (rank, code), KILL_SECONDS
                self._send(signal.SIGTERM)
        return first

    def _handle(self, signum: int, _: FrameType | None) -> None:
        self.pass_on(signum)

    def pass_on(self, signum: int) -> None:
        """Send a signal to the processes that run, or, where none does yet, to those of the next `finish`."""
        self.received = self.received or signum
        self._send(signum)

    def _send(self, signum: int, *, group: bool = False) -> None:
        """Send a signal to the processes that run, or also to what they started and left behind."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if group:
                    os.killpg(process.pid, signum)
                else:
                    process.send_signal(signum)


def _rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """torchrun's variables, for one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _prctl() -> Any:
    return ctypes.CDLL(None).prctl


def _end_with_parent(parent: int, prctl: Any) -> None:
    """In a child before its command: have the kernel send SIGTERM when the parent ends, even by kill -9."""
    prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)
