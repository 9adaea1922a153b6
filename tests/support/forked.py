"""Stages as processes of their own that start at once: forked from one that has imported everything.

A stage that starts from nothing imports for seconds, and does its work on the tiny checkpoint in less than one. Signals,
locks, killing and the exit status are the real thing; what a script prints goes to a file.
"""

import ctypes
import functools
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from conftest import ROOT

SCRIPTS = {1: "stage1_text_encoder", 2: "stage2_transformer", 3: "stage3_vae_decoder"}
END = 120.0  # seconds that any of these runs may take

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["warm"])


@dataclass(frozen=True)
class Moment:
    """When a stage gets signals: in the call number `call` of a function that it uses, which otherwise does its work."""

    function: str  # module.name
    call: int
    signals: tuple[int, ...]
    pause: float = 0.0  # seconds to stay in that call after the signals
    fails: bool = False  # then raise ZeroDivisionError

    def arrange(self) -> None:
        """Have this process send itself the signals."""
        module, _, name = self.function.rpartition(".")
        owner = import_module(module)
        function, calls = getattr(owner, name), itertools.count(1)

        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(calls) == self.call:
                for number in self.signals:
                    os.kill(os.getpid(), number)
                time.sleep(self.pause)
                if self.fails:
                    raise ZeroDivisionError("ours")
            return function(*args, **options)

        setattr(owner, name, wrapped)


@functools.cache
def _warm() -> None:
    """Start the process that stages are forked from; it finds our modules only through PYTHONPATH."""
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "support")))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if former is not None:
            os.environ["PYTHONPATH"] = former


CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


@dataclass(frozen=True)
class SmallDisk:
    """A folder that holds `size` bytes at most, for one process.

    A tmpfs that only this process sees. Where the machine allows no mounting: the kernel's limit on the size of a file.
    filled: it is full already.
    """

    folder: Path
    size: int
    filled: bool = False

    def mount(self) -> None:
        """Put it in its place, for this process and what it starts."""
        libc = ctypes.CDLL(None)
        user, group = os.getuid(), os.getgid()
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            if libc.mount(b"tmpfs", bytes(self.folder), b"tmpfs", 0, f"size={self.size}".encode()) == 0:
                if self.filled:
                    (self.folder / "filler").write_bytes(bytes(self.size))
                return
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def heed_interrupts() -> None:
    """Tests that were started in the background inherit that SIGINT is ignored, and bash could not trap it then."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


CAPABILITIES_VERSION = 0x20080522  # of linux/capability.h, the third


def _obey_permissions() -> None:
    """Have even root's process be denied what the rights of files deny: without any capability."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


def _child(
    stage: int,
    argv: list[str],
    said: str,
    environment: dict[str, str],
    moment: Moment | None,
    disk: SmallDisk | None,
    denied: bool,
) -> None:
    assert "warm" in sys.modules, "nothing was imported beforehand"
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    if moment:
        moment.arrange()
    if disk:
        disk.mount()
    if denied:
        _obey_permissions()
    status = import_module(SCRIPTS[stage]).main(argv)
    if disk:
        print("left:", sorted(path.name for path in disk.folder.iterdir()), flush=True)
    sys.exit(status)


class Forked:
    """One run of a stage. said(): what it has printed so far."""

    def __init__(
        self,
        stage: int,
        *args: object,
        said: Path,
        moment: Moment | None = None,
        disk: SmallDisk | None = None,
        denied: bool = False,
        **environment: str,
    ) -> None:
        self.file, self.store = said, None
        _warm()
        self.file.unlink(missing_ok=True)
        self.process: BaseProcess = _context.Process(
            target=_child, args=(stage, [str(arg) for arg in args], str(said), environment, moment, disk, denied)
        )
        self.process.daemon = True  # ended with the tests, should one of them fail
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def said(self) -> str:
        return self.file.read_text() if self.file.exists() else ""

    def status(self) -> int:
        """Wait for the end. As a shell gives it: 128 and the number for a process that a signal ended."""
        self.process.join(END)
        code = self.process.exitcode
        assert code is not None, f"still running after {END} s: {self.said()}"
        return code if code >= 0 else 128 - code


def run_stage(
    stage: int,
    *args: object,
    said: Path,
    moment: Moment | None = None,
    disk: SmallDisk | None = None,
    denied: bool = False,
) -> tuple[int, str]:
    """(status, what it printed) of a stage. denied: root's, too, may only do what the rights of files allow."""
    forked = Forked(stage, *args, said=said, moment=moment, disk=disk, denied=denied)
    return forked.status(), forked.said()


def run_ranks(
    stage: int,
    size: int,
    *args: object,
    said: Path,
    moments: Mapping[int, Moment] | None = None,
    more: Mapping[int, list[object]] | None = None,
    **environment: str,
) -> list[Forked]:
    """A stage on several processes, as torchrun would start them, but that nobody looks after.

    moments, and more arguments, by rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Forked(
            stage,
            *args,
            *(more or {}).get(rank, []),
            said=said.with_suffix(f".{rank}"),
            moment=(moments or {}).get(rank),
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            **environment,
        )
        for rank in range(size)
    ]
    for rank in ranks:
        rank.store = store  # it must live as long as they do
    return ranks
