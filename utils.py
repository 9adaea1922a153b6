"""What the three scripts share: logging, the start and stop of a run, its timed parts, the closing report."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from hunyuan_staged.errors import Stopped, one_line, open_standard_streams, refusal_of, write_stdout
from hunyuan_staged.files.event_log import NO_LOG, EventLog
from hunyuan_staged.jobs.outcomes import DONE
from hunyuan_staged.jobs.reading import Jobs, asks_for_many, jobs_of
from hunyuan_staged.parallel.environment import rank_info
from hunyuan_staged.runtime.environment import (
    Early,
    IsDue,
    await_turn,
    check_environment,
    imports_begin,
    imports_end,
    job_pipes,
    process_age,
    set_library_settings,
    started_by_launcher,
)
from hunyuan_staged.runtime.failure import is_first, leave, status_of_error
from hunyuan_staged.runtime.gpus import begin_context
from hunyuan_staged.runtime.progress import LineBar, Reporter
from hunyuan_staged.runtime.signals import Interrupts, hold_back, ignore_signals

if TYPE_CHECKING:
    from hunyuan_staged.parallel.world import World

MIB_PER_KIB = 1 / 1024
Kept = TypeVar("Kept")
Ready = Callable[[Any, IsDue], Early]


class Run(Reporter):
    """A stage under way: its processes and device, a logger, progress bars, timed parts, and what it wrote.

    events: where --log_json wants what is said here, too. kept: what is loaded already, see keep. As a context it ends the
    bars and lets go of the folders that were claimed.
    """

    def __init__(self, name: str, world: World, interrupts: Interrupts, events: EventLog, kept: object = None) -> None:
        from loguru import logger

        self.name, self.world, self.device, self.log = name, world, world.device, logger
        self.events = events
        self.interrupts = interrupts
        self.seconds: dict[str, float] = {}
        self.written: list[str] = []
        self.planned = False
        self.status = 0  # of the script, where nothing ends it before
        self.many = False  # jobs: those that are done are left out, and their states are gone on from
        self.outcome = DONE  # what became of the job
        self._job, self._told = "", set[str]()
        self._kept: Any = kept
        self.started = time.perf_counter()
        self._last: list[str] = []
        self._video: tuple[Path, str] | None = None
        self._bars: list[Any] = []
        self._claims = contextlib.ExitStack()
        # What users gave may be in a message: it stays one line, and does nothing to a terminal.
        logger.configure(patcher=_tidy)
        self._log_to_stderr("")

    def _log_to_stderr(self, prefix: str) -> None:
        """Have the first process write the log, through tqdm, so that a line does not tear a bar apart."""
        self.log.remove()
        if self.world.is_main:
            form = f"{{time:YYYY-MM-DD HH:mm:ss}} {{level: <7}} {prefix}{{message}}"
            self.log.add(_write_line, format=form, level="INFO", backtrace=False)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.interrupts.ignore()  # a signal within the next lines would leave the lock behind
        for bar in self._bars:
            bar.close()
        self._claims.close()
        self.interrupts.cleanups.clear()

    def group(self, world: World, index: int, count: int) -> None:
        """Be one of `count` groups of processes, whose first processes write the log each."""
        self.many, self.world = True, world
        if count > 1:
            self._log_to_stderr(f"[{index + 1} of {count}] ")

    @contextlib.contextmanager
    def job(self, name: str, world: World) -> Iterator[None]:
        """Within it the run is that of one of many jobs: its world, its locks, its bars, the files that it writes."""
        former, claims, cleanups = self.world, self._claims, len(self.interrupts.cleanups)
        self.world, self._job, self._claims, self.outcome = world, name, contextlib.ExitStack(), DONE
        self.info(f"job {name}")
        try:
            yield
        finally:
            # Nothing is to interrupt the release; what arrives meanwhile is answered behind it.
            with contextlib.nullcontext() if self.interrupts.received else self.interrupts.deferred():
                for bar in self._bars:
                    bar.close()
                self._claims.close()
                del self.interrupts.cleanups[cleanups:]
                self._tell_written()
                self._bars.clear()
                self._last.clear()
                self.world, self._job, self._claims, self._video = former, "", claims, None

    def agree(self, found: bool) -> bool:
        """What the first process of those that make a job has found, on every one of them."""
        return bool(self.world.from_main("agreed", "yes" if found else ""))

    def keep(self, make: Callable[[], Kept]) -> Kept:
        """What the stage keeps loaded from one job to the next; made where there is none."""
        if self._kept is None:
            self._kept = make()
        return self._kept

    def drop(self) -> None:
        """Let go of what is kept."""
        self._kept = None

    def lock(self, path: str | Path, files: Sequence[str]) -> None:
        """Be the only run that writes these files beside the lock at `path`, until this run ends; see atomic.locked."""
        from hunyuan_staged.files import atomic

        if self.world.is_main:
            made = self._claims.enter_context(atomic.locked(path, files))
            self.interrupts.cleanups.append(partial(atomic.unlock, path, files, made))

    def lock_all(self, locks: Iterable[tuple[Path, Sequence[str]]]) -> None:
        """Lock each (path, files)."""
        for path, files in locks:
            self.lock(path, files)

    def info(self, text: str) -> None:
        self.log.info(text)
        self.events.write("info", text=one_line(text))

    def warn(self, text: str) -> None:
        if self.many and text in self._told:
            return  # each of the jobs would say it
        self._told.add(text)
        self.log.warning(text)
        self.events.write("warning", text=one_line(text))

    def progress(self, iterable: Iterable[Any], **options: Any) -> Iterable[Any]:
        """A tqdm bar with the time left, on the first process alone; without a terminal a line every 10 %."""
        from tqdm import tqdm

        total = options.get("total", len(iterable) if isinstance(iterable, Sized) else None)
        about = {"total": total, "initial": options.get("initial", 0)}
        bar: Any
        if self.world.is_main and not sys.stderr.isatty():
            bar = LineBar(iterable, say=self.log.info, **options)
        else:
            bar = tqdm(iterable, disable=not self.world.is_main, dynamic_ncols=True, **options)
        self._bars.append(bar)
        return self.events.timed(options.get("desc", "progress"), bar, **about)

    def set_postfix(self, text: str) -> None:
        """Show a few words behind the newest bar, from its next redrawing on."""
        self._bars[-1].set_postfix_str(text, refresh=False)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a part of the stage (load, compute, write); parts of one name add up."""
        self.interrupts.check()
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.events.write("part", what=name, seconds=round(seconds, 3))

    def show_plan(self, rows: Mapping[str, object], title: str = "") -> None:
        """Print what --dry_run is asked for, a line for each row, on the first process; there is no closing report."""
        self.record_plan(rows, title)
        if self.world.is_main:
            width = max(map(len, rows))
            lines = [f"{name:{width}}  {one_line(value)}\n" for name, value in rows.items()]
            heading = f"{'' if not self.planned else chr(10)}{title}\n" if title else ""
            write_stdout(heading + "".join(lines))
        self.planned = True

    def record_plan(self, rows: Mapping[str, object], title: str = "") -> None:
        """Add a plan to the events alone. title: what it is of, within a whole run."""
        about = {"of": title} if title else {}
        self.events.write("plan", **about, **{name.replace(" ", "_"): one_line(value) for name, value in rows.items()})

    def add_output(self, path: str | Path, what: str) -> None:
        """Note a file for the closing report."""
        self.written.append(f"{path}: {what}")
        self.events.write("output", path=Path(path).absolute(), what=what)

    def next_stage(self, stage: int, flags: Sequence[str]) -> None:
        """Have the last line name the command of the stage that follows, unless the launcher runs that itself."""
        if started_by_launcher() is None:
            script = Path(__file__).absolute().with_name(f"run_stage{stage}.sh")
            near = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
            self._last.append(f"next: {shlex.join(['bash', str(near), *flags])}")

    def add_video(self, path: Path, frames: int, fps: float) -> None:
        """Have the last line name the video; run by itself, the stage also prints its path on standard output."""
        self._video = path, f"{frames / fps:.2f} s, {frames} frames"
        if self.many and self.world.is_main and started_by_launcher() is None:
            write_stdout(f"{path.absolute()}\n")

    def _tell_written(self) -> None:
        for line in self.written:
            self.log.info(f"wrote {one_line(line)}")
        self.written.clear()

    def _age(self) -> float:
        """Seconds since the stage began."""
        return round(time.perf_counter() - self.started, 3)

    def report(self) -> None:
        """The closing lines: files with their shapes, seconds by part, peak memory of device and host."""
        if self.planned:
            return
        self._tell_written()
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        # ru_maxrss is in KiB on Linux.
        peaks = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MIB_PER_KIB)}
        if self.device.type == "cuda":
            import torch

            peaks = {"device": round(torch.cuda.max_memory_allocated(self.device) / 2**20), **peaks}
        memory = ", ".join(f"{where} {peak} MiB" for where, peak in peaks.items())
        self.log.info(f"{self.name} done{f': {parts}' if parts else ''}; peak memory: {memory}")
        seconds = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
        self.events.write("done", seconds=seconds | {"all": self._age()}, peak_mib=peaks)
        for line in self._last:
            self.log.info(line)
        if self._video:
            self._report_video(*self._video)

    def _report_video(self, path: Path, length: str) -> None:
        launched = started_by_launcher()
        seconds = self._age() if launched is None else time.monotonic() - launched
        self.log.info(f"video {path.absolute()}: {length}; {seconds:.1f} s in all")
        if launched is None and self.world.is_main:
            write_stdout(f"{path.absolute()}\n")


def _tidy(record: Any) -> None:
    record["message"] = one_line(record["message"])


def _write_line(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr, end="")


def run_stage(
    name: str,
    options: Any,
    *,
    check: Callable[[Any], Any] | None = None,
    body: Callable[[Run, Any], None],
    every_rank: bool = True,
    ready: Ready | None = None,
    joined: bool = True,
) -> int:
    """Check the flags, start the processes, run body(run, checked), report; the exit status of the script.

    check(options) runs before anything heavy is imported; what it returns goes to body. every_rank=False: a stage for
    one process, in which any others that torchrun started have nothing to do. ready(options, is_due): what can be done
    early by a stage that the launcher starts before its turn. joined=False: body makes the process groups. InputError
    becomes one line and status 2, with --debug its traceback before it; SIGTERM and Ctrl-C one line and 143 or 130;
    every other exception is our fault and keeps its traceback. On several processes the first that fails says so, and
    all of them end. The events of --log_json are the first process's.
    """
    ages: dict[str, float | None] = {"exec": process_age()}
    early = await_turn(partial(ready, options) if ready else None, ages)
    if early is None:
        return 0
    ages["turn"] = process_age()
    world, events = None, NO_LOG
    with Interrupts() as interrupts:

        def end(raised: BaseException) -> int:
            error = refusal_of(raised)
            events.write("error", kind=type(error).__name__, text=one_line(error))
            if world is not None and world.size > 1:
                leave(name, error, options.debug, world, interrupts)
            return status_of_error(name, interrupts.cause_of(error), options.debug)

        interrupts.last_words = end
        try:
            interrupts.unblock()
            check_environment()
            set_library_settings()
            if not is_first() and not every_rank:
                return 0
            checked = check(options) if check else None
            if is_first():
                events = EventLog(options.log_json, name)
            from hunyuan_staged.parallel.world import PATIENCE_SECONDS, lone_world, open_world, start_world, stop_world

            world = (start_world() if joined else open_world()) if every_rank else lone_world()
            interrupts.patience = PATIENCE_SECONDS if world.size > 1 else None
            about = {"options": vars(options), "processes": world.size, "device": str(world.device)}
            about |= {"early": early.told} if early.told else {}
            events.write("start", **about, age=ages | {"start": process_age()})
            imports_end()
            with Run(name, world, interrupts, events, early.kept) as run:
                body(run, checked)
                world.barrier("end")
                run.report()
                status = run.status
            stop_world(world)
        except BaseException as raised:
            return end(raised)
    return status


def run_jobs(
    stage: int,
    options: Any,
    body: Callable[[Run, Any], None],
    size: Callable[[Run, Any, Any], int] | None = None,
    ready: Ready | None = None,
    begin: Callable[[Any], object] = bool,
) -> int:
    """Run a stage: body(run, options) for one video, or, where the options ask for many, or a cluster does, for each.

    size: how many processes make a video together, as many.Stage has it; None: a stage for one process. ready: as
    run_stage. begin(options): what goes on while torch is imported, of a run and not of a plan.
    """
    pipes = job_pipes()
    many = pipes is not None or asks_for_many(options)

    def check(options: Any) -> Jobs | None:
        options.check()
        found = jobs_of(options, [options]) if many and pipes is None and options.watch is None else None
        if not options.dry_run:
            begin_context(rank_info().local_rank)
            begin(options)
        return found

    def loop(run: Run, jobs: Jobs | None) -> None:
        if not many:
            try:
                body(run, options)
            except Stopped as stopped:
                run.info(f"{stopped}; with --resume and without --stop_after the same command goes on")
            return
        from hunyuan_staged.pipeline.many import Stage, run_all, serve, watch

        one = Stage(stage, body, size or (lambda *_: 1))
        if pipes is not None:
            serve(run, one, options, pipes)
        elif jobs is None:
            watch(run, one, options)
        else:
            run_all(run, one, options, jobs)

    return run_stage(
        f"stage {stage}",
        options,
        check=check,
        body=loop,
        every_rank=size is not None,
        ready=ready,
        joined=not many,
    )


def plan_script(argv: Sequence[str]) -> int:
    """`python utils.py GPUS STAGE1 STAGE2 [ENLARGING] STAGE3`, flags as JSON: what run_staged.sh --dry_run runs.

    A draft has two stages alone.
    """
    from hunyuan_staged.parsing import options_of_run

    processes, *flags = argv
    options = options_of_run([json.loads(words) for words in flags])
    many = options[0].jobs is not None

    def check(encode: Any) -> Jobs | None:
        return jobs_of(encode, options) if many else None

    def body(run: Run, jobs: Jobs | None) -> None:
        from hunyuan_staged.pipeline import forecast, forecast_jobs

        world = forecast.world_of(int(processes), run.world)
        if jobs:
            forecast_jobs.show(run, options, jobs, world)
            return
        for title, rows in forecast.plan_run(options, world, run).items():
            run.show_plan(rows, title)

    return run_stage("plan", options[0], check=check, body=body, every_rank=False)


def run_script(main: Callable[[], int]) -> NoReturn:
    """Be a script: main(), then the end of the process with its status.

    A signal waits until main listens to signals, and does nothing once main is done; see signals.hold_back.
    """
    open_standard_streams()
    hold_back()
    imports_begin()
    try:
        status = main()
    finally:
        ignore_signals()
    if started_by_launcher() is not None:
        _exit_at_once(status)
    sys.exit(status)


def _exit_at_once(status: int) -> NoReturn:
    """End a stage of a whole run, all of whose work is done: the next one waits, and Python's own end takes seconds."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if "multiprocessing.util" in sys.modules:  # else its tracker would speak of semaphores that tqdm left
        sys.modules["multiprocessing.util"]._exit_function()
    os._exit(status)


if __name__ == "__main__":
    run_script(lambda: plan_script(sys.argv[1:]))
