"""Many videos: the jobs that a file, several prompts or several seeds ask for, checked before anything loads. No torch.

A job is a name, which is its folder's, and values of options of any stage, which come before those of the command line.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hunyuan_staged.errors import InputError
from hunyuan_staged.flags import options_of
from hunyuan_staged.jobs.names import NAME, check_name, default_name
from hunyuan_staged.jobs.values import check_values, parse_text
from hunyuan_staged.run_options import CACHE, MAX_JOBS, RunOptions, parse_seeds
from hunyuan_staged.upscale_options import UpscaleOptions

MAX_FILE_BYTES = 2**26

Options = TypeVar("Options", bound=RunOptions)


@dataclass(frozen=True)
class Job:
    """One video. place: what asked for it, for messages; values: of options, by their names."""

    name: str
    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Jobs:
    """The jobs that are good, and a line on each that is not."""

    good: tuple[Job, ...]
    bad: tuple[str, ...] = ()


Line = tuple[str, Callable[[], Mapping[str, Any]]]  # a place, and what reads it; that may raise InputError


def read_lines(path: str | Path) -> list[Line]:
    """What a job file holds, line by line. InputError: it is absent, too large, or of no kind that is known."""
    file = Path(path)
    readers = {".jsonl": _json_lines, ".csv": _table_lines, ".txt": _text_lines}
    if file.suffix.lower() not in readers:
        raise InputError(f"{path} is neither .jsonl nor .csv nor .txt", option="jobs")
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size <= MAX_FILE_BYTES else b""
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", option="jobs") from error
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are allowed", option="jobs")
    lines = list(readers[file.suffix.lower()](file.name, data.removeprefix(b"\xef\xbb\xbf")))
    if not lines:
        raise InputError(f"{path} holds no job", option="jobs")
    return lines


def _numbered(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"{name}:{number}", line.strip(b"\r\n")


def _json_lines(name: str, data: bytes) -> Iterator[Line]:
    for place, line in _numbered(name, data):
        yield place, partial(parse_object, line)


def _text_lines(name: str, data: bytes) -> Iterator[Line]:
    for place, line in _numbered(name, data):
        yield place, partial(_prompt, line)


def _table_lines(name: str, data: bytes) -> Iterator[Line]:
    try:
        rows = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        header = [cell.strip() for cell in next(rows, [])]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{name} is no table ({error})", option="jobs") from error
    if len(set(header)) < len(header):
        raise InputError(f"{name}:1 has a column twice", option="jobs")
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{name}:{rows.line_num} is no row of a table ({error})", option="jobs") from error
        if row is None:
            return
        if row:
            yield f"{name}:{rows.line_num}", partial(_row, header, row)


def _row(header: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    if len(row) != len(header):
        raise InputError(f"has {len(row)} cells; the first line has {len(header)}")
    return {name: parse_text(name, text) for name, text in zip(header, row, strict=True) if text.strip()}


def _prompt(line: bytes) -> dict[str, Any]:
    return {"prompt": _decoded(line).strip()}


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text") from error


def parse_object(line: bytes) -> dict[str, Any]:
    """A JSON object of which no key is there twice; InputError for anything else."""
    text = _decoded(line)
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({str(error)[:100]})") from error
    if not isinstance(found, dict):
        raise InputError(f"holds a JSON {type(found).__name__}, not an object")
    return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError("has a key twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON has")


def at(place: str, error: InputError) -> str:
    """What is wrong, with the line of the job file in front: `jobs.jsonl:3 video_length 120 is …`."""
    return f"{place} {str(error).removeprefix('--')}"


def options_of_job(options: Options, job: Job) -> Options:
    """A stage's options for one job: the job's own values, else those of the command line."""
    own = {option.name for option in options_of(type(options))}
    if isinstance(options, UpscaleOptions) and options.super_resolution:
        # The values are the base run's; those that both have are given on the command line.
        own -= {option.name for option in options_of(type(options)) if option.flag.group == CACHE}
        own -= {*UpscaleOptions.of_the_base, *UpscaleOptions.of_its_own}
    return replace(options, **{name: value for name, value in job.values.items() if name in own})


def make_jobs(lines: Iterable[Line], seeds: Sequence[int] = (), checks: Sequence[RunOptions] = ()) -> Jobs:
    """The jobs of some lines, each with every seed where there are any.

    checks: the options of the command line, of each stage that is to judge the jobs' values with them.
    """
    good: dict[str, Job] = {}
    bad: list[str] = []
    for number, (place, read) in enumerate(lines, 1):
        try:
            values = check_values(read())
            if seeds and "seed" in values:
                raise InputError(f"{values['seed']} contradicts --seeds", option="seed")
            for seed in seeds or (None,):
                job = _job(place, values, seed, number)
                for options in checks:
                    options_of_job(options, job).check()
                former = good.setdefault(job.name.lower(), job)
                if former is not job:
                    raise InputError(f"{job.name} is that of {former.place}; give each its own", option=NAME)
        except InputError as error:
            bad.append(at(place, error))
        if len(good) > MAX_JOBS:
            raise InputError(f"asks for more than {MAX_JOBS} jobs", option="jobs")
    return Jobs(tuple(good.values()), tuple(bad))


def _job(place: str, values: Mapping[str, Any], seed: int | None, number: int) -> Job:
    own = {name: value for name, value in values.items() if name != NAME}
    if seed is not None:
        own["seed"] = seed
    name = values.get(NAME)
    if name is not None and seed is not None:
        name = check_name(f"{name}-seed{seed}")
    return Job(name or default_name(own, number), place, own)


def text_of(job: Job) -> str:
    """A job as a line of a .jsonl file."""
    return json.dumps({NAME: job.name, **job.values}, ensure_ascii=False)


def read_line(place: str, line: bytes) -> Job:
    """The job of such a line; a folder's, which has its name from that, may give none. InputError: it is bad."""
    values = check_values(parse_object(line))
    return Job(values.pop(NAME, ""), place, values)


# -- what options ask for --


def asks_for_many(options: RunOptions) -> bool:
    """Whether a stage's options ask for many jobs, or for those of a folder that is watched."""
    several = len(getattr(options, "prompts", ())) > 1
    return several or any(getattr(options, name, None) is not None for name in ("jobs", "seeds", "watch"))


def require_good(found: Jobs) -> Jobs:
    """The jobs themselves; InputError where none of them is good."""
    if not found.good:
        more = f" (and {len(found.bad) - 1} more)" if len(found.bad) > 1 else ""
        raise InputError(f"no job is good: {found.bad[0]}{more}")
    return found


def jobs_of(options: Any, checks: Sequence[RunOptions]) -> Jobs:
    """The jobs that options ask for by jobs, prompts and seeds; checks: as make_jobs.

    InputError where a prompt or a seed is the culprit, and where there is no good job at all.
    """
    seeds = parse_seeds(options.seeds) if getattr(options, "seeds", None) is not None else []
    if getattr(options, "jobs", None) is not None:
        found = make_jobs(read_lines(options.jobs), seeds, checks)
    else:
        prompts = getattr(options, "prompts", ())
        given = [{"prompt": prompt} for prompt in prompts] or [{}]
        found = make_jobs(
            [("--prompt" if prompts else "--seeds", partial(dict, values)) for values in given], seeds, checks
        )
        if found.bad:
            raise InputError(found.bad[0])
    return require_good(found)
