"""What the three scripts share: flags, logging, the start and stop of a run, errors in one line, the closing report."""

from __future__ import annotations

import contextlib
import difflib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hunyuan_staged.errors import BAD_INPUT, InputError, one_line
from hunyuan_staged.options import DEFAULT_OUTPUT_DIR
from hunyuan_staged.parsing import SILENCE_SECONDS, is_first, parse, refuse, say_error
from hunyuan_staged.runtime.progress import Reporter
from hunyuan_staged.runtime.signals import SIGNALLED, SIGNALS, Interrupted, Interrupts

if TYPE_CHECKING:
    from hunyuan_staged.parallel.world import World

FAULT = 1  # what Python itself ends with after a traceback
MIB_PER_KIB = 1 / 1024


class Run(Reporter):
    """A stage under way: its processes and device, a logger, progress bars, timed parts, and what it wrote.

    As a context it ends the bars and lets go of the folders that were claimed.
    """

    def __init__(self, name: str, world: World, interrupts: Interrupts) -> None:
        from loguru import logger

        self.name, self.world, self.device, self.log = name, world, world.device, logger
        self.interrupts = interrupts
        self.seconds: dict[str, float] = {}
        self.written: list[str] = []
        self.planned = False
        self._bars: list[Any] = []
        self._claims = contextlib.ExitStack()
        logger.remove()
        # What users gave may be in a message: it stays one line, and does nothing to a terminal.
        logger.configure(patcher=_tidy)
        if world.is_main:
            # Through tqdm, so that a line does not tear a bar apart.
            logger.add(_write_line, format="{time:HH:mm:ss} {level: <7} {message}", level="INFO", backtrace=False)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars:
            bar.close()
        self._claims.close()

    def lock(self, path: str | Path, files: Sequence[str]) -> None:
        """Be the only run that writes these files beside the lock at `path`, until this run ends; see atomic.locked."""
        from hunyuan_staged.files import atomic

        if self.world.is_main:
            self._claims.enter_context(atomic.locked(path, files))

    def lock_all(self, locks: Iterable[tuple[Path, Sequence[str]]], *, unless: bool) -> None:
        """Lock each (path, files), but not for a run that writes nothing."""
        for path, files in () if unless else locks:
            self.lock(path, files)

    def info(self, text: str) -> None:
        self.log.info(text)

    def warn(self, text: str) -> None:
        self.log.warning(text)

    def warn_or_refuse(self, reason: str | None, *, strict: bool) -> None:
        """Warn of files that do not belong together; with --strict, InputError."""
        if reason and strict:
            raise InputError(f"{reason}; --strict refuses that")
        if reason:
            self.log.warning(reason)

    def progress(self, iterable: Iterable[Any], **options: Any) -> Iterable[Any]:
        """A tqdm bar with the time left, on the first process alone."""
        from tqdm import tqdm

        bar = tqdm(iterable, disable=not self.world.is_main, dynamic_ncols=True, **options)
        self._bars.append(bar)
        return bar

    def set_postfix(self, text: str) -> None:
        """Show a few words behind the newest bar, from its next redrawing on."""
        self._bars[-1].set_postfix_str(text, refresh=False)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a part of the stage (load, compute, write); parts of one name add up."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def show_plan(self, rows: Mapping[str, object]) -> None:
        """Print what --dry_run is asked for, a line for each row, on the first process; there is no closing report."""
        self.planned = True
        if self.world.is_main:
            width = max(map(len, rows))
            for name, value in rows.items():
                print(f"{name:{width}}  {one_line(value)}", flush=True)

    def add_output(self, path: str | Path, what: str) -> None:
        """Note a file for the closing report."""
        self.written.append(f"{path}: {what}")

    def report(self) -> None:
        """The closing lines: files with their shapes, seconds by part, peak memory of device and host."""
        if self.planned:
            return
        for line in self.written:
            self.log.info(f"wrote {one_line(line)}")
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        # ru_maxrss is in KiB on Linux.
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MIB_PER_KIB
        memory = f"host {host:.0f} MiB"
        if self.device.type == "cuda":
            import torch

            memory = f"device {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MiB, {memory}"
        self.log.info(f"{self.name} done: {parts}; peak memory: {memory}")


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
) -> int:
    """Check the flags, start the processes, run body(run, checked), report; the exit status of the script.

    check(options) runs before anything heavy is imported; what it returns goes to body. every_rank=False: a stage for one
    process, in which any others that torchrun started have nothing to do. InputError becomes one line and status 2, with
    --debug its traceback before it; SIGTERM and Ctrl-C one line and 143 or 130; every other exception is our fault and
    keeps its traceback. On several processes the first that fails says so, and all of them end.
    """
    if not is_first() and not every_rank:
        return 0
    world = None
    with Interrupts() as interrupts:
        try:
            checked = check(options) if check else None
            from hunyuan_staged.parallel.world import PATIENCE_SECONDS, lone_world, start_world, stop_world

            world = start_world() if every_rank else lone_world()
            interrupts.patience = PATIENCE_SECONDS if world.size > 1 else None
            with Run(name, world, interrupts) as run:
                body(run, checked)
                world.barrier("end")
                run.report()
            stop_world(world)
        except BaseException as error:
            if world is not None and world.size > 1:
                _leave(name, error, options.debug, world, interrupts)
            return _status(name, error, options.debug)
    return 0


def _status(name: str, error: BaseException, debug: bool) -> int:
    """Say in one line why a stage ends, on the first process, and return its status; a fault of ours is raised again."""
    if isinstance(error, InputError):
        if debug:
            traceback.print_exception(error)
        # The others fail the same check; one of them speaks.
        say_error(f"error: {one_line(error)}")
        return BAD_INPUT
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(signal.SIGINT)
    if isinstance(error, Interrupted):
        if is_first():
            print(f"error: {name} {one_line(error)}", file=sys.stderr, flush=True)
        return error.status
    raise error


def _leave(name: str, error: BaseException, debug: bool, world: World, interrupts: Interrupts) -> NoReturn:
    """End this process of several. Of all that fail, the first one speaks, the others are silent and give it the time.

    Without the interpreter's own end: taking down the process group waits for processes that are gone.
    """
    interrupts.ignore()
    if isinstance(error, Interrupted):
        # All have been told to stop, or have agreed to; but torchrun also ends the others so when one has failed.
        speaks, status = world.is_main and not world.error_reported(), error.status
    else:
        speaks, status = _is_the_cause(error, world, interrupts), BAD_INPUT if isinstance(error, InputError) else FAULT
    if speaks and (status == FAULT or (debug and status == BAD_INPUT)):
        traceback.print_exception(error)
    if speaks and status != FAULT:
        line = f"{name} {one_line(error)}" if isinstance(error, Interrupted) else one_line(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
    if speaks:
        world.report_error()
    else:
        _wait_until(world.error_reported)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_the_cause(error: BaseException, world: World, interrupts: Interrupts) -> bool:
    """Whether this process's error is the one to show: its own, and the first of the run.

    An exchange that failed is most often the consequence of another process's error or death. That process, or torchrun,
    then says so; if nobody does, the failed exchange is all that there is to show.
    """
    if _failed_exchange(error) and _wait_until(lambda: bool(interrupts.received) or world.error_reported()):
        return False
    return world.claims_report()


def _failed_exchange(error: BaseException) -> bool:
    """Whether an exception comes from torch.distributed: by its class, or, with gloo, by where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename if frames else ""
    return type(error).__name__.startswith(("Dist", "PeerFailed")) or "/torch/distributed/" in last


def _wait_until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, SILENCE_SECONDS at most; whether it came true."""
    deadline = time.monotonic() + SILENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# -- the launchers: checks before anything is started or installed, and which flag belongs to which stage --

STAGES = ("stage1_text_encoder", "stage2_transformer", "stage3_vae_decoder")
# Within a whole run the folder of every stage is the first one's --output_dir.
INPUT_DIR, OUTPUT_DIR, DRY_RUN = "--input_dir", "--output_dir", "--dry_run"

SPLIT_HELP = """\
usage: run_staged.sh [--gpus N] [flags of any stage]

Runs the three stages one after the other, and hands each the flags that are its own:
  python stage1_text_encoder.py --help    prompt, model, resolution, output_dir
  python stage2_transformer.py --help     video length, steps, seed, attention
  python stage3_vae_decoder.py --help     mp4, tiles

  --gpus N   processes, one a GPU (default: $GPUS, else all visible GPUs up to 8, else one process on the CPU)

example:
  bash run_staged.sh --prompt 'a red circle moves left' --seed 7 --fps 24
"""


def split_flags(argv: Sequence[str]) -> list[list[str]]:
    """Each stage's argument list from those of a whole run; InputError names a flag that no stage has.

    A flag goes to every stage that has it. Each list is parsed and checked here, so that a bad flag of stage 3 is
    refused before stage 1 starts.
    """
    parsers = [import_module(stage).build_parser() for stage in STAGES]
    flags = [{flag: action for action in parser._actions for flag in action.option_strings} for parser in parsers]
    lists: list[list[str]] = [[], [], []]
    folder = DEFAULT_OUTPUT_DIR
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag == INPUT_DIR:
            raise InputError(f"{INPUT_DIR} is for a single stage; a whole run has one folder: use {OUTPUT_DIR}")
        if flag == DRY_RUN:
            raise InputError(f"{DRY_RUN} is for a single stage: each plans from what the one before it has written")
        owners = [index for index in range(len(flags)) if flag in flags[index]]
        if not flag.startswith("--") or not owners:
            known = sorted({name for own in flags for name in own if name.startswith("--")} - {INPUT_DIR, DRY_RUN})
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see run_staged.sh --help"
            raise InputError(f"{flag} is a flag of no stage{hint}")
        words = [word]
        if not equals and flags[owners[0]][flag].nargs != 0:
            if not rest:
                raise InputError(f"{flag} needs a value")
            value = rest.pop(0)
            words = [f"{flag}={value}"]
        if flag == OUTPUT_DIR:
            folder, owners = value, owners[:1]
        for index in owners:
            lists[index] += words
    for index in (1, 2):
        lists[index].append(f"{INPUT_DIR}={folder}")
    for stage, words in zip(STAGES, lists, strict=True):
        check_flags(stage, words)
    return lists


def check_flags(stage: str, argv: Sequence[str]) -> None:
    """Parse and check a stage's flags as its script would: one process says what is wrong before several start."""
    module = import_module(stage)
    parse(module.OPTIONS, module.build_parser(), argv).check()


def launch(processes: int, script: str, argv: Sequence[str]) -> int:
    """Run a script on several processes of this machine, as torchrun would; the status is that of the first to fail.

    torchrun itself would end with status 1 and pages about its own workings, whatever the script had said. SIGTERM and
    Ctrl-C go to the processes, which say what becomes of the run; the status is then 143 or 130.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for module in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(processes), script, *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status not in (BAD_INPUT, *(SIGNALLED + number for number in SIGNALS)):  # those have been said already
            print(
                f"error: {Path(script).name}: process {rank} of {processes} ended with status {status}", file=sys.stderr
            )
        return status if status > 0 else SIGNALLED - status
    except SignalException as error:
        _signal_children(error.sigval)
        return SIGNALLED + error.sigval
    except KeyboardInterrupt:
        return SIGNALLED + signal.SIGINT
    return 0


def _signal_children(signum: int) -> None:
    """Pass a signal on to the processes that are still there: after a second one torchrun waits for them no longer."""
    for task in Path("/proc/self/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signum)  # torchrun gives each a group of its own


def main(argv: Sequence[str]) -> int:
    """What the launchers ask of this file.

    `python utils.py split FOLDER [flags]` writes each stage's arguments to FOLDER/1, 2 and 3, a NUL behind each.
    `python utils.py check 1|2|3 [flags]` refuses what that stage would refuse, or shows its --help.
    `python utils.py launch N SCRIPT [flags]` runs a script on N processes.
    """
    if len(argv) < 2 or argv[0] not in ("split", "check", "launch"):
        refuse(
            "utils.py has three commands: split FOLDER [flags of any stage], check 1|2|3 [flags of that stage], "
            "launch N SCRIPT [flags]"
        )
    if argv[0] == "launch":
        return launch(int(argv[1]), argv[2], argv[3:])
    if argv[0] == "check":
        try:
            check_flags(STAGES[int(argv[1]) - 1], argv[2:])
        except InputError as error:
            refuse(str(error))
        return 0
    if "--help" in argv or "-h" in argv:
        print(SPLIT_HELP, end="")
        return 0
    try:
        lists = split_flags(argv[2:])
    except InputError as error:
        refuse(str(error))
    for number, words in enumerate(lists, start=1):
        (Path(argv[1]) / str(number)).write_text("".join(f"{word}\0" for word in words), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
