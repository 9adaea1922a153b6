"""Many videos by one command: the bits of single runs, whatever fails or ends on the way."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from folders import denoised, embed
from forked import Forked, Moment, run_ranks, run_stage

from hunyuan_staged.files import contract
from hunyuan_staged.files.config import read_config
from hunyuan_staged.files.tensors import load_latents, load_state
from hunyuan_staged.jobs.names import slug

STEPS = 4
SMALL = ["--video_length", 5, "--num_inference_steps", STEPS]
STEP = "hunyuan_staged.sampling.loop.euler_step"


def latents(folder: Path) -> torch.Tensor:
    return load_latents(folder)[0]


def failure(folder: Path) -> dict:
    return json.loads((folder / contract.FAILURE_FILE).read_text())


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, tiny_official) -> Path:
    """A folder as stage 1 leaves it."""
    return embed(tmp_path_factory.mktemp("embedded"), tiny_official)


@pytest.fixture(scope="module")
def single(tmp_path_factory, embedded) -> dict[int, torch.Tensor]:
    """The latents of each seed, each from a run of its own."""
    found = {}
    for seed in (1, 2, 3, 4):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        args = ["--input_dir", embedded, "--output_dir", folder, "--seed", seed, *SMALL]
        status, said = run_stage(2, *args, said=folder / "said")
        assert status == 0, said
        found[seed] = latents(folder)
    return found


@pytest.fixture
def runs(tmp_path, embedded) -> Path:
    """A folder with three jobs, whose stage 1 is done, and their file."""
    folder = tmp_path / "runs"
    lines = []
    for name, seed in (("one", 1), ("two", 2), ("three", 3)):
        shutil.copytree(embedded, folder / name)
        lines.append(json.dumps({"name": name, "seed": seed}))
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def stage2(runs: Path, *more: object, moment: Moment | None = None) -> tuple[int, str]:
    args = ["--jobs", runs.parent / "jobs.jsonl", "--input_dir", runs, *SMALL, *more]
    return run_stage(2, *args, said=runs.parent / "said", moment=moment)


def check(runs: Path, single: dict[int, torch.Tensor], *, names: tuple[str, ...] = ("one", "two", "three")) -> None:
    """Each job has the bits of its own run, and nothing is left over."""
    for seed, name in enumerate(("one", "two", "three"), 1):
        if name in names:
            assert torch.equal(latents(runs / name), single[seed])
            assert read_config(runs / name)["seed"] == seed
            left = {contract.STATE_FILE, contract.LOCK_FILE, contract.FAILURE_FILE}
            assert not left & {path.name for path in (runs / name).iterdir()}


def test_each_job_has_the_bits_of_its_own_run_and_is_made_once(runs, single):
    status, said = stage2(runs)
    assert status == 0, said
    assert said.count("loading transformer: 100%") == 1
    assert "3 of 3 jobs without a failure" in said
    check(runs, single)
    written = {name: (runs / name / contract.LATENTS_FILE).stat().st_mtime_ns for name in ("one", "two", "three")}
    status, said = stage2(runs)
    assert status == 0 and said.count(": already done") == 3 and "loading" not in said
    assert written == {name: (runs / name / contract.LATENTS_FILE).stat().st_mtime_ns for name in written}
    # Other settings are another video: the job is not done.
    status, said = stage2(runs, "--guidance_scale", 1)
    assert status == 0 and said.count(": done") == 3
    assert not torch.equal(latents(runs / "one"), single[1])


def test_a_job_that_fails_is_recorded_and_the_others_go_on(runs, single):
    good = (runs / "two" / contract.EMBEDDINGS_FILE).read_bytes()
    (runs / "two" / contract.EMBEDDINGS_FILE).write_bytes(good[:1000])
    with (runs.parent / "jobs.jsonl").open("a") as file:
        file.write('{"name": "four", "video_length": 6}\nnonsense\n')
    status, said = stage2(runs)
    assert status == 3, said
    assert "jobs.jsonl:4 video_length 6 is not 4n+1; the nearest are 5 and 9" in said
    assert "jobs.jsonl:5 is not JSON" in said
    assert f"two: failed: {runs}/two/stage1_embeddings.safetensors is not a whole safetensors file" in said
    assert "2 of 5 jobs without a failure" in said
    assert failure(runs / "two")["stage"] == 2 and "\n" not in failure(runs / "two")["error"]
    check(runs, single, names=("one", "three"))
    (runs / "two" / contract.EMBEDDINGS_FILE).write_bytes(good)
    status, said = stage2(runs)
    assert status == 3 and "3 of 5 jobs without a failure" in said
    check(runs, single)


def test_a_fault_of_ours_ends_its_job_alone(runs, single):
    status, said = stage2(runs, moment=Moment(STEP, STEPS + 1, (), fails=True))
    assert status == 3, said
    assert "Traceback" in said
    assert failure(runs / "two") == {"stage": 2, "error": "ZeroDivisionError: ours"}
    check(runs, single, names=("one", "three"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_the_same_command_goes_on_after_any_end(runs, single, number, status):
    moment = Moment(STEP, STEPS + 3, (number,))
    code, said = stage2(runs, "--checkpoint_every", 1, moment=moment)
    assert code == status, said
    assert (runs / "one" / contract.LATENTS_FILE).exists() and (runs / "two" / contract.STATE_FILE).exists()
    code, said = stage2(runs, "--checkpoint_every", 1)
    assert code == 0, said
    assert "one: already done" in said and "going on after step" in said
    check(runs, single)


def test_a_draft_is_stopped_and_finished_to_the_same_bits(runs, single):
    for _ in range(2):  # a draft that is there is not made again
        status, said = stage2(runs, "--stop_after", 2)
        assert status == 0, said
        assert said.count(f"stopped after step 2 of {STEPS}") == 3
        assert not (runs / "one" / contract.LATENTS_FILE).exists()
        assert load_state(runs / "one")[1]["step"] == "2"
    assert "loading" not in said
    only = runs.parent / "jobs.jsonl"
    only.write_text('{"name": "two", "seed": 2}\n')
    status, said = stage2(runs, "--resume")
    assert status == 0 and "going on after step 2" in said
    check(runs, single, names=("two",))
    assert not (runs / "one" / contract.LATENTS_FILE).exists()


def test_one_draft_is_stopped_and_finished_to_the_same_bits(tmp_path, embedded, single):
    args = ["--input_dir", embedded, "--output_dir", tmp_path / "out", "--seed", 1, *SMALL]
    status, said = run_stage(2, *args, "--stop_after", 2, "--checkpoint_every", 0, said=tmp_path / "said")
    assert status == 0, said
    assert f"stopped after step 2 of {STEPS}; with --resume and without --stop_after the same command goes on" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {contract.STATE_FILE}
    assert run_stage(2, *args, "--resume", said=tmp_path / "said")[0] == 0
    assert torch.equal(latents(tmp_path / "out"), single[1])


def test_a_draft_of_all_steps_is_told_to_be_none(tmp_path, embedded, single):
    """A whole run ended with finished latents and no video, and no line said why."""
    args = ["--input_dir", embedded, "--output_dir", tmp_path / "out", "--seed", 1, *SMALL]
    status, said = run_stage(2, *args, "--stop_after", STEPS, said=tmp_path / "said")
    told = (
        f"--stop_after {STEPS} is not below this run's {STEPS} steps: it is no draft, its latents will be finished; with "
        "--resume and without --stop_after the same command decodes them"
    )
    assert status == 0 and said.count(told) == 1, said
    assert torch.equal(latents(tmp_path / "out"), single[1])


def test_a_state_of_other_settings_is_not_gone_on_from(runs, single):
    assert stage2(runs, "--stop_after", 2, "--guidance_scale", 1)[0] == 0
    status, said = stage2(runs)
    assert status == 0 and "starting from the beginning" in said
    check(runs, single)


def test_seeds_make_many_videos_of_one_folder(tmp_path, embedded, single):
    args = ["--seeds", "1,3", "--input_dir", embedded, "--output_dir", tmp_path / "runs", *SMALL]
    status, said = run_stage(2, *args, said=tmp_path / "said")
    assert status == 0, said
    for seed in (1, 3):
        assert torch.equal(latents(tmp_path / "runs" / f"seed{seed}"), single[seed])
        assert read_config(tmp_path / "runs" / f"seed{seed}")["prompt"] == "a"


def test_groups_draw_from_one_list(runs, single):
    ranks = run_ranks(
        2,
        4,
        "--jobs",
        runs.parent / "jobs.jsonl",
        "--input_dir",
        runs,
        "--gpus_per_job",
        2,
        *SMALL,
        said=runs.parent / "said",
    )
    assert [rank.status() for rank in ranks] == [0] * 4, [rank.said() for rank in ranks]
    first, second = ranks[0].said(), ranks[2].said()
    assert "2 groups of 2 of the 4 processes: as asked for" in first
    assert "[2 of 2] job " in second and "3 of 3 jobs without a failure" in first
    for seed, name in enumerate(("one", "two", "three"), 1):
        assert f"job {name}" in first + second
        # Sums over guidance branches are in the same order: one branch each.
        torch.testing.assert_close(latents(runs / name), single[seed], rtol=1e-4, atol=1e-4)


def test_a_job_that_fails_on_one_process_of_a_group_ends_on_all(runs, single):
    (runs / "one" / contract.STATE_FILE).write_text("none")  # the first process alone reads it
    ranks = run_ranks(
        2,
        2,
        "--jobs",
        runs.parent / "jobs.jsonl",
        "--input_dir",
        runs,
        "--gpus_per_job",
        2,
        "--resume",
        *SMALL,
        said=runs.parent / "said",
    )
    assert [rank.status() for rank in ranks] == [3] * 2, [rank.said() for rank in ranks]
    assert "one: failed: " in ranks[0].said() and "2 of 3 jobs without a failure" in ranks[0].said()
    assert "is not a whole safetensors file" in failure(runs / "one")["error"]
    torch.testing.assert_close(latents(runs / "three"), single[3], rtol=1e-4, atol=1e-4)


def test_groups_that_do_not_divide_the_processes_are_refused(runs):
    status, said = stage2(runs, "--gpus_per_job", 2)
    assert status == 2
    assert said.splitlines()[-1] == "error: --gpus_per_job 2 does not divide the run's 1 processes"


def wait_for(path: Path, worker: Forked) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert worker.process.is_alive() and time.monotonic() < deadline, worker.said()
        time.sleep(0.05)


def test_a_watched_folder(tmp_path, embedded, single):
    """Two workers share it; each job is made once; a bad one is recorded; SIGTERM ends them."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copytree(embedded, folder / "one")
    (folder / "one" / contract.JOB_FILE).write_text('{"seed": 1}')
    shutil.copytree(embedded, folder / "bad")
    (folder / "bad" / contract.JOB_FILE).write_text('{"video_length": 6}')
    workers = [Forked(2, "--watch", folder, *SMALL, said=tmp_path / f"said{number}") for number in range(2)]
    wait_for(folder / "one" / contract.LATENTS_FILE, workers[0])
    wait_for(folder / "bad" / contract.FAILURE_FILE, workers[0])
    shutil.copytree(embedded, tmp_path / "two")
    (tmp_path / "two" / contract.JOB_FILE).write_text('{"seed": 2}')
    (tmp_path / "two").rename(folder / "two")
    wait_for(folder / "two" / contract.LATENTS_FILE, workers[0])
    while any((folder / name / contract.LOCK_FILE).exists() for name in ("one", "two")):
        time.sleep(0.05)
    for worker in workers:
        worker.process.terminate()
    assert [worker.status() for worker in workers] == [143, 143]
    said = workers[0].said() + workers[1].said()
    assert "bad: failed: " in said and "video_length 6 is not 4n+1" in failure(folder / "bad")["error"]
    assert said.count("one: done") == said.count("two: done") == 1
    assert torch.equal(latents(folder / "one"), single[1]) and torch.equal(latents(folder / "two"), single[2])


def test_a_worker_finishes_its_step_and_leaves_and_another_goes_on(tmp_path, embedded, single):
    folder = tmp_path / "runs"
    shutil.copytree(embedded, folder / "one")
    (folder / "one" / contract.JOB_FILE).write_text('{"seed": 1}')
    moment = Moment(STEP, 2, (signal.SIGTERM,))
    status, said = run_stage(2, "--watch", folder, *SMALL, said=tmp_path / "said", moment=moment)
    assert status == 143, said
    left = {path.name for path in (folder / "one").iterdir()}
    assert load_state(folder / "one")[1]["step"] == "2" and contract.LOCK_FILE not in left
    worker = Forked(2, "--watch", folder, *SMALL, said=tmp_path / "said")
    wait_for(folder / "one" / contract.LATENTS_FILE, worker)
    while (folder / "one" / contract.LOCK_FILE).exists():
        time.sleep(0.05)
    worker.process.terminate()
    assert worker.status() == 143 and "going on after step 2 of 4" in worker.said()
    assert torch.equal(latents(folder / "one"), single[1])


def test_prompts_make_many_videos_and_one_load(tmp_path, tiny_official):
    """Stages 1 and 3: the files of single runs, and nothing twice."""
    prompts = ["a red circle", 'a sign that says "7"']
    both = [word for prompt in prompts for word in ("--prompt", prompt)]
    args = ["--model_path", tiny_official, "--output_dir", tmp_path / "runs", *both]
    status, said = run_stage(1, *args, said=tmp_path / "said")
    assert status == 0, said
    assert said.count("loading text encoder: 100%") == 1 and "2 of 2 jobs without a failure" in said
    names = [slug(prompt) for prompt in prompts]
    for name, prompt in zip(names, prompts, strict=True):
        one = ["--model_path", tiny_official, "--output_dir", tmp_path / "one", "--prompt", prompt]
        assert run_stage(1, *one, said=tmp_path / "said")[0] == 0
        for file in (contract.EMBEDDINGS_FILE, contract.CONFIG_FILE):
            assert (tmp_path / "runs" / name / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
        assert json.loads((tmp_path / "runs" / name / contract.JOB_FILE).read_text()) == {
            "name": name,
            "prompt": prompt,
        }
    status, said = run_stage(1, *args, said=tmp_path / "said")
    assert status == 0 and said.count(": already done") == 2 and "loading" not in said


def test_stage_3_makes_each_video_once(tmp_path, tiny_official):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("name\none\ntwo\nthree\n")
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        denoised(tmp_path / "runs" / name, tiny_official)
    args = ["--jobs", jobs, "--input_dir", tmp_path / "runs"]
    status, said = run_stage(3, *args, said=tmp_path / "said")
    assert status == 3, said
    assert said.count("loading VAE decoder: 100%") == 1 and "2 of 3 jobs without a failure" in said
    assert "three: failed: " in said and "does not exist; run stage2_transformer.py first" in said
    videos = [tmp_path / "runs" / name / contract.VIDEO_FILE for name in ("one", "two")]
    assert [line for line in said.splitlines() if line.endswith("mp4")] == [str(video) for video in videos]
    denoised(tmp_path / "single", tiny_official)
    assert run_stage(3, "--input_dir", tmp_path / "single", said=tmp_path / "said")[0] == 0
    assert videos[0].read_bytes() == (tmp_path / "single" / contract.VIDEO_FILE).read_bytes()
    status, said = run_stage(3, *args, said=tmp_path / "said")
    assert said.count(": already done") == 2 and "loading" not in said
    status, said = run_stage(3, *args, "--crf", 30, said=tmp_path / "said")
    assert said.count(": done") == 2
