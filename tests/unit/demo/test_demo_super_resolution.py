"""Super resolution of the checkpoint that ships: what was measured, one clip of each kind, and the scripts."""

import json
import random
import subprocess

import pytest
import torch
from conftest import ROOT

from hunyuan_staged.demo import CHECKPOINT, evaluate, scenes, super_resolution
from hunyuan_staged.files import contract, video

CPU = torch.device("cpu")
FRAMES = 5


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads(super_resolution.SCORES.read_text(encoding="utf-8"))


def test_the_scores_are_of_twenty_clips_and_1_5_db_over_interpolation(measured):
    assert (measured["clips"], measured["frames"], len(measured["gains"])) == (20, scenes.FRAMES, 20)
    gain = measured["all"]["super_resolution"] - measured["all"]["bicubic"]
    assert gain >= 1.5
    assert sum(measured["gains"]) / 20 == pytest.approx(gain, abs=0.02)


def test_the_page_shows_the_scores(measured):
    page = (ROOT / "docs" / "super_resolution.md").read_text(encoding="utf-8")
    for name in ("bicubic", "super_resolution", "decoded_large"):
        numbers = " | ".join(f"{measured[kind][name]:.2f}" for kind in ("all", "shapes", "cards"))
        assert f"| {numbers} |" in page


def test_its_parts_have_12_mb_at_most():
    parts = list(CHECKPOINT.glob("*/demo_hd_sr_distilled/*"))
    assert len(parts) == 4
    assert sum(path.stat().st_size for path in parts) < 12e6


def test_clips_that_are_held_out_are_enlarged_as_well_as_measured(measured):
    """The first of shapes and the first of cards, of fewer frames than were measured."""
    choices = random.Random(f"{evaluate.SEED}/{super_resolution.RESOLUTION}")
    teacher = super_resolution.Teacher(CHECKPOINT, CPU)
    enlarger = super_resolution.build(CPU, trained=CHECKPOINT).eval().requires_grad_(False)
    for number in range(2):
        scene = scenes.draw_scene(choices, held_out=True)
        prompt = scenes.describe(scene, choices, scenes.FIRST)
        assert bool(scene.word) == bool(number)
        clips = super_resolution.compare(enlarger, teacher, scene, prompt, evaluate.SEED + number, FRAMES)
        made, interpolated = (
            super_resolution.psnr(clips[name], clips["large"]) for name in ("super_resolution", "bicubic")
        )
        assert made - interpolated > measured["gains"][number] - 1


def test_a_whole_run_enlarges_its_video(tmp_path):
    """As a user calls it; few steps, so the base video shows nothing yet, and the larger one is the same picture."""
    words = ["--prompt", "a red circle moves left over a dark blue background", "--output_dir", tmp_path]
    words += ["--super_resolution", "demo_hd", "--video_length", FRAMES, "--num_inference_steps", 8]
    command = ["bash", ROOT / "run_staged.sh", *words]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    path = tmp_path / contract.at_resolution(contract.VIDEO_FILE, "demo_hd")
    assert result.stdout == f"{path}\n"
    large, fps = video.read_video(path)
    assert (large.shape, fps) == ((FRAMES, 2 * scenes.HEIGHT, 2 * scenes.WIDTH, 3), 24)
    command = ["bash", ROOT / "run_stage3.sh", "--input_dir", tmp_path, "--latents", "base"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    small, _ = video.read_video(tmp_path / contract.VIDEO_FILE)
    base, larger = (torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1 for frames in (small, large))
    assert super_resolution.psnr(super_resolution.bicubic(base), larger) > 25
