"""--preview_every and fit_preview as a user calls them: the same bits, whole files, the right colours or a refusal."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from folders import embed
from forked import Forked, Moment, run_ranks

from hunyuan_staged import fit_preview
from hunyuan_staged.demo import CHECKPOINT
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.files.tensors import load_latents
from hunyuan_staged.files.video import read_video, write_video
from hunyuan_staged.pipeline import previews
from hunyuan_staged.sampling import preview_factors
from hunyuan_staged.sampling.preview_factors import FittedFactors
from hunyuan_staged.weights.fingerprint import PREVIEW_FACTORS
from hunyuan_staged.weights.folder import open_model

STEP = "hunyuan_staged.sampling.loop.euler_step"
PREVIEWS = {contract.PREVIEW_VIDEO, contract.PREVIEW_PICTURE}


def run(inputs: Path, output: Path, *more: object, moment: Moment | None = None) -> tuple[int, str]:
    """Stage 2 with a cache folder of its own beside the output."""
    args = ("--input_dir", inputs, "--output_dir", output, "--video_length", 9, "--num_inference_steps", 4, *more)
    forked = Forked(2, *args, said=output.parent / "said", moment=moment, XDG_CACHE_HOME=str(output.parent / "cache"))
    return forked.status(), forked.said()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fit(*args: object, cache: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hunyuan_staged.fit_preview", *map(str, args)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_from_no_factors_to_previews_that_change_no_bit(tmp_path, tiny_official):
    """Refused, fitted to a finished run, then found; the latents are those of a run without previews."""
    inputs = embed(tmp_path / "in", tiny_official)
    plain, shown = tmp_path / "plain", tmp_path / "shown"
    status, said = run(inputs, plain, "--preview_every", 2)
    assert status == 2 and not plain.exists()
    assert f"error: --preview_every no colours are known for the VAE of {tiny_official}; fit them once" in said
    assert run(inputs, plain)[0] == 0
    latents = load_latents(plain)[0]
    # A video whose red is the first channel.
    red = latents[0, 0].mul(40).add(128).clamp(0, 255).byte().repeat_interleave(16, 1).repeat_interleave(16, 2)
    frames = np.zeros((9, 96, 160, 3), np.uint8)
    frames[..., 0] = torch.cat([red[:1], red[1:].repeat_interleave(4, 0)]).numpy()
    write_video(plain / contract.VIDEO_FILE, frames, 24, 96, 160)
    fitted = fit(plain, cache=tmp_path / "cache")
    assert fitted.returncode == 0, fitted.stderr
    assert fitted.stdout.startswith(f"wrote {tmp_path / 'cache' / 'hunyuan_staged' / 'preview_factors'}/")
    status, said = run(inputs, shown, "--preview_every", 2)
    assert status == 0, said
    assert f"previews every 2 steps into {shown}; colours by factors fitted for this VAE (" in said
    assert (shown / contract.LATENTS_FILE).read_bytes() == (plain / contract.LATENTS_FILE).read_bytes()
    assert names(shown) == {contract.LATENTS_FILE, contract.CONFIG_FILE, *PREVIEWS}
    found, fps = read_video(shown / contract.PREVIEW_VIDEO)
    assert found.shape == (3, 48, 80, 3) and fps == 6
    reds = torch.from_numpy(found[..., 0].reshape(3, 6, 8, 10, 8).mean(axis=(2, 4)))
    assert torch.corrcoef(torch.stack([reds.flatten(), latents[0, 0].flatten().double()]))[0, 1] > 0.9
    # A new run without previews leaves none of the former one's.
    assert run(inputs, shown, "--seed", 7)[0] == 0
    assert names(shown) == {contract.LATENTS_FILE, contract.CONFIG_FILE}


def keep_factors(tiny: Path, vae: str | None = None) -> list[list[float]]:
    """Have factors for tiny's VAE in the user's cache, or by `vae` for another."""
    own = open_model(tiny, ("vae",)).fingerprint(["vae"])
    rows = [[0.5, 0.5, 0.5]] * 33
    preview_factors.save(previews.cached_factors(own), FittedFactors(vae or own, 0.9, rows))
    return rows


def test_a_stopped_run_leaves_its_state_and_its_preview(tmp_path, tiny_official, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_factors(tiny_official)
    inputs, folder = embed(tmp_path / "in", tiny_official), tmp_path / "out"
    status, said = run(inputs, folder, "--preview_every", 100, moment=Moment(STEP, 2, (signal.SIGTERM,)))
    assert status == 143, said
    assert names(folder) == {contract.STATE_FILE, *PREVIEWS}
    status, said = run(inputs, folder, "--resume", moment=Moment(STEP, 1, (signal.SIGTERM,)))
    assert status == 143 and names(folder) == {contract.STATE_FILE, *PREVIEWS}, "going on keeps what there is to see"


def test_a_negative_number_of_steps_is_refused(tmp_path):
    status, said = run(tmp_path, tmp_path / "out", "--preview_every", -1)
    assert status == 2 and "--preview_every -1 is neither 0 (never) nor a number of steps" in said


def test_factors_of_weights_that_have_been_replaced_do_not_count(tmp_path, tiny_official, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = open_model(tiny_official, ("vae",))
    keep_factors(tiny_official, vae="another")
    with pytest.raises(InputError, match="no colours are known"):
        previews.choose_factors(folder)
    rows = keep_factors(tiny_official)
    found, origin = previews.choose_factors(folder)
    assert [list(row) for row in found] == rows and origin.startswith("factors fitted for this VAE (90.0%")


def test_the_demo_brings_its_own_factors():
    factors, origin = previews.choose_factors(open_model(CHECKPOINT, ("vae",)))
    assert np.shape(factors) == (289, 3)
    assert origin == f"factors fitted for this VAE (91.0% of the variance), {CHECKPOINT / 'vae' / PREVIEW_FACTORS}"


def test_without_a_vae_at_hand_it_is_taken_for_the_published_one():
    factors, origin = previews.choose_factors(None)
    assert factors is preview_factors.PUBLISHED and origin == "the published VAE's factors: there is no other VAE here"


def test_fitting_refuses_what_is_no_finished_run(tmp_path, tiny_official, capsys):
    assert fit_preview.main([str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "does not exist" in said
    for name, model in (("a", tiny_official), ("b", CHECKPOINT)):
        (tmp_path / name).mkdir()
        (tmp_path / name / contract.CONFIG_FILE).write_text(json.dumps({"model_path": str(model)}))
    assert fit_preview.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "give runs of one model, or --model_path" in capsys.readouterr().err


@pytest.mark.parametrize("signals", [(), (signal.SIGTERM,)])
def test_the_first_of_two_processes_writes_the_preview_that_one_writes(tmp_path, tiny_official, monkeypatch, signals):
    """Two have a guidance branch each, and so the same bits; also where both are told to stop."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_factors(tiny_official)
    inputs = embed(tmp_path / "in", tiny_official)
    moment = Moment(STEP, 2, signals) if signals else None
    run(inputs, tmp_path / "one", "--preview_every", 3, moment=moment)
    args = ["--input_dir", inputs, "--output_dir", tmp_path / "two", "--video_length", 9, "--num_inference_steps", 4]
    ranks = run_ranks(
        *(2, 2, *args, "--preview_every", 3),
        said=tmp_path / "said",
        moments=dict.fromkeys(range(2), moment) if moment else None,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert [rank.status() for rank in ranks] == [143 if signals else 0] * 2, ranks[0].said()
    assert names(tmp_path / "two") == names(tmp_path / "one") and names(tmp_path / "two") > PREVIEWS
    for name in PREVIEWS:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_draft_leaves_its_preview(tmp_path, tiny_official, monkeypatch):
    """Without --preview_every, too; where no colours are known it is made all the same."""
    inputs, folder = embed(tmp_path / "in", tiny_official), tmp_path / "out"
    status, said = run(inputs, folder, "--stop_after", 2)
    assert status == 0 and names(folder) == {contract.STATE_FILE}, said
    assert f"no preview: no colours are known for the VAE of {tiny_official}" in said
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_factors(tiny_official)
    status, said = run(inputs, folder, "--stop_after", 2)
    assert status == 0 and names(folder) == {contract.STATE_FILE, *PREVIEWS}, said
    assert f"a preview at the end into {folder}; colours by factors fitted for this VAE" in said
