"""--dry_run of many videos: one plan of all, by run_staged.sh and by a stage; nothing is written."""

import json
import re
import shutil
from pathlib import Path

import pytest
from folders import denoised, embed
from forked import run_ranks, run_stage

import utils
from hunyuan_staged import launch_jobs
from hunyuan_staged.pipeline.forecast_jobs import in_groups
from hunyuan_staged.stage_flags import read_whole_run

SMALL = ["--video_length", "5", "--num_inference_steps", "4"]
JOBS = (
    {"name": "one", "prompt": "a", "seed": 1},
    {"name": "two", "prompt": "b", "seed": 2, "video_length": 9},
    {"name": "three", "prompt": "c", "seed": 3},
)


def plans(printed: str) -> dict[str, dict[str, str]]:
    """The rows of each plan, by its title."""
    parts = re.split(r"(?m)^(stage \d: .*|all videos)\n", printed)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return {title: dict(re.findall(r"(?m)^([a-z ]+?)  +(\S.*)$", rows)) for title, rows in found}


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.fixture
def jobs(tmp_path) -> Path:
    file = tmp_path / "jobs.jsonl"
    file.write_text("".join(f"{json.dumps(job)}\n" for job in JOBS))
    return file


@pytest.fixture
def plan_run(capfd, jobs, tmp_path):
    """What a whole run prints (its plan, what it warns of) and its status; nothing is written."""

    def plan(*flags: object, gpus: int = 1) -> tuple[dict[str, dict[str, str]], str, int]:
        before = files(tmp_path)
        argv = ["--dry_run", "--jobs", str(jobs), "--output_dir", str(tmp_path / "runs"), *SMALL, *map(str, flags)]
        whole = read_whole_run(argv)
        found = launch_jobs.jobs_of_run(whole.request, whole.options, gpus)

        def run(lists: list[list[str]]) -> int:
            return utils.plan_script([str(gpus), *map(json.dumps, lists[: len(whole.numbers)])])

        status = launch_jobs.run_many(found, whole.options, whole.lists, run)
        told = capfd.readouterr()
        assert files(tmp_path) == before
        return plans(told.out), told.err, status

    return plan


def test_a_whole_run_has_one_plan_of_all_jobs(plan_run, tiny_official):
    found, _, status = plan_run("--model_path", tiny_official)
    assert status == 0
    assert list(found) == [
        *("stage 1: prompt → embeddings", "stage 2: embeddings → latents", "stage 3: latents → video", "all videos")
    ]
    assert {rows["jobs"] for rows in found.values()} == {"3: 0 done, 3 to make"}
    for title in list(found)[1:3]:
        assert found[title]["videos"] == "2 of 160x96, 5 frames; 1 of 160x96, 9 frames"
        assert found[title]["groups"] == "1 of 1 process, a video each at a time"
    assert found["stage 3: latents → video"]["memory"].endswith(" at most, of two")
    assert "groups" not in found["stage 1: prompt → embeddings"]
    assert found["all videos"]["time"].endswith("(an estimate); loading the weights and starting up come on top")


def test_groups_of_gpus_divide_the_time(plan_run, jobs):
    """Of a step that was measured: four videos by one GPU, by four at once, and two by two."""
    jobs.write_text("".join(f'{{"prompt": "{word}"}}\n' for word in "abcd"))
    flags = ["--assume_gpu", "H100", "--transformer_version", "720p_t2v", "--video_length", 121]
    flags += ["--num_inference_steps", 50]
    second = "stage 2: embeddings → latents"
    one, four, pairs = (
        plan_run(*flags, *more, gpus=gpus)[0][second] for gpus, more in ((1, ()), (4, ()), (4, ("--gpus_per_job", 2)))
    )
    assert four["expected time"] == "15.2 min (measured)" and four["groups"].startswith("4 of 1 process, ")
    assert one["expected time"] == "61.0 min (measured)" and one["groups"].startswith("1 of 1 process, ")
    assert pairs["groups"].startswith("2 of 2 processes, ")
    assert re.fullmatch(r"1\d\.\d GiB at most, of a", one["memory"])
    assert one["free"] == "GPU 79.2 GiB, host 64.0 GiB (assumed)"


def test_what_is_done_is_not_planned_again(tmp_path, jobs, tiny_official):
    """Stage 2 by what lies in the folders: one job done, one of other settings, one without embeddings."""
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        embed(runs / name, tiny_official)
    args = ["--jobs", jobs, "--input_dir", runs, *SMALL]
    shutil.copy(jobs, tmp_path / "one.jsonl")
    (tmp_path / "one.jsonl").write_text(jobs.read_text().splitlines()[0])
    status, said = run_stage(2, "--jobs", tmp_path / "one.jsonl", "--input_dir", runs, *SMALL, said=tmp_path / "said")
    assert status == 0, said
    before = files(runs)
    status, said = run_stage(2, *args, "--dry_run", "--model_path", tiny_official, said=tmp_path / "said")
    assert status == 0, said
    found = plans(said)["stage 2: embeddings → latents"]
    assert found["jobs"] == "3: 1 done, 2 to make"
    assert found["videos"] == "1 of 160x96, 9 frames; 1 of 160x96, 5 frames"
    status, said = run_stage(2, *args, "--dry_run", "--num_inference_steps", 3, said=tmp_path / "said")
    assert "3: 0 done, " in said, "other settings are to be made anew"
    assert files(runs) == before


def test_steps_of_drafts_are_not_counted_again(plan_run, tmp_path, jobs, tiny_official):
    """Jobs go on from their states without --resume, too; a whole run, where their embeddings are of their prompts."""
    runs, second = tmp_path / "runs", "stage 2: embeddings → latents"
    assert (
        run_stage(1, "--model_path", tiny_official, "--jobs", jobs, "--output_dir", runs, said=tmp_path / "said")[0]
        == 0
    )
    lines = jobs.read_text()
    jobs.write_text("\n".join(lines.splitlines()[:2]))
    args = ["--jobs", jobs, "--input_dir", runs, *SMALL]
    assert run_stage(2, *args, "--stop_after", 3, said=tmp_path / "said")[0] == 0
    jobs.write_text(lines)
    status, said = run_stage(2, *args, "--dry_run", said=tmp_path / "said")
    assert status == 0 and plans(said)[second]["steps"] == "6 done already", said
    found = plan_run("--model_path", tiny_official)[0][second]
    assert (found["jobs"], found["steps"]) == ("3: 0 done, 3 to make", "6 done already")
    assert "steps" not in plan_run("--model_path", tiny_official, "--guidance_scale", 1)[0][second], "of other settings"
    jobs.write_text(lines.replace('"prompt": "a"', '"prompt": "d"'))
    assert plan_run("--model_path", tiny_official)[0][second]["steps"] == "3 done already"
    told = plan_run("--model_path", tiny_official, "--guidance_scale", 1, "--resume")[1]
    assert "cannot be made: two: " in told and "belongs to other settings: guidance_scale: was 6.0, now 1.0" in told


def test_stage_3_knows_its_videos(tmp_path, tiny_official):
    jobs, runs = tmp_path / "jobs.csv", tmp_path / "runs"
    jobs.write_text("name\none\ntwo\n")
    for name in ("one", "two"):
        (runs / name).mkdir(parents=True)
        denoised(runs / name, tiny_official)
    args = ["--jobs", jobs, "--input_dir", runs]
    status, said = run_stage(3, *args, "--dry_run", said=tmp_path / "said")
    assert status == 0 and plans(said)["stage 3: latents → video"]["jobs"] == "2: 0 done, 2 to make", said
    assert run_stage(3, *args, said=tmp_path / "said")[0] == 0
    status, said = run_stage(3, *args, "--dry_run", said=tmp_path / "said")
    assert plans(said) == {"stage 3: latents → video": {"jobs": "2: 2 done, 0 to make"}}
    (runs / "two" / "output_video.mp4").unlink()
    status, said = run_stage(3, *args, "--dry_run", said=tmp_path / "said")
    assert plans(said)["stage 3: latents → video"]["jobs"] == "2: 1 done, 1 to make"


def test_several_processes_print_one_plan(tmp_path, jobs, tiny_official):
    for name in ("one", "two", "three"):
        embed(tmp_path / "runs" / name, tiny_official)
    ranks = run_ranks(
        2, 2, "--jobs", jobs, "--input_dir", tmp_path / "runs", *SMALL, "--dry_run", said=tmp_path / "said"
    )
    assert [rank.status() for rank in ranks] == [0, 0]
    first, second = (rank.said() for rank in ranks)
    assert plans(first)["stage 2: embeddings → latents"]["groups"] == "1 of 2 processes, a video each at a time"
    assert plans(second) == {}


def test_jobs_that_cannot_be_made_are_named_with_the_reason(plan_run, jobs, tmp_path):
    jobs.write_text('{"name": "good", "prompt": "a"}\n{"fps": 0}\n')
    found, said, status = plan_run("--assume_gpu", "0.9")
    assert status == 3
    assert re.search(r"cannot be made: good: .* needs ", said) and "left out: jobs.jsonl:2 fps 0 is outside" in said
    assert found["all videos"] == {"jobs": "1: 0 done, 0 to make, 1 cannot be made"}


def test_a_draft_is_planned_up_to_its_last_step(plan_run, jobs):
    jobs.write_text('{"prompt": "a"}\n')
    flags = ["--assume_gpu", "H100", "--transformer_version", "720p_t2v", "--video_length", 121]
    found = plan_run(*flags, "--num_inference_steps", 50, "--stop_after", 5)[0]
    assert list(found) == ["stage 1: prompt → embeddings", "stage 2: embeddings → latents", "all videos"]
    assert found["stage 2: embeddings → latents"]["expected time"] == "1.8 min (measured)"  # the first step compiles


@pytest.mark.parametrize(
    ("durations", "count", "expected"),
    [
        ([], 2, 0.0),
        ([1.0, 2.0, 3.0], 1, 6.0),
        ([3.0, 1.0, 1.0, 1.0], 2, 3.0),
        ([1.0, 1.0, 4.0], 2, 5.0),
        ([2.0], 4, 2.0),
    ],
)
def test_groups_draw_one_job_after_the_other(durations, count, expected):
    assert in_groups(durations, count) == expected
