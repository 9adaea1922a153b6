"""A whole run of many videos: its jobs, in a file that all stages get, and what became of them at the end."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import JOBS_FAILED, InputError, one_line, write_stdout
from hunyuan_staged.files import contract
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.jobs.reading import Jobs, make_jobs, read_lines, require_good, text_of
from hunyuan_staged.run_options import parse_seeds

QUEUE_FILE = "queue.jsonl"  # in the run's folder: its jobs, each with its name
JOBS, SEEDS, PROMPT, WATCH = "--jobs", "--seeds", "--prompt", "--watch"


@dataclass(frozen=True)
class Request:
    """What a whole run's flags say of many videos."""

    jobs: str | None
    seeds: str | None
    prompts: tuple[str, ...]


def take_request(lists: Sequence[list[str]]) -> tuple[list[list[str]], Request | None]:
    """(the stages' flags without those that ask for many videos, what these ask for; None: one video)."""
    found: dict[str, list[str]] = {JOBS: [], SEEDS: [], PROMPT: [], WATCH: []}
    for words in lists:
        own: dict[str, list[str]] = {name: [] for name in found}
        for word in words:
            flag, _, value = word.partition("=")
            if flag in own:
                own[flag].append(value)
        found = {name: own[name] or found[name] for name in found}
    if found[WATCH]:
        raise InputError(f"{WATCH} is for a single stage: run_stage1.sh, run_stage2.sh or run_stage3.sh")
    if not found[JOBS] and not found[SEEDS] and len(found[PROMPT]) < 2:
        return [list(words) for words in lists], None
    if found[JOBS] and len(found[PROMPT]) > 1:
        raise InputError(f"{PROMPT} is given several times beside {JOBS}; put the prompts into the file")
    taken = (JOBS, SEEDS) if found[JOBS] else (JOBS, SEEDS, PROMPT)
    left = [[word for word in words if word.partition("=")[0] not in taken] for words in lists]
    last = {name: values[-1] if values else None for name, values in found.items()}
    return left, Request(last[JOBS], last[SEEDS], tuple(found[PROMPT]))


def jobs_of_run(request: Request, options: Sequence[Any], processes: int) -> Jobs:
    """The jobs of a whole run; options: of each stage, by its flags alone.

    InputError where there is no good one, and for groups that cannot be made of so many processes.
    """
    check_groups(options[1], processes)
    seeds = parse_seeds(request.seeds) if request.seeds is not None else []
    if request.jobs is not None:
        found = make_jobs(read_lines(request.jobs), seeds, options)
        same = Path(request.jobs).resolve() == (Path(options[0].output_dir) / QUEUE_FILE).resolve()
        if same and (found.bad or seeds):
            raise InputError(
                f"{request.jobs} is where this run writes its jobs; give the file another name", option="jobs"
            )
    else:
        prompts = request.prompts or (options[0].prompt,)
        found = make_jobs([(PROMPT, partial(dict, prompt=prompt)) for prompt in prompts], seeds, options)
        if found.bad:
            raise InputError(found.bad[0])
    return require_good(found)


@contextlib.contextmanager
def written_queue(jobs: Jobs, options: Any) -> Iterator[str]:
    """The flag with the file of the jobs, for all stages; says what is left out. options: stage 1's.

    A run that writes nothing has that file elsewhere, and it is removed again.
    """
    for line in jobs.bad:
        print(f"left out: {one_line(line)}", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        folder = options.output_dir
        if options.dry_run:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hunyuan_staged."))
        path = Path(folder) / QUEUE_FILE
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{text_of(job)}\n" for job in jobs.good), encoding="utf-8")
        yield f"{JOBS}={path}"


def check_groups(options: Any, processes: int) -> None:
    """InputError where the groups that stage 2's options ask for cannot be made of so many processes."""
    size = options.gpus_per_job
    if size is not None and processes % size:
        raise InputError(f"{size} does not divide the run's {processes} processes", option="gpus_per_job")


def run_many(
    jobs: Jobs, options: Sequence[Any], lists: Sequence[list[str]], run: Callable[[Sequence[list[str]]], int]
) -> int:
    """A whole run of many videos, by `run` of the stages' flags; its status. options: of each list."""
    with written_queue(jobs, options[0]) as queue:
        status = run([[*words, queue] for words in lists]) or (JOBS_FAILED if jobs.bad else 0)
    if status in (0, JOBS_FAILED) and not options[0].dry_run:
        conclude(jobs, options)
    return status


def conclude(jobs: Jobs, options: Sequence[Any]) -> None:
    """The last lines of a whole run of many videos: on standard output the path of each that is there."""
    video = contract.at_resolution(contract.VIDEO_FILE, contract.resolution_asked(options[-1].latents))
    for line in jobs.bad:
        print(f"not a job: {one_line(line)}", file=sys.stderr, flush=True)
    for job in jobs.good:
        place = Path(options[0].output_dir) / job.name
        if (place / video).is_file() and not (place / contract.FAILURE_FILE).exists():
            write_stdout(f"{(place / video).absolute()}\n")
