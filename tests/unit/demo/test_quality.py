"""The instrument: its arithmetic, going on after a stop, and one small run on the demo weights."""

import json

import pytest
import torch

from hunyuan_staged.compare.measures import latent_errors
from hunyuan_staged.demo import CHECKPOINT, evaluate, quality
from hunyuan_staged.options import DenoiseOptions


def test_prompts_are_spread_over_kinds_and_wordings_and_exact_comes_first():
    found = quality.clips(["steps-10"], 5)
    assert [clip.key for clip in found[:4]] == [
        "exact/single/known/0",
        "steps-10/single/known/0",
        "exact/single/new/0",
        "steps-10/single/new/0",
    ]
    assert found[-1].key == "steps-10/single/known/1"
    assert len(found) == 10


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # Wilson's own formula, computed by hand to four digits
    [(0.5, 10, 0.2366, 0.7634), (1.0, 64, 0.9434, 1.0), (0.0, 0, 0.0, 1.0)],
)
def test_the_interval_is_wilsons(share, count, low, high):
    assert quality.interval(share, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def line(clip: str, evaluations: int, error: float, right: float) -> dict:
    return {
        "clip": clip,
        "evaluations": evaluations,
        "error": error,
        "psnr": 30.0,
        "ssim": 0.9,
        "flicker": 1.0,
        "right": {"all four": right, "color": 1.0},
    }


def test_a_table_of_known_lines():
    lines = [
        line("exact/single/known/0", 60, 0.0, 1.0),
        line("exact/single/new/0", 60, 0.0, 1.0),
        line("fast/single/known/0", 20, 0.1, 1.0),
        line("fast/single/new/0", 40, 0.3, 0.0),
        line("bad/single/known/0", 40, 0.5, 0.0),
    ]
    rows = {one["setting"]: one for one in quality.table({one["clip"]: one for one in lines})}
    assert rows["fast"]["less_work"] == 2
    assert rows["fast"]["error"] == pytest.approx(0.2) and rows["fast"]["worst_error"] == 0.3
    assert rows["fast"]["right"] == 0.5
    assert rows["fast"]["right_interval"] == [pytest.approx(0.0945, abs=1e-4), pytest.approx(0.9055, abs=1e-4)]
    assert quality.pareto(list(rows.values())) == ["exact", "fast"]


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    path = tmp_path / quality.CLIPS_FILE
    path.write_text(json.dumps(line("exact/single/known/0", 60, 0.0, 1.0)) + '\n{"clip": "exact/sin')
    assert list(quality.read_lines(path)) == ["exact/single/known/0"]
    assert quality.read_lines(tmp_path / "none") == {}


def test_refusals(tmp_path, capsys):
    common = ["--model_path", str(CHECKPOINT), "--output_dir", str(tmp_path)]
    assert quality.main([*common, "--prompts", "0"]) == 2
    assert capsys.readouterr().err == "error: --prompts 0 is not a positive number\n"
    assert list(tmp_path.iterdir()) == []


def test_a_small_run_and_going_on(tmp_path, capsys):
    """Two settings over one prompt; the second call makes nothing anew."""
    common = ["--model_path", str(CHECKPOINT), "--output_dir", str(tmp_path), "--prompts", "1"]
    assert quality.main([*common, "--settings", "steps-10"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    exact, fewer = result["rows"]
    assert (exact["evaluations"], exact["error"], exact["psnr"], exact["ssim"]) == (60, 0, 100, pytest.approx(1))
    assert fewer["evaluations"] == 20 and 0.01 < fewer["error"] < 1
    assert fewer["less_work"] == 3
    assert result["pareto"] == ["exact", "steps-10"]
    before = (tmp_path / quality.CLIPS_FILE).read_text()
    (tmp_path / quality.CLIPS_FILE).write_text(before[:-20])  # as a kill may leave it
    assert quality.main([*common, "--settings", "steps-10"]) == 0
    assert list(quality.read_lines(tmp_path / quality.CLIPS_FILE)) == [
        "exact/single/known/0",
        "steps-10/single/known/0",
    ]
    before = (tmp_path / quality.CLIPS_FILE).read_text()
    assert quality.main([*common, "--settings", "steps-10"]) == 0
    assert (tmp_path / quality.CLIPS_FILE).read_text() == before
    assert (tmp_path / quality.PLOT_FILE).is_file()


def test_magcaches_thresholds_order_its_errors():
    """By the curve that ships with the demo: a larger threshold reuses more steps, and its error is not smaller."""
    pipeline = evaluate.DemoPipeline(CHECKPOINT, torch.device("cpu"))
    (_, prompt), *_ = evaluate.held_out_prompts("single", 1)
    exact, evaluations = pipeline.denoise(prompt, DenoiseOptions())
    assert evaluations == 60
    found = []
    for threshold in (0.01, 0.06, 0.24):
        options = DenoiseOptions(enable_cache=True, cache_type="magcache", cache_threshold=threshold)
        latents, evaluations = pipeline.denoise(prompt, options)
        found.append((evaluations, latent_errors(exact, latents)[0]))
    assert [evaluations for evaluations, _ in found] == sorted({one for one, _ in found}, reverse=True)
    assert 0 < found[0][1] < found[1][1] < found[2][1] < 2
