"""What a run needs of the environment that it was started in."""

import gc
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel.environment import rank_info

MAX_COMPILE_THREADS = 32  # as Inductor's own default
# Set by the launcher, which runs this stage as one of all three: when it began, by the machine's own clock.
WHOLE_RUN = "HUNYUAN_STAGED_WHOLE_RUN"
# Set by the launcher: the end of a pipe that a stage reads a byte from before it begins, while the one before it works.
TURN_PIPE = "HUNYUAN_STAGED_TURN_PIPE"
# Set by the launcher beside it: which of the run's stages this is, and the flags of all of them, as JSON.
RUN_FLAGS = "HUNYUAN_STAGED_RUN_FLAGS"
TEXTS = ("--prompt", "--negative_prompt")
# Set by an actor of a cluster: the pipe that a stage reads jobs from, and the one that it says in what became of each.
JOB_PIPES = "HUNYUAN_STAGED_JOB_PIPES"


def started_by_launcher() -> float | None:
    """When the whole run began that this stage is one of, as time.monotonic() counts; None for a stage by itself."""
    started = os.environ.get(WHOLE_RUN)
    return None if started is None else float(started)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def library_settings(share: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment is to tell torch, beside what it does; share: of the cores that a process has."""
    settings = {"TORCHINDUCTOR_COMPILE_THREADS": str(min(share, MAX_COMPILE_THREADS))}
    # Texts of two lengths make allocations of two sizes, which otherwise splits the memory into pieces that fit neither.
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {name: value for name, value in settings.items() if name not in environment}


def set_library_settings() -> None:
    """Give torch, before it is imported, the settings that the launcher gives it, whoever started this process."""
    info = rank_info()
    os.environ.update(library_settings(max(1, cores() // (info.local_size or info.size)), os.environ))


def process_age() -> float | None:
    """Seconds since this process was started, to a hundredth; None where the system does not say."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 3)
    except (OSError, AttributeError):
        return None


def imports_begin() -> None:
    """Leave out collections of garbage while modules are imported: torch's objects are many, and all stay."""
    gc.disable()


def imports_end() -> None:
    """Collect garbage again, among what is made from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def job_pipes() -> tuple[int, int] | None:
    """The pipes of a stage that is handed its jobs one by one, which its first process alone has; None for any other."""
    given = os.environ.get(JOB_PIPES)
    if given is None:
        return None
    read, write = map(int, given.split(","))
    return read, write


def told_flags(index: int, flags: Sequence[Sequence[str]]) -> str:
    """What run_flags reads, without texts: a stage that waits needs none, and an environment holds no long ones."""
    return json.dumps([index, [[word for word in words if word.partition("=")[0] not in TEXTS] for words in flags]])


def run_flags() -> tuple[int, list[list[str]]] | None:
    """(which stage of a whole run this is, counted from 0, the flags of all); None where the launcher did not say so."""
    given = os.environ.get(RUN_FLAGS)
    if not given:
        return None
    index, flags = json.loads(given)
    return index, flags


@dataclass(frozen=True)
class Early:
    """What a stage did before its turn: what it keeps of that, and in a phrase what else it could not or did not do."""

    kept: Any = None
    told: str | None = None


NOTHING_EARLY = Early()
IsDue = Callable[[], bool]


def await_turn(ready: Callable[[IsDue], Early] | None, ages: dict[str, float | None] | None = None) -> Early | None:
    """Get ready and wait for the launcher's word, where it started this stage early; None: it has ended.

    ready(is_due): is_due() says whether the turn has come meanwhile. ages: gets the process's age once it is ready.
    """
    given = os.environ.pop(TURN_PIPE, None)
    if given is None:
        return NOTHING_EARLY
    pipe = int(given)

    def is_due() -> bool:
        return bool(select.select([pipe], [], [], 0)[0])

    early = NOTHING_EARLY if ready is None else ready(is_due)
    if ages is not None:
        ages["ready"] = process_age()
    try:
        return early if os.read(pipe, 1) else None
    finally:
        os.close(pipe)


def check_environment() -> None:
    """InputError names a variable, or a working folder, that would end the run in a library's traceback, or unheard."""
    rank_info()
    threads = os.environ.get("OMP_NUM_THREADS")
    # A list has a number for each level of nesting.
    if threads is not None and not re.fullmatch(r"\s*0*[1-9][0-9]{0,5}\s*(,\s*0*[1-9][0-9]{0,5}\s*)*", threads):
        raise InputError(f"OMP_NUM_THREADS is {threads!r} in the environment, which is not a positive number")
    if sys.flags.optimize >= 2:
        raise InputError("PYTHONOPTIMIZE=2 and -OO remove the docstrings, which transformers needs; allowed: 0 or 1")
    check_working_folder()


def check_working_folder() -> None:
    """InputError where the working folder was removed, or has a name that no JSON file can hold."""
    try:
        folder = str(Path.cwd())
    except OSError as error:
        raise InputError(f"the working folder cannot be used: {error.strerror}; change to another") from error
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise InputError(f"the working folder {folder!a} is not UTF-8 text; change to another") from None
