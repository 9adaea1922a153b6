"""A cluster on this machine: whatever dies, all jobs end with the bits of single runs."""

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forked import run_ranks, run_stage

from hunyuan_staged.files import contract
from hunyuan_staged.files.tensors import load_latents, load_state

PROMPTS = ("a red circle", "a blue star grows", "two squares", "a green triangle moves left")
SEEDS = 6
STEPS = 3
SMALL = ["--video_length", "5", "--num_inference_steps", str(STEPS), "--checkpoint_every", "1"]
END = 300.0  # seconds that a run may take


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name: Ray makes sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """24 jobs, and a line that is none."""
    file = tmp_path_factory.mktemp("jobs") / "jobs.jsonl"
    lines = [json.dumps({"prompt": prompt, "seed": seed}) for prompt in PROMPTS for seed in range(SEEDS)]
    file.write_text("\n".join([*lines, '{"seed": "one"}']) + "\n")
    return file


@pytest.fixture(scope="module")
def single(tmp_path_factory, jobs, tiny_official) -> Path:
    """What the stages make of the jobs, one after the other."""
    folder = tmp_path_factory.mktemp("single")
    said = folder / "said"
    status, text = run_stage(1, "--jobs", jobs, "--output_dir", folder, "--model_path", tiny_official, said=said)
    assert status == 3, text
    asked = ("--jobs", jobs, "--input_dir", folder)
    ranks = run_ranks(2, 2, *asked, "--gpus_per_job", 2, *SMALL, said=said)
    assert [rank.status() for rank in ranks] == [3, 3], ranks[0].said()
    status, text = run_stage(3, *asked, said=said)
    assert status == 3, text
    return folder


def cluster(place: Path, jobs: Path, model: Path, *more: str) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a cluster of CPU actors, two processes a denoiser."""
    command = [sys.executable, "-m", "hunyuan_staged.cluster", "--jobs", str(jobs), "--output_dir", str(place / "runs")]
    command += [
        "--model_path",
        str(model),
        "--denoisers",
        "2",
        "--gpus_per_denoiser",
        "0",
        "--processes_per_denoiser",
        "2",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support" / "killing")])
    # Ray keeps a token in the user's home where it is given none.
    token = place / "token"
    token.write_text(secrets.token_hex(32))
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment |= {"RAY_TMPDIR": str(place), "KILLS": str(place), "PYTHONPATH": path}
    with subprocess.Popen(
        [*command, *SMALL, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        (place / "driver").write_text(str(process.pid))
        out, err = process.communicate(timeout=END)
    return process.returncode, out, err


def left_over(place: Path) -> list[str]:
    """The processes that work below a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            found += [words] if str(place) in words else []
    return found


def test_killed_actors_and_an_end_by_sigterm_change_no_bit(place, jobs, single, tiny_official):
    draw = random.Random(23)
    steps = draw.sample(range(8, len(PROMPTS) * SEEDS * STEPS), 3)
    kills = {
        "euler_step": {"5": "driver"} | dict(zip(map(str, steps), ("actor", "process", "actor"), strict=True)),
        "check_earlier 1": {str(draw.randint(12, 24)): "actor"},
        "check_earlier 3": {str(draw.randint(6, 24)): "process"},
    }
    (place / "kills.json").write_text(json.dumps(kills))
    status, out, err = cluster(place, jobs, tiny_official)
    assert status == 128 + signal.SIGTERM, err
    assert err.splitlines()[-1] == "error: the run was interrupted by SIGTERM; run the same command again"
    runs = place / "runs"
    states = [state.parent for state in runs.glob(f"*/{contract.STATE_FILE}")]
    assert states and all(0 < int(load_state(folder)[1]["step"]) <= STEPS for folder in states)
    assert left_over(place) == []

    status, out, err = cluster(place, jobs, tiny_official)
    assert status == 3, err
    assert err.count("goes on elsewhere") == 5
    assert "jobs.jsonl:25 seed 'one' is not a whole number" in err
    assert "24 of 25 jobs without a failure" in err
    folders = sorted(path.parent for path in single.glob(f"*/{contract.VIDEO_FILE}"))
    assert len(folders) == len(PROMPTS) * SEEDS
    assert sorted(out.split()) == [str(runs / folder.name / contract.VIDEO_FILE) for folder in folders]
    for folder in folders:
        made = runs / folder.name
        assert torch.equal(load_latents(made)[0], load_latents(folder)[0])
        assert (made / contract.VIDEO_FILE).read_bytes() == (folder / contract.VIDEO_FILE).read_bytes()
        assert {path.name for path in made.iterdir()} == {path.name for path in folder.iterdir()}
    logs = "".join(log.read_text() for log in (runs / ".cluster").iterdir())
    assert "going on after step" in logs
    assert left_over(place) == []
