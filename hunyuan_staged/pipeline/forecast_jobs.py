"""What --dry_run prints of many videos: one plan of all, by stage: what is done, how many at a time, memory and time."""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from hunyuan_staged.encoders.text import glyph_text
from hunyuan_staged.errors import JOBS_FAILED, InputError
from hunyuan_staged.jobs.reading import Job, Jobs, options_of_job
from hunyuan_staged.memory import expected as times
from hunyuan_staged.memory.budget import gib
from hunyuan_staged.memory.expected import Expected
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, EncodeOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline import (
    forecast,
    forecast_denoising,
    groups,
    job_folders,
)
from hunyuan_staged.pipeline.forecast_done import NOTHING, StepsDone, is_done, steps_done
from hunyuan_staged.pipeline.forecast_target import LARGER, TITLES, Rows, StagePlan, Target, target_of, time_of_run
from hunyuan_staged.run_options import RunOptions

NUMBERS = {EncodeOptions: 1, DenoiseOptions: 2, DecodeOptions: 3}
WHOLE = "all videos"


class PlanRun(Protocol):
    """What of a script's run is needed."""

    status: int

    def warn(self, text: str) -> None:
        """A warning for the log."""

    def show_plan(self, rows: Mapping[str, object], title: str = "") -> None:
        """Print a plan."""


@dataclass(frozen=True)
class Planned:
    """A job's plan. own: its options for each process of the run; done: of each, whether its part is there; plans: of
    each; why_not: what says that it cannot be made, else empty; steps: done, of each."""

    job: Job
    own: Sequence[Any]
    done: Sequence[bool]
    steps: Sequence[StepsDone] = ()
    plans: Sequence[Sequence[StagePlan]] = ()
    why_not: str = ""


def show(run: PlanRun, options: Sequence[Any], found: Jobs, world: World) -> None:
    """Print the plan of all jobs, and say which cannot be made; the first process alone calls it.

    options: of a whole run's processes, one after the other, or of one stage; world: of stages 2 and 3.
    """
    for line in found.bad:
        run.warn(f"left out: {line}")
    order = job_folders.ordered(found.good, options[0], NUMBERS[type(options[0])])
    rows, refused = plan_all(options, order, world)
    for line in refused:
        run.warn(f"cannot be made: {line}")
    for title, of_stage in rows.items():
        run.show_plan(of_stage, title)
    run.status = JOBS_FAILED if refused or found.bad else 0


def plan_all(options: Sequence[Any], found: Sequence[Job], world: World) -> tuple[dict[str, Rows], list[str]]:
    """(the plan of all jobs: rows by title, a line on each job that cannot be made)."""
    plan = remembered(partial(plan_processes if len(options) > 1 else plan_stage, world=world))
    here = World(0, 1, world.device)
    todo = [_looked_at(options, job, here) for job in found]
    sizes = [_size(options, index, todo, plan, world.size) for index in range(len(options))]
    todo = [_planned(one, plan, sizes, here) for one in todo]
    parts = [_rows_of(index, one, todo, (sizes[index], world.size)) for index, one in enumerate(options)]
    rows = {_title(one): of_stage for one, (of_stage, _) in zip(options, parts, strict=True)}
    if len(options) > 1:
        whole = times.total(expected for _, expected in parts)
        told = time_of_run(whole) if whole else "unknown"
        rows[WHOLE] = {"jobs": _counts(todo, len(options) - 1), **({"time": told} if any(map(_to_make, todo)) else {})}
    return rows, _refused(todo)


# -- a job's plan --

# Of a job's options, the sizes of groups, and the steps that are done, of each process.
Plan = Callable[[Sequence[Any], Sequence[int], Sequence[StepsDone]], list[list[StagePlan]]]


def plan_processes(
    own: Sequence[Any], sizes: Sequence[int], done: Sequence[StepsDone], world: World
) -> list[list[StagePlan]]:
    """The plans of a whole run of one job, in groups of these sizes."""
    encode, denoise, *more = own

    def find_target(options: RunOptions, _: World) -> Target:
        larger = len(more) == 2 and getattr(options, "super_resolution", None)
        index = {EncodeOptions: 0, DenoiseOptions: 2 if larger else 1}.get(type(options), len(own) - 1)
        return target_of(options, World(0, sizes[index], world.device))

    options = [forecast.encoding_of_run(encode, denoise), denoise, *more]
    return forecast.plan_processes(options, world, find_target=find_target, done=done)


def plan_stage(
    own: Sequence[Any], sizes: Sequence[int], done: Sequence[StepsDone], world: World
) -> list[list[StagePlan]]:
    """The plan of one stage of one job, for what lies in its folder, else for what is likely to."""
    (options,), group = own, World(0, sizes[0], world.device)
    if isinstance(options, DenoiseOptions):
        return [forecast_denoising.plan_denoising(options, group, done=done[0])]
    if isinstance(options, EncodeOptions):
        return [[forecast.plan_encoding(options, group)]]
    return [[forecast.plan_decoding(options, group)]]


def remembered(plan: Plan) -> Plan:
    """The same, made once for all jobs of whose options and folders it says the same."""
    known: dict[object, list[list[StagePlan]]] = {}

    def find(own: Sequence[Any], sizes: Sequence[int], done: Sequence[StepsDone]) -> list[list[StagePlan]]:
        alike = tuple(_alike(one, alone=len(own) == 1) for one in own)
        key = alike, tuple(sizes), tuple(frozenset(steps.items()) for steps in done)
        if key not in known:
            known[key] = plan(own, sizes, done)
        return known[key]

    return find


def _alike(options: Any, *, alone: bool) -> object:
    """What of a job's options its plan follows from; of a prompt that is the text in quotation marks."""
    if isinstance(options, EncodeOptions):
        return replace(options, prompt=glyph_text(options.prompt), negative_prompt="", output_dir="")
    if alone:
        return options  # it goes by what lies in its folder
    seeds = {"seed": 0, "output_dir": None} if isinstance(options, DenoiseOptions) else {}
    return replace(options, input_dir="", **seeds)


def _looked_at(options: Sequence[Any], job: Job, world: World) -> Planned:
    """A job and what of it is there, for one process; what follows on something that is still to be made is not."""
    own: list[Any] = []
    done: list[bool] = []
    for one in options:
        number = NUMBERS[type(one)]
        own.append(job_folders.placed(options_of_job(one, job), job, number))
        done.append(all(done) and is_done(own[-1], world))
    return Planned(job, own, done)


def _planned(one: Planned, plan: Plan, sizes: Sequence[int], world: World) -> Planned:
    """A job with its plans, which one that is done needs none of."""
    if one.done[-1]:
        return one
    try:
        steps = [_steps_done(one, index, world) for index in range(len(one.own))]
        return replace(one, steps=steps, plans=plan(one.own, sizes, steps))
    except InputError as error:
        return replace(one, why_not=str(error).removeprefix("--"))


def _steps_done(one: Planned, index: int, world: World) -> StepsDone:
    """Of a job's process, which goes on from a state without --resume, too, where what it follows on is there."""
    own = one.own[index]
    goes_on = isinstance(own, DenoiseOptions) and all(one.done[:index])
    return steps_done(own, world) if goes_on else NOTHING


# -- all jobs --


def _to_make(one: Planned, index: int = -1) -> bool:
    return not one.done[index] and not one.why_not


def _left(todo: Sequence[Planned], index: int) -> list[Planned]:
    return [one for one in todo if _to_make(one, index)]


def _refused(todo: Sequence[Planned]) -> list[str]:
    """A line on all jobs that cannot be made for one reason."""
    names: dict[str, list[str]] = {}
    for one in todo:
        if one.why_not:
            names.setdefault(one.why_not, []).append(one.job.name)
    return [
        f"{', '.join(names[why][:5])}{f' and {len(names[why]) - 5} more' * (len(names[why]) > 5)}: {why}"
        for why in names
    ]


def _size(options: Sequence[Any], index: int, todo: Sequence[Planned], plan: Plan, processes: int) -> int:
    """How many processes make a video together at a stage, as the stage itself chooses: see groups.py."""
    left = _left(todo, index)
    if isinstance(options[index], EncodeOptions) or not left:
        return 1
    if options[index].gpus_per_job:
        return int(options[index].gpus_per_job)
    longest = max(left, key=lambda one: getattr(one.own[index], "video_length", None) or 0)

    def fits(size: int) -> bool:
        try:
            plan(longest.own, [size if at == index else 1 for at in range(len(options))], [NOTHING] * len(options))
        except InputError:
            return False
        return True

    denoises = isinstance(options[index], DenoiseOptions) and not options[index].super_resolution
    return groups.choose_size(processes, len(left), fits if denoises else lambda _: True)


def _rows_of(
    index: int, options: Any, todo: Sequence[Planned], processes: tuple[int, int]
) -> tuple[Rows, Expected | None]:
    """The rows of one stage, and the time that it takes. processes: of a group, of all."""
    left, (size, whole) = _left(todo, index), processes
    rows: Rows = {"jobs": _counts(todo, index)}
    if not left:
        return rows, times.measured(0)
    count = 1 if isinstance(options, EncodeOptions) else whole // size
    last = [one.plans[index][-1].rows for one in left]
    videos = Counter(row["video"] for row in last if "video" in row)
    if videos:
        rows["videos"] = "; ".join(f"{number} of {video}" for video, number in videos.most_common())
    if not isinstance(options, EncodeOptions):
        rows["groups"] = f"{count} of {size} process{'es' * (size > 1)}, a video each at a time"
    steps = sum(sum(one.steps[index].values()) for one in left)
    if steps:
        rows["steps"] = f"{steps} done already"
    peaks = {one.job.name: max(plan.memory.total for plan in one.plans[index]) for one in left}
    worst = max(peaks, key=lambda name: peaks[name])
    rows |= {"memory": f"{gib(peaks[worst])} at most, of {worst}", "free": last[0]["free"]}
    each = [times.total(plan.expected for plan in one.plans[index]) for one in left]
    known = [one for one in each if one]
    if len(known) < len(each):
        return rows | {"expected time": last[each.index(None)]["expected time"]}, None
    expected = Expected(in_groups([one.least for one in known], count), in_groups([one.most for one in known], count))
    return rows | {"expected time": f"{expected} ({expected.how})"}, expected


def in_groups(seconds: Sequence[float], count: int) -> float:
    """How long so many groups take for jobs that each draws from one list when it has done the last."""
    ends = [0.0] * count
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def _counts(todo: Sequence[Planned], index: int) -> str:
    done, refused = sum(one.done[index] for one in todo), sum(bool(one.why_not) for one in todo)
    words = [f"{done} done", f"{len(_left(todo, index))} to make", *([f"{refused} cannot be made"] if refused else [])]
    return f"{len(todo)}: {', '.join(words)}"


def _title(options: Any) -> str:
    larger = isinstance(options, DenoiseOptions) and options.super_resolution
    return f"{LARGER} {larger}" if larger else TITLES[NUMBERS[type(options)]]
