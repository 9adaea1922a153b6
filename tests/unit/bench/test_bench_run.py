"""bench run: the parts of a run add up to its wall time."""

from datetime import UTC, datetime

import pytest

from hunyuan_staged.bench.command import build_parser
from hunyuan_staged.bench.run import bench_run, parts_of, table
from hunyuan_staged.errors import InputError

ZERO = 1_700_000_000.0


def event(at: float, stage: str, name: str, **facts: object) -> dict:
    return {"time": datetime.fromtimestamp(ZERO + at, UTC).isoformat(), "stage": stage, "event": name, **facts}


def part(at: float, stage: str, what: str, took: float) -> dict:
    return event(at, stage, "part", what=what, seconds=took)


def step(at: float, done: int, took: float) -> dict:
    return event(at, "stage 2", "progress", what="denoising", done=done, total=3, seconds=took)


EVENTS = [
    event(0.5, "run", "start"),
    event(3.0, "stage 1", "start", age={"exec": 0.1, "turn": 0.1, "start": 2.4}),  # exec at 0.6
    part(8.0, "stage 1", "load", 3.0),
    part(9.0, "stage 1", "compute", 1.0),
    event(9.5, "stage 1", "done"),
    event(11.0, "stage 2", "start", age={"exec": 0.1, "ready": 4.0, "turn": 10.0, "start": 10.4}, early="loaded early"),
    part(14.0, "stage 2", "load", 2.0),
    step(19.0, 1, 5.0),
    step(20.0, 2, 1.0),
    step(21.0, 3, 1.0),
    part(21.5, "stage 2", "compute", 7.5),
    event(22.0, "stage 2", "done"),
    event(24.0, "run", "done"),
]


def test_the_parts_of_a_run_make_up_its_wall_time():
    parts = parts_of(ZERO, ZERO + 24.5, EVENTS)
    one, two = parts["stages"]
    assert one == {
        "stage": "stage 1",
        "exec": 0.6,
        "ready": None,
        "until_turn": 0.7,
        "begin": 2.3,
        "prepare": 2.0,
        "load": 3.0,
        "first_extra": 0.0,
        "work": 1.0,
        "rest": 0.5,
        "step": None,
        "early": None,
    }
    assert two == {
        "stage": "stage 2",
        "exec": 0.6,
        "ready": 4.6,
        "until_turn": 1.1,
        "begin": 0.4,
        "prepare": 1.0,
        "load": 2.0,
        "first_extra": 4.5,
        "work": 3.0,
        "rest": 0.5,
        "step": 1.0,
        "early": "loaded early",
    }
    assert {name: parts[name] for name in ("wall", "work", "startup", "end")} == {
        "wall": 24.5,
        "work": 4.0,
        "startup": 20.5,
        "end": 2.5,
    }
    exclusive = ("until_turn", "begin", "prepare", "load", "first_extra", "work", "rest")
    assert sum(stage[name] for stage in (one, two) for name in exclusive) + 2.5 == pytest.approx(24.5)
    shown = table("run 1 of 1", parts).splitlines()
    assert shown[0].split() == ["run", "1", "of", "1", *(name for name in one if name not in ("stage", "early"))]
    assert shown[1].split()[:4] == ["stage", "1", "0.60", "-"]
    assert shown[-2] == "stage 2: loaded early"
    assert shown[-1] == "wall 24.50 s  work 4.00 s  startup 20.50 s  end 2.50 s"


@pytest.mark.parametrize(
    ("chunks", "extra"), [([2.9, 0.3, 0.2, 0.4], 2.6), ([0.2, 0.3, 0.3, 0.3], 0.0), ([2.9], 0.0), ([], 0.0)]
)
def test_what_the_first_chunk_takes_more_than_the_others_is_no_work(chunks, extra):
    """The warm-up of stage 3 was counted as decoding."""
    chunked = [event(2.0, "stage 3", "progress", what="decoding", seconds=seconds) for seconds in chunks]
    ages = {"exec": 0.1, "ready": 0.2, "turn": 0.3, "start": 0.4}
    ended = [part(6.0, "stage 3", "compute", 4.5), event(6.1, "stage 3", "done")]
    (three,) = parts_of(ZERO, ZERO + 6.1, [event(1.0, "stage 3", "start", age=ages), *chunked, *ended])["stages"]
    assert (three["first_extra"], three["work"]) == (pytest.approx(extra), pytest.approx(4.5 - extra))


def test_flags_that_it_does_not_know_are_the_launchers():
    args = build_parser().parse_args(["run", "--times", "2", "--prompt", "a cat", "--seed=7", "--save_frames"])
    assert (args.times, args.flags) == (2, ["--prompt", "a cat", "--seed=7", "--save_frames"])


def test_another_benchmark_refuses_them(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["stage2", "--seed", "7"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --seed 7 (see python -m hunyuan_staged.bench --help)\n"
    )


@pytest.mark.parametrize("flag", ["--jobs=a.jsonl", "--log_json", "--dry_run"])
def test_flags_that_make_no_single_timed_video_are_refused(flag):
    args = build_parser().parse_args(["run", flag])
    with pytest.raises(InputError, match=f"bench run times one video.*: {flag.partition('=')[0]} is not for it"):
        bench_run(args)
    with pytest.raises(InputError, match="--times 0 is less than 1"):
        bench_run(build_parser().parse_args(["run", "--times", "0"]))
