"""A whole run, or one stage of it: how many processes, which exit status; stage_flags.py has who gets which flags.

run_staged.sh hands over to `main`. Knows no torch, so that a bad flag is refused before anything is installed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from hunyuan_staged.errors import (
    JOBS_FAILED,
    SIGNALLED,
    InputError,
    open_standard_streams,
    print_error,
    write_stdout,
)
from hunyuan_staged.files import contract
from hunyuan_staged.files.event_log import EventLog
from hunyuan_staged.launch_jobs import jobs_of_run, run_many
from hunyuan_staged.parsing import refuse
from hunyuan_staged.runtime.environment import check_working_folder, told_flags
from hunyuan_staged.runtime.gpus import visible_gpus
from hunyuan_staged.runtime.processes import Supervisor
from hunyuan_staged.runtime.signals import Interrupted
from hunyuan_staged.stage_flags import STAGES, check_flags, flags_of, read_whole_run

ROOT = Path(__file__).absolute().parent.parent
ALONE = ("stage1_text_encoder",)  # stages for one process, whatever --gpus says
HELP_SHOWN = 100  # of `check`: there is nothing to go on to
MAX_DEFAULT_PROCESSES = 8
MAX_PROCESSES = 64  # of one machine
ONLY, GPUS, HELP = "--only", "--gpus", ("--help", "-h")

SPLIT_HELP = """\
usage: run_staged.sh [--gpus N] [flags of any stage]

Runs the three stages one after the other, and hands each the flags that are its own:
  python stage1_text_encoder.py --help    prompt, model, resolution, output_dir
  python stage2_transformer.py --help     video length, steps, seed, attention
  python stage3_vae_decoder.py --help     mp4, tiles

With --super_resolution the second stage runs once more, and enlarges what it made.

  --gpus N   processes, one a GPU (default: $GPUS, else all visible GPUs up to 8, else one process on the CPU)

Many videos: --jobs FILE, --seeds 1-16, or --prompt several times; each has a folder of its own in --output_dir.
The path of each video, alone, goes to standard output; all else to standard error.

example:
  bash run_staged.sh --prompt 'a red circle moves left' --seed 7 --fps 24
"""


@dataclass(frozen=True)
class Command:
    """What a command line asks for. only: one stage's number; flags: those of the stages; helps: --help is among them."""

    only: int | None
    gpus: int
    flags: list[str]
    helps: bool


def read_command(argv: Sequence[str]) -> Command:
    """Part the launcher's own flags from the stages'. What follows a flag that takes a value is one, whatever it says."""
    valued = {flag for stage in STAGES for flag, takes in flags_of(stage).items() if takes}
    only, gpus, helps = None, os.environ.get("GPUS", ""), False
    flags: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in (ONLY, GPUS):
            if not equals:
                if not rest:
                    raise InputError(f"{flag} needs a number")
                value = rest.pop(0)
            if flag == ONLY:
                only = value
            else:
                gpus = value
        elif word in HELP:
            helps = True
        elif word in valued and rest:
            value = rest.pop(0)
            # argparse would take a value that begins with a dash for a flag.
            flags += [f"{word}={value}"] if value.startswith("-") else [word, value]
        else:
            flags.append(word)
    if only is not None and only not in ("1", "2", "3"):
        raise InputError(f"{ONLY} {only} is not 1, 2 or 3")
    return Command(int(only) if only else None, 1 if helps else process_count(gpus), flags, helps)


def process_count(given: str) -> int:
    """How many processes --gpus or $GPUS ask for; where neither does, one a GPU, and one where there is none."""
    if not given:
        return min(max(visible_gpus(), 1), MAX_DEFAULT_PROCESSES)
    if not re.fullmatch(r"[1-9][0-9]*", given):
        raise InputError(f"{GPUS} {given} is not a positive number")
    if len(given) > 9 or int(given) > MAX_PROCESSES:
        raise InputError(f"{GPUS} {given} is more than {MAX_PROCESSES}")
    return int(given)


def run(python: str, command: Command) -> int:
    """Run what a command asks for, with that Python; the status is the first failure's.

    Stages that failed have said why. InputError before anything has started.
    """
    if command.only:
        check_flags(STAGES[command.only - 1], command.flags)
        return run_stages(python, command, [command.only], [command.flags])
    whole = read_whole_run(command.flags)
    options, numbers, began = whole.options, whole.numbers, time.monotonic()
    if whole.request:
        jobs = jobs_of_run(whole.request, options, command.gpus)
        stages = partial(run_stages, python, command, numbers, began=began)
        plan = partial(plan_stages, python, command, numbers)
        return run_many(jobs, options, whole.lists, plan if options[0].dry_run else stages)
    if options[0].dry_run:
        return plan_stages(python, command, numbers, whole.lists)
    events = EventLog(options[-1].log_json, "run")
    events.write("start", flags=command.flags, gpus=command.gpus)
    status = run_stages(python, command, numbers, whole.lists, began)
    seconds = round(time.monotonic() - began, 3)
    if status:
        events.write("error", status=status, seconds=seconds)
        return status
    if 3 not in numbers:
        events.write("done", seconds={"all": seconds})
        return 0
    name = contract.at_resolution(contract.VIDEO_FILE, contract.resolution_asked(options[-1].latents))
    video = Path(options[-1].output_video or Path(options[-1].input_dir) / name).absolute()
    events.write("done", seconds={"all": seconds}, video=video)
    write_stdout(f"{video}\n")
    return 0


def plan_stages(python: str, command: Command, numbers: Sequence[int], lists: Sequence[list[str]]) -> int:
    """Print the plan of stages by number, each with its list of flags; the status of the process that makes it."""
    with Supervisor() as supervisor:
        words = [python, str(ROOT / "utils.py"), str(command.gpus), *map(json.dumps, lists[: len(numbers)])]
        return supervisor.run(words, 1, name="the plan")


def run_stages(
    python: str, command: Command, numbers: Sequence[int], lists: Sequence[list[str]], began: float | None = None
) -> int:
    """Run stages by number, each with its list of flags; the status is the first failure's. began: of a whole run."""
    worst = 0  # or JOBS_FAILED: the next stage goes on with the others
    # Whatever a stage or a library prints: a whole run's standard output is the video's path.
    stdout = None if began is None else sys.stderr.fileno()
    with Supervisor() as supervisor:
        groups = []
        for place, (number, argv) in enumerate(zip(numbers, lists, strict=False)):
            stage = STAGES[number - 1]
            count = 1 if stage in ALONE else command.gpus
            words = [python, str(ROOT / f"{stage}.py"), *argv]
            # All at once: what a later stage imports, and maybe loads, is there when its turn comes.
            early = told_flags(place, lists[: len(numbers)]) if place else None
            name = f"{stage}.py"
            groups.append(supervisor.start(words, count, name=name, stdout=stdout, began=began, early=early))
        for group in groups:
            if supervisor.received:
                print_error(f"the run {Interrupted(supervisor.received)}")
                return SIGNALLED + supervisor.received
            if (status := supervisor.finish(group)) not in (0, JOBS_FAILED):
                return status
            worst = status or worst
    return worst


def main(argv: Sequence[str]) -> int:
    """What run_staged.sh asks for: PYTHON check|run FLAGS.

    `check` refuses what `run` would refuse before it starts anything, or shows --help and returns HELP_SHOWN.
    """
    python, task, *flags = argv
    open_standard_streams()
    try:
        check_working_folder()
        command = read_command(flags)
        if command.helps:
            if command.only:
                import_module(STAGES[command.only - 1]).build_parser().print_help()
            else:
                write_stdout(SPLIT_HELP)
            return HELP_SHOWN if task == "check" else 0
        if task == "run":
            return run(python, command)
        if command.only:
            check_flags(STAGES[command.only - 1], command.flags)
        else:
            whole = read_whole_run(command.flags)
            if whole.request:
                jobs_of_run(whole.request, whole.options, command.gpus)
    except InputError as error:
        refuse(str(error))
    return 0
