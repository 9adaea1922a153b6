"""A whole run of many videos: what its flags ask for, what the stages get, how it ends."""

import json
from pathlib import Path

import pytest

from hunyuan_staged import launch_jobs
from hunyuan_staged.errors import InputError
from hunyuan_staged.launch_jobs import Request
from hunyuan_staged.stage_flags import STAGES, check_flags, read_whole_run


def request(*argv: str) -> Request | None:
    return read_whole_run(argv).request


def test_one_video_asks_for_no_jobs():
    assert request("--prompt", "a", "--seed", "3") is None


def test_what_asks_for_many_is_taken_from_the_stages_flags():
    whole = read_whole_run(["--prompt", "a", "--seeds", "1-2", "--fps", "12"])
    assert whole.request == Request(None, "1-2", ("a",))
    assert whole.lists == [[], ["--input_dir=./stage_outputs"], ["--fps=12", "--input_dir=./stage_outputs"]]
    whole = read_whole_run(["--jobs", "x.jsonl", "--prompt", "a", "--seeds", "4"])
    assert whole.request == Request("x.jsonl", "4", ("a",)) and whole.lists[0] == ["--prompt=a"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--watch", "."], "--watch is for a single stage"),
        (["--jobs", "x.jsonl", "--prompt", "a", "--prompt", "b"], "--prompt is given several times beside --jobs"),
        (["--gpus_per_job", "2"], "--gpus_per_job belongs to --jobs, --seeds or --watch"),
        (["--seeds", "1", "--fps", "0"], "--fps 0 is outside 1 to 240"),
    ],
)
def test_what_contradicts_itself_is_refused(argv, message):
    with pytest.raises(InputError, match=message):
        request(*argv)


def test_the_stages_get_the_good_jobs_and_the_bad_ones_are_named(tmp_path, capfd):
    file, folder = tmp_path / "jobs.jsonl", tmp_path / "runs"
    file.write_text('{"prompt": "a cat"}\n{"fps": 0}\n{"name": "x", "video_length": 9}\n')
    whole = read_whole_run(["--jobs", str(file), "--output_dir", str(folder)])
    jobs = launch_jobs.jobs_of_run(whole.request, whole.options, 1)
    got = []

    def run(lists: list[list[str]]) -> int:
        got.extend(lists)
        (folder / "x").mkdir()
        (folder / "x" / "output_video.mp4").touch()
        return 0

    assert launch_jobs.run_many(jobs, whole.options, whole.lists, run) == 3
    assert [words[-1] for words in got] == [f"--jobs={folder}/queue.jsonl"] * 3
    queue = [json.loads(line) for line in (folder / "queue.jsonl").read_text().splitlines()]
    assert queue == [{"name": "a-cat", "prompt": "a cat"}, {"name": "x", "video_length": 9}]
    told = capfd.readouterr()
    assert told.out == f"{folder}/x/output_video.mp4\n"
    bad = "jobs.jsonl:2 fps 0 is outside 1 to 240"
    assert told.err == f"left out: {bad}\nnot a job: {bad}\n"


def test_where_no_job_is_good_nothing_starts(tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text("a\nb\n")
    whole = read_whole_run(["--jobs", str(file)])
    with pytest.raises(InputError, match=r"no job is good: jobs.jsonl:1 is not JSON .* \(and 1 more\)"):
        launch_jobs.jobs_of_run(whole.request, whole.options, 1)


def test_groups_must_divide_the_processes():
    options = check_flags(STAGES[1], ["--seeds=1-4", "--gpus_per_job=3"])
    with pytest.raises(InputError, match="--gpus_per_job 3 does not divide the run's 4 processes"):
        launch_jobs.check_groups(options, 4)
    launch_jobs.check_groups(options, 6)


def test_the_runs_own_list_is_not_cut(tmp_path):
    """Its bad lines would be lost."""
    queue = tmp_path / "queue.jsonl"
    queue.write_text('{"name": "x"}\nnonsense\n')
    whole = read_whole_run(["--jobs", str(queue), "--output_dir", str(tmp_path)])
    with pytest.raises(InputError, match="is where this run writes its jobs; give the file another name"):
        launch_jobs.jobs_of_run(whole.request, whole.options, 1)
    assert Path(queue).read_text().endswith("nonsense\n")
