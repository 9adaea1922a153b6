"""--dry_run without weights, without earlier stages, for cards that are not here; the time at its end."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from folders import embed
from forked import run_stage

import stage1_text_encoder
import utils
from hunyuan_staged.memory import available, timings
from hunyuan_staged.memory.budget import FreeMemory
from hunyuan_staged.memory.expected import measured
from hunyuan_staged.options import DenoiseOptions, EncodeOptions
from hunyuan_staged.parallel.world import World
from hunyuan_staged.pipeline.forecast_denoising import assume_denoising
from hunyuan_staged.runtime.progress import SILENT
from hunyuan_staged.stage_flags import read_whole_run

TITLES = ["stage 1: prompt → embeddings", "stage 2: embeddings → latents", "stage 3: latents → video", "the whole run"]


def plans(printed: str) -> dict[str, dict[str, str]]:
    """The rows of each plan, by its title."""
    parts = re.split(r"(?m)^(stage \d: .*|the whole run)\n", printed)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return {title: dict(re.findall(r"(?m)^([a-z ]+?)  +(\S.*)$", rows)) for title, rows in found}


@pytest.fixture
def plan_run(capsys, tmp_path, monkeypatch):
    """What a whole run's --dry_run prints, in a folder that stays empty."""
    monkeypatch.chdir(tmp_path)

    def plan(*flags: str, gpus: int = 1) -> dict[str, dict[str, str]]:
        lists = read_whole_run(["--dry_run", *flags]).lists
        status = utils.plan_script([str(gpus), *map(json.dumps, lists)])
        told = capsys.readouterr()
        assert status == 0, told.err
        assert list(tmp_path.iterdir()) == []
        return plans(told.out)

    return plan


def test_an_empty_folder_has_a_plan_of_all_stages_that_ends_with_the_time(tmp_path):
    """Was: the plan of stage 1, then an error about its files."""
    command = ["bash", str(ROOT / "run_staged.sh"), "--dry_run", "--gpus", "1"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = plans(result.stdout)
    assert list(found) == TITLES
    assert found[TITLES[0]]["version"] == "demo_t2v" and found[TITLES[1]]["video"] == "160x96, 33 frames"
    assert found[TITLES[1]]["assumed"] == "a prompt of 256 tokens" and "figures" not in found[TITLES[1]]
    assert re.fullmatch(r"\S+ to \S+ (s|min) \(an estimate\); loading .*", found[TITLES[3]]["time"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_just_like_a_measured_one_is_stated_as_measured(plan_run):
    found = plan_run("--assume_gpu", "H100", "--transformer_version", "720p_t2v", "--tile_size", "256")
    assert found[TITLES[1]]["expected time"] == "15.2 min (measured: NVIDIA H100 80GB HBM3)"
    assert found[TITLES[2]]["expected time"] == "8.6 s (measured: NVIDIA H100 80GB HBM3)"
    assert found[TITLES[3]]["time"].startswith("15.4 min (measured); loading")
    assert found[TITLES[1]]["attention"].startswith("flash4 (the fastest exact kernel of such a card")
    assert found[TITLES[1]]["free"] == "GPU 79.2 GiB, host 64.0 GiB (assumed)"
    figures = found[TITLES[1]]["figures"]
    assert figures.startswith(
        "the published model's, since nothing of hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
    )
    assert figures.endswith("to have it: python -m hunyuan_staged.download 720p_t2v --model_path DIR")


def test_another_run_is_estimated_by_the_cards_rate(plan_run):
    found = plan_run("--assume_gpu", "rtx 4090", "--model_path", "nobody/Model-480p_t2v")
    assert found[TITLES[0]]["weights"] == "12.3 GiB of the language model, torch.float16"
    assert found[TITLES[1]]["video"] == "848x480, 121 frames"
    tokens = 31 * 30 * 53 + 256
    flops = 54 * (4 * tokens**2 * 2048 + 2 * tokens * 12 * 2048**2)
    least, most = (100 * flops / 165.2e12 / share / 60 for share in (0.8, 0.5))
    assert found[TITLES[1]]["expected time"] == f"{least:.0f} to {most:.0f} min (an estimate: NVIDIA GeForce RTX 4090)"
    assert re.match(r"\d+ to \d+ min \(an estimate\)", found[TITLES[3]]["time"])


def test_a_card_of_so_many_gb_may_be_any_of_that_memory(plan_run):
    found = plan_run("--assume_gpu", "24", "--transformer_version", "480p_t2v")
    slow, fast = (
        plan_run("--assume_gpu", card, "--transformer_version", "480p_t2v")[TITLES[1]]["expected time"]
        for card in ("3090", "4090")
    )
    least, most = fast.split(" to ")[0], slow.split(" to ")[1].split(" min")[0]
    told = "(an estimate: a card of 24 GB, as RTX 3090, RTX 4090)"
    assert found[TITLES[1]]["expected time"] == f"{least} to {most} min {told}"
    unknown = plan_run("--assume_gpu", "33", "--transformer_version", "480p_t2v")
    assert unknown[TITLES[3]]["time"].startswith("unknown: neither measured nor a card whose rate is known")


def test_super_resolution_is_planned_too(plan_run):
    flags = ["--assume_gpu", "4090", "--transformer_version", "480p_t2v", "--super_resolution", "1080p"]
    found = plan_run(*flags)
    larger = {title: rows for title, rows in found.items() if "larger" in title}
    assert list(larger) == [f"stage 2: larger latents, {name}_sr_distilled" for name in ("720p", "1080p")]
    assert [rows["video"] for rows in larger.values()] == ["1280x720, 121 frames", "1904x1072, 121 frames"]
    assert found[TITLES[2]]["video"] == "1904x1072, 121 frames"
    commands = [rows["figures"].rpartition("to have it: ")[2] for rows in larger.values()]
    assert commands[0] == "python -m hunyuan_staged.download 480p_t2v --super_resolution 720p --model_path DIR"


def test_what_does_not_fit_a_small_card_is_offloaded_there(plan_run):
    found = plan_run("--assume_gpu", "8GB", "--transformer_version", "720p_t2v")
    assert re.match(r"17 of 26 \(", found[TITLES[0]]["offloaded layers"])
    assert re.match(r"40 of 54 \(", found[TITLES[1]]["offloaded blocks"])
    assert re.fullmatch(
        r"--weights_dtype fp8 and --video_length \d+ or less \(6\.5 GiB, \d+ to \d+ min\)",
        found[TITLES[1]]["resident with"],
    )
    larger = plan_run("--assume_gpu", "16", "--transformer_version", "720p_t2v")
    assert "resident with" not in larger[TITLES[1]], "nothing is offloaded"
    assert found[TITLES[2]]["decoding"].startswith("whole frames in 3 bands of rows")


def test_a_small_video_waits_for_the_blocks_that_are_offloaded(plan_run):
    """Was: the time of the computing alone, which is a sixth of it here. Of a long video the blocks arrive in time."""
    flags = ["--transformer_version", "480p_t2v", "--enable_offloading", "--assume_gpu"]
    rows = plan_run(*flags, "H100", "--video_length", "5")[TITLES[1]]
    offloaded = float(re.search(r"offloaded weights (\S+) GiB", rows["memory"])[1])
    least, most = map(int, re.match(r"(\d+) to (\d+) s \(an estimate: NVIDIA H100 ", rows["expected time"]).groups())
    assert least == round(100 * offloaded * 2**30 / 55e9) and least < most < 1.3 * least
    times = [plan_run(*flags[:count], "--assume_gpu", "4090")[TITLES[1]]["expected time"] for count in (2, 3)]
    assert times[0] == times[1] and times[0].endswith("min (an estimate: NVIDIA GeForce RTX 4090)")


def test_an_image_decides_the_size_and_processes_the_layout(plan_run):
    image = str(ROOT / "docs" / "first_frame.png")
    flags = ["--assume_gpu", "H100", "--image_path", image, "--transformer_version", "480p_i2v"]
    found = plan_run(*flags, gpus=4)
    assert re.fullmatch(
        r"1 frame of \d+x\d+ through the VAE's encoder, 1\.\d GiB: weights 743 MiB, working memory \d+ MiB",
        found[TITLES[0]]["image"],
    )
    assert found[TITLES[1]]["version"] == "480p_i2v"
    assert found[TITLES[1]]["tokens"].endswith(f" of the video, {256 + 729} of the text")
    assert found[TITLES[1]]["ranks"] == "4: 2 guidance branches x 2 sequence shards"
    assert found[TITLES[2]]["video"] == found[TITLES[1]]["video"]


def test_the_configs_alone_make_a_plan(tmp_path, tiny_official):
    """Weights that are still being downloaded: the plan is that of the whole folder."""
    model = tmp_path / "model"
    for path in tiny_official.rglob("*.json"):
        target = model / path.relative_to(tiny_official)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    rows = {}
    for name, folder in (("whole", tiny_official), ("configs", model)):
        for stage in (2, 3):
            arguments = ["--model_path", folder, "--input_dir", tmp_path / "none", "--dry_run"]
            status, said = run_stage(stage, *arguments, said=tmp_path / "said")
            assert status == 0, said
            lines = [line for line in said.splitlines() if not line.startswith(("free", "expected time", "2"))]
            rows[name, stage] = lines
    for stage in (2, 3):
        assert rows["whole", stage] == rows["configs", stage] and not any("figures" in x for x in rows["whole", stage])
    assert not (tmp_path / "none").exists()


def test_a_part_that_is_missing_is_planned_by_the_published_numbers(tmp_path, tiny_official):
    model = tmp_path / "model"
    shutil.copytree(tiny_official / "transformer", model / "transformer")
    arguments = ["--model_path", model, "--output_dir", tmp_path / "none", "--dry_run"]
    status, said = run_stage(1, *arguments, "--assume_gpu", 24, said=tmp_path / "said")
    assert status == 0, said
    assert f"the published model's, since {model} has no text encoder; to have it: " in said
    assert re.search(r"(?m)^version +demo_t2v$", said), "the versions are the folder's own"


def test_stage_2_takes_embeddings_that_are_there_and_assumes_others(tmp_path, tiny_official):
    folder = embed(tmp_path / "run", tiny_official)
    tokens = {}
    for name in ("there", "gone"):
        status, said = run_stage(2, "--input_dir", folder, "--dry_run", said=tmp_path / "said")
        assert status == 0, said
        tokens[name] = re.search(r"(\d+) of the text", said)[1]
        assert ("assumed " in said) == (name == "gone")
        (folder / "stage1_embeddings.safetensors").unlink(missing_ok=True)
    assert tokens == {"there": "14", "gone": "256"}


def test_what_fits_nowhere_here_names_the_way_to_plan_for_a_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(available, "free_memory", lambda _: FreeMemory(None, 2**30))
    arguments = ["--model_path", "nobody/Model-480p_t2v", "--output_dir", str(tmp_path / "none"), "--dry_run"]
    assert stage1_text_encoder.main(arguments) == 2
    assert re.search(
        r"error: the text encoder needs 24\.6 GiB of host memory \(weights 24\.6 GiB\); free: host 1\.0 GiB\. "
        r"What would help: a GPU; --assume_gpu plans for a card that is not here$",
        capsys.readouterr().err.strip(),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--assume_gpu", "24"], "--assume_gpu needs --dry_run: a card that is not here computes nothing"),
        (
            ["--assume_gpu", "4091", "--dry_run"],
            "--assume_gpu '4091' is neither GB of memory nor a known card; known: RTX",
        ),
        (["--assume_gpu", "0", "--dry_run"], "--assume_gpu '0' is neither GB of memory nor a known card; known: RTX"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_card_is_assumed_for_a_plan_alone(tmp_path, stage, flags, message):
    status, said = run_stage(stage, *flags, said=tmp_path / "said")
    assert status == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1


def test_a_version_without_a_file_is_for_plans(tmp_path, tiny_official):
    folder = embed(tmp_path / "run", tiny_official)
    arguments = ["--input_dir", folder, "--transformer_version", "480p_t2v"]
    status, said = run_stage(2, *arguments, said=tmp_path / "said")
    assert (status, said.splitlines()[-1]) == (
        *(2, "error: --transformer_version belongs to a file as --transformer, or to --dry_run"),
    )


def test_steps_that_a_saved_state_holds_are_not_counted_again(tmp_path, tiny_official, capsys):
    """Of stage 2 and of a whole run, with --resume alone, by what the run itself would go on from."""
    folder, said = tmp_path / "out", tmp_path / "said"
    assert run_stage(1, "--model_path", tiny_official, "--output_dir", folder, said=said)[0] == 0
    small = ["--video_length", 5, "--num_inference_steps", 4]
    stage = ["--input_dir", folder, *small]
    assert run_stage(2, *stage, "--stop_after", 3, said=said)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    def steps_of(*flags: object) -> list[str]:
        argv = ["--dry_run", "--model_path", tiny_official, "--output_dir", folder, *small, *flags]
        lists = read_whole_run([*map(str, argv)]).lists
        assert utils.plan_script(["1", *map(json.dumps, lists)]) == 0
        whole = plans(capsys.readouterr().out)[TITLES[1]]["steps"]
        told = run_stage(2, *stage, "--dry_run", *flags, said=said)[1]
        return [whole, *re.findall(r"(?m)^steps +(.*)$", told), *re.findall(r"(?m)^error: (.*)", told)]

    assert steps_of() == ["4, guidance 6"] * 2, "without --resume it begins anew"
    assert steps_of("--resume") == ["4, guidance 6, 3 done already"] * 2
    status, told = run_stage(2, *stage, "--dry_run", "--resume", "--seed", 7, said=said)
    assert status == 2 and "stage2_state.safetensors belongs to other settings: seed: was 42, now 7" in told
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert run_stage(2, *stage, "--resume", said=said)[0] == 0
    assert steps_of("--resume") == ["4, guidance 6, 4 done already"] * 2, "latents that are there are taken as they are"
    told = run_stage(2, *stage, "--dry_run", "--resume", said=said)[1]
    assert re.search(r"(?m)^expected time +under 0.1 s \(measured", told), told


def test_a_plan_for_another_prompt_counts_all_steps(tmp_path, tiny_official, capsys):
    """Stage 1 is going to write other embeddings, of which there is no state."""
    folder, said = tmp_path / "out", tmp_path / "said"
    assert run_stage(1, "--model_path", tiny_official, "--output_dir", folder, said=said)[0] == 0
    assert run_stage(2, "--input_dir", folder, "--video_length", 5, "--stop_after", 1, said=said)[0] == 0
    for prompt, more in ((EncodeOptions().prompt, ", 1 done already"), ("a cat", "")):
        argv = ["--dry_run", "--resume", "--model_path", tiny_official, "--output_dir", folder, "--video_length", 5]
        lists = read_whole_run([*map(str, argv), "--prompt", prompt]).lists
        assert utils.plan_script(["1", *map(json.dumps, lists)]) == 0
        assert plans(capsys.readouterr().out)[TITLES[1]]["steps"] == f"30, guidance 6{more}"


@pytest.mark.parametrize(
    ("cache", "steps"), [({}, 2.0), ({"enable_cache": True, "cache_type": "teacache", "cache_steps": "0,1,2,4"}, 1.0)]
)
def test_the_time_is_that_of_the_steps_that_are_left(cache, steps):
    """Of five, three of which are done; of a cache the fourth is reused, by its number."""
    options = DenoiseOptions(dry_run=True, assume_gpu="4090", num_inference_steps=5, **cache)
    config = {"model_path": "nobody/Model-480p_t2v", "transformer_version": "480p_t2v"}
    world = World(0, 1, torch.device("cpu"))
    two, one = (assume_denoising(options, config, world, SILENT, done={None: done})[0].expected for done in (3, 4))
    kept = timings.reused_shares()["teacache"] if cache else 0.0
    assert two.least == pytest.approx((steps + kept) * one.least) and one.least > 0
    assert assume_denoising(options, config, world, SILENT, done={None: 5})[0].expected == measured(0)
    draft = replace(options, stop_after=4)
    assert assume_denoising(draft, config, world, SILENT, done={None: 4})[0].expected == measured(0)
