"""A whole run, or one stage of it: which flags go to which stage, how many processes, which exit status.

run_staged.sh hands over to `main`. Knows no torch, so that a bad flag is refused before anything is installed.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import JOBS_FAILED, SIGNALLED, InputError, print_error, write_stdout
from hunyuan_staged.files import contract
from hunyuan_staged.files.event_log import EventLog
from hunyuan_staged.flags import options_of
from hunyuan_staged.launch_jobs import JOBS, Request, jobs_of_run, run_many, take_request
from hunyuan_staged.options import DEFAULT_OUTPUT_DIR, DenoiseOptions
from hunyuan_staged.parsing import parse, refuse
from hunyuan_staged.run_options import CACHE, LARGER
from hunyuan_staged.runtime.environment import check_working_folder, told_flags
from hunyuan_staged.runtime.gpus import visible_gpus
from hunyuan_staged.runtime.processes import Supervisor
from hunyuan_staged.runtime.signals import Interrupted
from hunyuan_staged.upscale_options import UpscaleOptions

ROOT = Path(__file__).absolute().parent.parent
STAGES = ("stage1_text_encoder", "stage2_transformer", "stage3_vae_decoder")
ALONE = ("stage1_text_encoder",)  # stages for one process, whatever --gpus says
HELP_SHOWN = 100  # of `check`: there is nothing to go on to
MAX_DEFAULT_PROCESSES = 8
MAX_PROCESSES = 64  # of one machine
# Within a whole run the folder of every stage is the first one's --output_dir.
INPUT_DIR, OUTPUT_DIR = "--input_dir", "--output_dir"
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


def flags_of(stage: str) -> dict[str, bool]:
    """A stage's flags, and whether each takes a value."""
    actions = import_module(stage).build_parser()._actions
    return {flag: action.nargs != 0 for action in actions for flag in action.option_strings}


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


def split_flags(argv: Sequence[str]) -> list[list[str]]:
    """The argument lists of a whole run, see stage_numbers; InputError names a flag that no stage has.

    A flag goes to every stage that has it. Each list is parsed and checked here, so that a bad flag of stage 3 is
    refused before stage 1 starts.
    """
    flags = [flags_of(stage) for stage in STAGES]
    lists: list[list[str]] = [[], [], []]
    folder = DEFAULT_OUTPUT_DIR
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag == INPUT_DIR:
            raise InputError(f"{INPUT_DIR} is for a single stage; a whole run has one folder: use {OUTPUT_DIR}")
        owners = [index for index in range(len(flags)) if flag in flags[index]]
        if not flag.startswith("--") or not owners:
            raise InputError(_unknown(word, flag, flags))
        words = [word]
        if not equals and flags[owners[0]][flag]:
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
    target = next((word.partition("=")[2] for word in lists[1] if _name(word) == "super_resolution"), None)
    if target or contract.latents_present(folder):
        # Not those of a former run. Of a flag that is given twice the last counts.
        lists[2].insert(0, f"--latents={target or contract.BASE}")
    if target:
        lists[1:2] = base_and_larger(lists[1])
    check_lists(*take_request(lists))
    return lists


def check_lists(lists: Sequence[Sequence[str]], request: Request | None) -> list[Any]:
    """The options of each of a whole run's lists; of many videos what they have in common."""
    more = [f"{JOBS}=-"] if request else []
    return [check_flags(STAGES[n - 1], [*words, *more]) for n, words in zip(stage_numbers(lists), lists, strict=True)]


def base_and_larger(words: list[str]) -> list[list[str]]:
    """Stage 2's two lists where super resolution follows the base run, from what is given for both."""
    of_larger = {option.name for option in options_of(DenoiseOptions) if option.flag.group == LARGER}
    of_base = {option.name for option in options_of(DenoiseOptions) if option.flag.group == CACHE}
    if any(_name(word) == "input_video" for word in words):
        return [words]  # there is no base run
    of_base |= {*UpscaleOptions.of_the_base, *UpscaleOptions.of_its_own}
    return [[word for word in words if _name(word) not in others] for others in (of_larger, of_base)]


def _name(word: str) -> str:
    """The option of a word of a list."""
    return word.partition("=")[0].removeprefix("--")


def stage_numbers(lists: Sequence[Sequence[str]]) -> Sequence[int]:
    """Which stage each of a whole run's lists is for."""
    return (1, 2, 3) if len(lists) == len(STAGES) else (1, 2, 2, 3)


def _unknown(word: str, flag: str, flags: Sequence[dict[str, bool]]) -> str:
    """What to say of a word that is a flag of no stage."""
    if not flag.startswith("-"):
        hint = f"see run_staged.sh --help; a prompt is given as --prompt {shlex.quote(word)}"
        return f"{word} is a flag of no stage; {hint}"
    known = sorted({name for own in flags for name in own if name.startswith("--")} - {INPUT_DIR})
    near = difflib.get_close_matches(flag, known, n=1)
    return f"{flag} is a flag of no stage; " + (f"did you mean {near[0]}?" if near else "see run_staged.sh --help")


def check_flags(stage: str, argv: Sequence[str]) -> Any:
    """Parse and check a stage's flags as its script would, and return its options: one process says what is wrong."""
    module = import_module(stage)
    options = parse(module.OPTIONS, module.build_parser(), argv)
    options.check()
    return options


def run(python: str, command: Command) -> int:
    """Run what a command asks for, with that Python; the status is the first failure's.

    Stages that failed have said why. InputError before anything has started.
    """
    if command.only:
        check_flags(STAGES[command.only - 1], command.flags)
        return run_stages(python, command, [command.only], [command.flags])
    lists, request = take_request(split_flags(command.flags))
    options = check_lists(lists, request)
    numbers = [1, 2] if options[1].stop_after is not None else stage_numbers(lists)  # a draft is no video yet
    if request:
        jobs, began = jobs_of_run(request, options, command.gpus), time.monotonic()
        run = partial(run_stages, python, command, numbers, began=None if options[0].dry_run else began)
        return run_many(jobs, options, lists, run)
    if options[-1].dry_run:
        with Supervisor() as supervisor:
            words = [python, str(ROOT / "utils.py"), str(command.gpus), *map(json.dumps, lists)]
            return supervisor.run(words, 1, name="the plan")
    began = time.monotonic()
    events = EventLog(options[-1].log_json, "run")
    events.write("start", flags=command.flags, gpus=command.gpus)
    status = run_stages(python, command, numbers, lists, began)
    seconds = round(time.monotonic() - began, 3)
    if status:
        events.write("error", status=status, seconds=seconds)
        return status
    if 3 not in numbers:
        events.write("done", seconds={"all": seconds})
        return 0
    decoded = None if options[-1].latents == contract.BASE else options[-1].latents
    name = contract.at_resolution(contract.VIDEO_FILE, decoded)
    video = Path(options[-1].output_video or Path(options[-1].input_dir) / name).absolute()
    events.write("done", seconds={"all": seconds}, video=video)
    write_stdout(f"{video}\n")
    return 0


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
            lists, request = take_request(split_flags(command.flags))
            if request:
                jobs_of_run(request, check_lists(lists, request), command.gpus)
    except InputError as error:
        refuse(str(error))
    return 0
