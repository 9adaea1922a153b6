"""The values that a job gives: of options, with the kinds, choices and messages of the flags."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.flags import Option, options_of
from hunyuan_staged.jobs.names import NAME, check_name
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, EncodeOptions
from hunyuan_staged.run_options import LARGER_FILES, RunOptions

STAGE_OPTIONS: tuple[type[RunOptions], ...] = (EncodeOptions, DenoiseOptions, DecodeOptions)
# What is asked of a whole run, not of one job.
OF_THE_RUN = frozenset(
    (
        *(
            "dry_run",
            "debug",
            "log_json",
            "resume",
            "input_dir",
            "output_dir",
            "output_video",
            "latents",
            "jobs",
            "seeds",
        ),
        *("gpus_per_job", "watch", "assume_gpu", "super_resolution", "input_video"),
        *LARGER_FILES,
    )
)
KINDS = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
_TRUTH = {"true": True, "false": False}


@cache
def job_options() -> dict[str, Option]:
    """The options that a job may give, of all stages, by name."""
    found = {option.name: option for cls in STAGE_OPTIONS for option in options_of(cls)}
    return {name: option for name, option in found.items() if name not in OF_THE_RUN}


def check_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """A job's values, each of its option's kind; what is null is left out. InputError names what is unknown or wrong."""
    known = job_options()
    values = {}
    for name, value in given.items():
        if name == NAME:
            values[name] = check_name(value)
        elif name in known:
            if value is not None:
                values[name] = _value(known[name], value)
        elif name in OF_THE_RUN:
            raise InputError("is asked of a whole run, on the command line, and not of one job", option=name)
        else:
            raise InputError(f"{name[:60]!a} is unknown; known: {', '.join((NAME, *known))}")
    return values


def _value(option: Option, value: Any) -> Any:
    """A JSON value as the option's; InputError where it is of another kind or none of its choices."""
    if option.several:
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise InputError(f"{_shown(value)} is not a list of texts", option=option.name)
        value = tuple(value)
    elif option.kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    elif type(value) is not option.kind:
        raise InputError(f"{_shown(value)} is not {KINDS[option.kind]}", option=option.name)
    if option.kind is float and not math.isfinite(value):
        raise InputError(f"{value} is not a finite number", option=option.name)
    for text in value if option.several else (value,):
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError("is not UTF-8 text", option=option.name)
    if option.flag.choices and value not in option.flag.choices:
        raise InputError(f"{_shown(value)} is unknown; known: {', '.join(option.flag.choices)}", option=option.name)
    return value


def _shown(value: Any) -> str:
    text = ascii(value)
    return text[:60] + "…" * (len(text) > 60)


def parse_text(name: str, text: str) -> Any:
    """The value that a cell of a table means, which is text; what it cannot be stays text, for check_values to refuse."""
    option = job_options().get(name)
    if option is None or option.kind is str:
        return text.split(" ") if option and option.several else text
    if option.kind is bool:
        return _TRUTH.get(text.lower(), text)
    try:
        return option.kind(text)
    except ValueError:
        return text
