"""bench checkpoint and bench run, as a user calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def bench(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hunyuan_staged.bench", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_run_on_a_drawn_checkpoint(tmp_path: Path):
    drawn = bench("checkpoint", tmp_path / "model", "--size", "tiny", "--version", "demo_t2v", "--dtype", "float32")
    assert drawn.returncode == 0, drawn.stderr
    assert json.loads(drawn.stdout.splitlines()[-1])["dtype"] == "float32"
    small = ["--video_length", 5, "--num_inference_steps", 3]
    where = ["--model_path", tmp_path / "model", "--output_dir", tmp_path / "run"]
    result = bench("run", "--prompt", 'a card with the letters "AB"', *where, *small)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "output_video.mp4").stat().st_size
    (run,) = json.loads(result.stdout.splitlines()[-1])["runs"]
    assert [stage["stage"] for stage in run["stages"]] == ["stage 1", "stage 2", "stage 3"]
    # The later two get ready before their turn.
    assert [stage["ready"] is None for stage in run["stages"]] == [True, False, False]
    assert all(stage["load"] > 0 and stage["work"] > 0 for stage in run["stages"])
    assert run["stages"][1]["step"] > 0
    exclusive = ("until_turn", "begin", "prepare", "load", "first_extra", "work", "rest")
    total = sum(stage[name] for stage in run["stages"] for name in exclusive) + run["end"]
    assert abs(total - run["wall"]) < 0.1  # rounding
    assert abs(run["startup"] + run["work"] - run["wall"]) < 0.1


def test_a_run_that_fails_has_said_why(tmp_path: Path):
    result = bench("run", "--model_path", tmp_path, "--prompt", "a cat")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: run_staged.sh ended with status 2"
