"""The benchmarks' command line."""

import json
import sys

import pytest

from hunyuan_staged.bench import command
from hunyuan_staged.bench.step import asked_run
from hunyuan_staged.files.video import read_video
from hunyuan_staged.sampling.schedule import flow_sigmas


@pytest.mark.parametrize(("stage", "flag"), [("stage2", "layers"), ("stage3", "channels"), ("encoding", "channels")])
def test_the_full_size_model_on_a_cpu_is_refused(monkeypatch, capsys, stage, flag):
    """It filled the memory until the kernel ended it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", stage])
    assert command.main() == 2
    assert capsys.readouterr().err == (
        f"error: bench {stage} measures the full-size model and needs a GPU; --{flag} makes a smaller one\n"
    )


@pytest.mark.parametrize(
    ("words", "size", "tokens", "steps"),
    [
        (["--super_resolution", "720p"], (720, 1280), 111_600, 6),
        (["--super_resolution", "1080p"], (1072, 1904), 247_163, 8),
        (["--super_resolution", "1080p", "--resolution", "720p", "--aspect_ratio", "1:1"], (1440, 1440), 251_100, 8),
    ],
)
def test_super_resolution_has_its_size_steps_and_guidance(words, size, tokens, steps):
    run = asked_run(command.build_parser().parse_args(["stage2", *words]))
    assert (run.height, run.width) == size
    assert run.shape[2] * run.shape[3] * run.shape[4] == tokens
    assert (run.branches, len(run.sigmas) - 1) == (1, steps)
    assert run.sigmas.tolist() == flow_sigmas(steps, 2.0).tolist()


def test_a_base_run_is_a_guided_step_of_720p():
    run = asked_run(command.build_parser().parse_args(["stage2"]))
    assert (run.height, run.width, run.video_length, run.branches) == (720, 1280, 121, 2)
    assert run.sigmas.tolist() == [1.0, 0.0] and run.enlarges is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resolution", "480p"], "--resolution 480p: 1080p_sr_distilled enlarges 720p"),
        (["--cache_type", "teacache"], "--cache_type teacache: super resolution takes no cache"),
    ],
)
def test_what_super_resolution_does_not_take(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["bench", "stage2", "--layers", "1", "--super_resolution", "1080p", *words])
    assert command.main() == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_super_resolution_is_timed_with_its_upsampler_and_a_share(monkeypatch, capsys):
    words = "stage2 --super_resolution demo_hd --layers 1 --video_length 1 --steps 1 --share_of 2"
    monkeypatch.setattr(sys, "argv", ["bench", *words.split(), "--attn_mode", "torch"])
    assert command.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["resolution"], result["tokens"], result["guidance_branches"]) == ("320x192", 12 * 20 + 256, 1)
    assert (result["super_resolution"], result["passes"]) == ("demo_hd_sr_distilled", 6)
    assert result["run_seconds"] == pytest.approx(6 * result["step_seconds"], abs=0.01)
    assert result["share_run_seconds"] == pytest.approx(6 * result["share_seconds"], abs=0.01)
    assert result["upsampler_seconds"] > 0 and result["upsampler_peak_gib"] is None


def test_encoding_in_chunks_is_compared_with_one_piece(monkeypatch, capsys):
    words = ["encoding", "--resolution", "demo", "--video_length", "5", "--steps", "1", "--one_piece"]
    channels = ["32", "32", "32", "64", "64"]
    monkeypatch.setattr(sys, "argv", ["bench", *words, "--channels", *channels])
    assert command.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["resolution"], result["latent_frames_at_once"], result["finite"]) == ("160x96", 1, True)
    assert result["distance_from_one_piece"] < 1e-6


def test_a_benchmark_that_encodes_says_how_long_the_file_took_after_the_last_frame(monkeypatch, capsys, tmp_path):
    words = ["stage3", "--resolution", "demo", "--video_length", "5", "--steps", "1"]
    words += ["--output_video", str(tmp_path / "made.mp4"), "--channels", "32", "32", "32", "64", "64"]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    assert command.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["tail_seconds"] <= result["seconds"]
    assert read_video(tmp_path / "made.mp4")[0].shape == (5, 96, 160, 3)
