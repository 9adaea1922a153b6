"""Which flags of a whole run's command line go to which stage, checked before the first one starts. Knows no torch."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.flags import options_of
from hunyuan_staged.launch_jobs import JOBS, Request, take_request
from hunyuan_staged.options import DEFAULT_OUTPUT_DIR, DenoiseOptions
from hunyuan_staged.parsing import parse
from hunyuan_staged.run_options import CACHE, LARGER
from hunyuan_staged.upscale_options import UpscaleOptions

STAGES = ("stage1_text_encoder", "stage2_transformer", "stage3_vae_decoder")
# Within a whole run the folder of every stage is the first one's --output_dir.
INPUT_DIR, OUTPUT_DIR = "--input_dir", "--output_dir"


@dataclass(frozen=True)
class WholeRun:
    """What a whole run's command line asks for, checked.

    lists: the flags of each stage, without those that ask for many videos; options: each list's, of many videos what they
    have in common; request: what is asked of many videos, None: there is one.
    """

    lists: list[list[str]]
    options: list[Any]
    request: Request | None

    @property
    def numbers(self) -> Sequence[int]:
        """The stages that are run, one for each of the first lists. A draft is no video yet."""
        return (1, 2) if self.options[1].stop_after is not None else stage_numbers(self.lists)


def read_whole_run(argv: Sequence[str]) -> WholeRun:
    """What a whole run's flags ask for; InputError or the parser's exit: a flag of any stage is bad."""
    lists, request = take_request(split_flags(argv))
    more = [f"{JOBS}=-"] if request else []
    stages = [STAGES[number - 1] for number in stage_numbers(lists)]
    options = [check_flags(stage, [*words, *more]) for stage, words in zip(stages, lists, strict=True)]
    return WholeRun(lists, options, request)


def flags_of(stage: str) -> dict[str, bool]:
    """A stage's flags, and whether each takes a value."""
    actions = import_module(stage).build_parser()._actions
    return {flag: action.nargs != 0 for action in actions for flag in action.option_strings}


def split_flags(argv: Sequence[str]) -> list[list[str]]:
    """The argument lists of a whole run, see stage_numbers; InputError names a flag that no stage has.

    A flag goes to every stage that has it.
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
    return lists


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
