"""`bench run FLAGS`: run_staged.sh from the command to the video, with these flags, and where the seconds went.

Built from the events of --log_json. The parts of all stages, one after the other, make up the wall time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.launch import ROOT

Event = dict[str, Any]
OUTPUT_DIR, LOG = "--output_dir", "--log_json"


def add_parser(stages: Any) -> None:
    run = stages.add_parser(
        "run", help="a whole run, by part; all other flags are run_staged.sh's", usage="%(prog)s [--times N] FLAGS"
    )
    run.add_argument("--times", type=int, default=1, help="runs, one after the other (default: %(default)s)")
    run.set_defaults(run=bench_run, takes_flags=True)


def bench_run(args: argparse.Namespace) -> None:
    """Run, and print the parts of each run, then all as JSON. InputError where a run fails, which has said why."""
    flags: list[str] = args.flags
    if args.times < 1:
        raise InputError(f"--times {args.times} is less than 1")
    for flag in (LOG, "--dry_run", "--jobs", "--seeds"):
        if any(word.partition("=")[0] == flag for word in flags):
            raise InputError(f"bench run times one video and reads its events: {flag} is not for it")
    runs = []
    for number in range(1, args.times + 1):
        with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
            own = [] if any(word.partition("=")[0] == OUTPUT_DIR for word in flags) else [f"{OUTPUT_DIR}={folder}/run"]
            began, ended, events = _timed_run([*flags, *own], Path(folder) / "events.jsonl")
        parts = parts_of(began, ended, events)
        print(table(f"run {number} of {args.times}", parts), flush=True)
        runs.append(parts)
    print(json.dumps({"bench": "run", "flags": flags, "runs": runs}))


def _timed_run(flags: Sequence[str], log: Path) -> tuple[float, float, list[Event]]:
    """(when it began, when it ended, both as time.time(); its events)."""
    command = ["bash", str(ROOT / "run_staged.sh"), *flags, f"{LOG}={log}"]
    environment = {"PYTHON": sys.executable} | os.environ
    began = time.time()
    status = subprocess.run(command, env=environment, stdout=sys.stderr.fileno(), check=False).returncode
    ended = time.time()
    if status:
        raise InputError(f"run_staged.sh ended with status {status}")
    return began, ended, [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def parts_of(began: float, ended: float, events: Sequence[Event]) -> dict[str, Any]:
    """Seconds by part. work: encoding, steps and decoding alone; startup: all the rest of the wall time."""
    stages: list[dict[str, Any]] = []
    cursor = began
    for own in _by_stage(events):
        stages.append(_stage(own, cursor, began))
        cursor = _moment(own[-1])
    work = sum(stage["work"] for stage in stages)
    return {
        "wall": round(ended - began, 2),
        "work": round(work, 2),
        "startup": round(ended - began - work, 2),
        "stages": stages,
        "end": round(ended - cursor, 2),
    }


def _by_stage(events: Sequence[Event]) -> list[list[Event]]:
    """The events of each stage, from its start to its done."""
    stages: list[list[Event]] = []
    for event in events:
        if event["stage"] == "run":
            continue
        if event["event"] == "start":
            stages.append([])
        stages[-1].append(event)
    return stages


def _moment(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _stage(events: Sequence[Event], cursor: float, began: float) -> dict[str, Any]:
    """One stage's seconds by part. cursor: when the stage before was done.

    until_turn: since then, so the end of that process and whatever of this one's own start it did not hide; begin: flags
    checked, processes joined; prepare: all before loading; first_extra: computing beyond that many steps of the others'
    median, of a decoding what its first chunk or tile takes more than the others; rest: writing, and what is between
    parts. exec, ready: seconds since the run began, beside the other stage. early: what the stage said of loading then.
    """
    start, done = events[0], _moment(events[-1])
    age = start["age"]
    executed = _moment(start) - age["start"]
    turn, started = executed + age["turn"], _moment(start)
    seconds = {"load": 0.0, "compute": 0.0}
    loading = None
    for event in events:
        if event["event"] == "part" and event["what"] in seconds:
            seconds[event["what"]] += event["seconds"]
            loading = _moment(event) - event["seconds"] if loading is None else loading
    prepare = (started if loading is None else loading) - started
    steps, chunks = (
        [event["seconds"] for event in events if event["event"] == "progress" and event["what"] == what]
        for what in ("denoising", "decoding")
    )
    step = statistics.median(steps[1:]) if len(steps) > 1 else None
    work = seconds["compute"] if step is None else min(step * len(steps), seconds["compute"])
    if len(chunks) > 1:
        work -= max(0.0, chunks[0] - statistics.median(chunks[1:]))
    found = {
        "stage": start["stage"],
        "exec": executed - began,
        "ready": None if age.get("ready") is None else executed + age["ready"] - began,
        "until_turn": turn - cursor,
        "begin": started - turn,
        "prepare": prepare,
        "load": seconds["load"],
        "first_extra": seconds["compute"] - work,
        "work": work,
        "rest": done - started - prepare - sum(seconds.values()),
        "step": step,
        "early": start.get("early"),
    }
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def table(title: str, parts: dict[str, Any]) -> str:
    """The parts as lines: a stage each, then what stages said of loading early, then the sums."""
    names = [name for name in parts["stages"][0] if name not in ("stage", "early")]
    rows = [[title, *names]]
    for stage in parts["stages"]:
        rows.append([stage["stage"], *("-" if stage[name] is None else f"{stage[name]:.2f}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    sums = "  ".join(f"{name} {parts[name]:.2f} s" for name in ("wall", "work", "startup", "end"))
    early = [f"{stage['stage']}: {stage['early']}" for stage in parts["stages"] if stage["early"]]
    return "\n".join([*lines, *early, sums])
