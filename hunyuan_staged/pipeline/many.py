"""Many jobs by one stage: which is next, whose folder, what became of it. A job that fails does not end the others.

The processes are split into groups; each makes one job after the other, drawn from one list.
"""

import contextlib
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hunyuan_staged.errors import InputError, Stopped, one_line
from hunyuan_staged.files import contract
from hunyuan_staged.files.atomic import Locked
from hunyuan_staged.jobs.outcomes import (
    BUSY,
    DONE,
    FAILED,
    Outcome,
    closing_lines,
    read_outcome,
    status_of,
    text_of_outcome,
)
from hunyuan_staged.jobs.reading import Job, Jobs, at, options_of_job, read_line, text_of
from hunyuan_staged.parallel.world import PeerFailed, World, split_world
from hunyuan_staged.pipeline import job_folders

POLL_SECONDS = 1.0  # between two looks at a folder that is watched

Body = Callable[[Any, Any], None]  # of a run and a job's options; it leaves in run.outcome what became of it


class JobRun(Protocol):
    """What the loop needs of a script's run."""

    world: World
    status: int
    outcome: str

    def info(self, text: str) -> None:
        """A line for the log."""

    def warn(self, text: str) -> None:
        """A warning for the log."""

    def show_plan(self, rows: Mapping[str, object], title: str = "") -> None:
        """Print a plan."""

    def group(self, world: World, index: int, count: int) -> None:
        """Be one of a group of processes from here on."""

    def job(self, name: str, world: World) -> AbstractContextManager[None]:
        """Within it the run is that of one job."""

    def drop(self) -> None:
        """Let go of what is kept loaded between jobs."""


@dataclass(frozen=True)
class Stage:
    """A stage as the loop sees it. body: makes one video's part; size: of the groups, by run, options and each job's."""

    number: int
    body: Body
    size: Callable[[Any, Any, Sequence[Any]], int]


def run_all(run: JobRun, stage: Stage, options: Any, jobs: Jobs) -> None:
    """Make all jobs, and say at the end what became of each. InputError for a size of groups that the run cannot have."""
    whole = run.world
    if options.dry_run:
        _show_plan(run, options, jobs)
        return
    for line in jobs.bad:
        run.warn(f"left out: {line}")
    todo = job_folders.ordered(jobs.good, options, stage.number)
    group = _split(run, stage, options, todo)
    own = [
        _make(run, group.part(f"job {index}"), stage, _task(stage, options, job, group.is_main))
        for index, job in _drawn(todo, whole, group)
    ]
    run.world = whole
    said = whole.all_gather_text("outcomes", "\n".join(text_of_outcome(one) for one in own if group.is_main))
    outcomes = [read_outcome(line) for text in said for line in text.splitlines()]
    for warns, line in closing_lines(jobs, outcomes):
        (run.warn if warns else run.info)(line)
    run.status = status_of(jobs, outcomes)


def _show_plan(run: JobRun, options: Any, jobs: Jobs) -> None:
    """Print one plan of all jobs."""
    from hunyuan_staged.pipeline import forecast_jobs

    if run.world.is_main:
        forecast_jobs.show(run, [options], jobs, World(0, run.world.size, run.world.device))
    run.status = int(run.world.from_main("planned", str(run.status)))


def watch(run: JobRun, stage: Stage, options: Any) -> None:
    """Make each job of a folder whose input is there and whose output is not, until a signal."""
    whole, folder = run.world, Path(options.watch)
    group = _split(run, stage, options, ())
    first = whole.rank // group.size
    seen: dict[str, int] = {}
    count = 0
    run.info(f"watching {folder}; SIGTERM ends that")
    while True:
        name = group.from_main("job", _next_ready(stage, options, folder, seen, first) if group.is_main else "")
        outcome = _make(run, group.part(f"job {count}"), stage, _task_of_folder(stage, options, folder / name))
        count += 1
        run.world = group
        if outcome.status != BUSY:
            run.info(outcome.line)
        elif group.is_main:
            del seen[name]  # another worker may have it, and may yet be killed
            time.sleep(POLL_SECONDS)


def serve(run: JobRun, stage: Stage, options: Any, pipes: tuple[int, int]) -> None:
    """Make each job that another process hands over, a line each, and answer with its outcome; until it ends that.

    pipes: to read from and to write to, see environment.job_pipes. All processes make each job together.
    """
    group = split_world(run.world, run.world.size)
    run.group(group, 0, 1)
    with contextlib.ExitStack() as stack:
        if group.is_main:
            asked = stack.enter_context(os.fdopen(pipes[0], "rb"))
            answers = stack.enter_context(os.fdopen(pipes[1], "w", encoding="utf-8", buffering=1))
        for count in itertools.count():
            line = group.from_main("job", asked.readline().decode() if group.is_main else "")
            if not line:
                break
            job = read_line("a job", line.encode())
            outcome = _make(run, group.part(f"job {count}"), stage, _task(stage, options, job, group.is_main))
            run.world = group
            if group.is_main:
                answers.write(f"{text_of_outcome(outcome)}\n")


def _next_ready(stage: Stage, options: Any, folder: Path, seen: dict[str, int], first: int) -> str:
    """The next job of a folder, as soon as there is one; seen: when the input of each that was taken was written."""
    while True:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        first %= len(names) or 1  # so that groups which look at the same moment do not all take the same
        for name in names[first:] + names[:first]:
            written = job_folders.ready(stage.number, folder / name, options)
            if written is not None and seen.get(name) != written:
                seen[name] = written
                return name
        time.sleep(POLL_SECONDS)


def _split(run: JobRun, stage: Stage, options: Any, jobs: Sequence[Job]) -> World:
    """The group of this process."""
    whole = run.world
    own = [job_folders.placed(options_of_job(options, job), job, stage.number) for job in jobs]
    asked = getattr(options, "gpus_per_job", None)
    size = stage.size(run, options, own) if whole.size > 1 else asked or 1
    if whole.size % size:
        raise InputError(f"{size} does not divide the run's {whole.size} processes", option="gpus_per_job")
    group = split_world(whole, size)
    count = whole.size // size
    run.group(group, whole.rank // size, count)
    if whole.size > 1:
        how = "as asked for" if asked else "the most videos an hour"
        run.info(f"{count} group{'s' * (count > 1)} of {size} of the {whole.size} processes: {how}")
    return group


def _drawn(jobs: Sequence[Job], whole: World, group: World) -> Iterator[tuple[int, Job]]:
    """The jobs of this group, each drawn from what no group has drawn yet."""
    drawn = 0
    while True:
        index = drawn
        if whole.store is not None:
            word = str(whole.store.add("drawn", 1) - 1) if group.is_main else ""
            index = int(group.from_main("drawn", word))
        drawn += 1
        if index >= len(jobs):
            return
        yield index, jobs[index]


@dataclass(frozen=True)
class Task:
    """A job for a stage: its name, the folder that it is written to, and what gives its options, or raises InputError."""

    name: str
    folder: Path
    options: Callable[[], Any]


def _task(stage: Stage, options: Any, job: Job, is_main: bool) -> Task:
    """A job of a list. The first process of a group also says in its folder what is asked for."""
    own = job_folders.placed(options_of_job(options, job), job, stage.number)
    folder = job_folders.written_to(own, stage.number)

    def prepared() -> Any:
        if is_main and stage.number == 1:
            job_folders.write_json(folder / contract.JOB_FILE, text_of(job))
        return own

    return Task(job.name, folder, prepared)


def _task_of_folder(stage: Stage, options: Any, folder: Path) -> Task:
    """The job of a folder that is watched."""

    def read() -> Any:
        job = job_folders.read_job(folder)
        own = options_of_job(options, job)
        try:
            own.check()
        except InputError as error:
            raise InputError(at(job.place, error)) from error
        return job_folders.placed_in(own, folder, stage.number)

    return Task(folder.name, folder, read)


def _make(run: JobRun, world: World, stage: Stage, task: Task) -> Outcome:
    """Make one job, and record what became of it; every process of a group calls it, and all agree."""
    started, name = time.perf_counter(), task.name
    status, text = DONE, ""
    assert world.within is not None
    with run.job(name, world):
        try:
            options = task.options()
            job_folders.check_earlier(options, stage.number)
            stage.body(run, options)
            status = run.outcome
            world.barrier("job done")  # where another process alone failed, that ends the wait
        except Stopped as stopped:  # on all processes alike
            status = str(stopped)
        except (InputError, PeerFailed) as error:
            if world.within.error_reported():
                raise
            world.report_error()
            status = BUSY if isinstance(error, Locked) else FAILED
            text = one_line(error) if isinstance(error, InputError) else ""
        except Exception as error:
            # Ours, or memory that ran out. Alone, this process can go on with the next; others may hang in an exchange.
            status, text = FAILED, f"{type(error).__name__}: {one_line(error)}"
            if world.is_main:
                job_folders.record(task.folder, stage.number, text)
            if world.size > 1:
                raise
            traceback.print_exception(error)
            run.drop()
    said = world.within.all_gather_text("end of a job", json.dumps([status, text]))
    words = [json.loads(word) for word in said]
    status, text = next((word for word in words if word[1]), words[0])
    if world.is_main and status != BUSY:
        job_folders.record(task.folder, stage.number, text, done=status == DONE)
    return Outcome(name, status, text, time.perf_counter() - started)
