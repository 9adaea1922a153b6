"""The launcher's command line: which flags go to which stage, how many processes, what is refused."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from hunyuan_staged import launch, stage_flags
from hunyuan_staged.errors import InputError

FOLDER = ["--input_dir=./stage_outputs"]


@pytest.mark.parametrize(
    ("given", "stage1", "stage2", "stage3"),
    [
        ([], [], FOLDER, FOLDER),
        (["--prompt", "a cat"], ["--prompt=a cat"], FOLDER, FOLDER),
        (["--prompt=-3 --seed"], ["--prompt=-3 --seed"], FOLDER, FOLDER),
        (["--prompt", "--seed 4"], ["--prompt=--seed 4"], FOLDER, FOLDER),
        (["--prompt", "two\nlines 'q'"], ["--prompt=two\nlines 'q'"], FOLDER, FOLDER),
        (["--seed", "7", "--fps", "12"], [], ["--seed=7", *FOLDER], ["--fps=12", *FOLDER]),
        (["--model_path=m"], ["--model_path=m"], ["--model_path=m", *FOLDER], ["--model_path=m", *FOLDER]),
        (["--dtype", "fp32"], ["--dtype=fp32"], ["--dtype=fp32", *FOLDER], FOLDER),
        (["--output_dir", "o"], ["--output_dir=o"], ["--input_dir=o"], ["--input_dir=o"]),
        (["--dry_run"], ["--dry_run"], ["--dry_run", *FOLDER], ["--dry_run", *FOLDER]),
        (["--debug", "--save_frames"], ["--debug"], ["--debug", *FOLDER], ["--debug", "--save_frames", *FOLDER]),
    ],
)
def test_each_stage_gets_the_flags_that_are_its_own(given, stage1, stage2, stage3):
    assert stage_flags.split_flags(given) == [stage1, stage2, stage3]


def test_super_resolution_is_stage_2_once_more(tmp_path):
    """What is of the base run goes to the first, and where the run stands to both."""
    given = ["--super_resolution", "720p", "--resolution=480p", "--num_inference_steps", "9", "--enable_cache"]
    given += ["--cache_type=teacache", "--seed=7", "--resume", "--video_length", "9", "--four_steps"]
    lists = stage_flags.split_flags(given)
    assert lists == [
        ["--super_resolution=720p", "--resolution=480p"],
        ["--num_inference_steps=9", "--enable_cache", "--cache_type=teacache", "--seed=7", "--resume"]
        + ["--video_length=9", "--four_steps", *FOLDER],
        ["--super_resolution=720p", "--seed=7", "--resume", "--video_length=9", *FOLDER],
        ["--latents=720p", *FOLDER],
    ]
    assert stage_flags.stage_numbers(lists) == (1, 2, 2, 3)
    video = ["--super_resolution=720p", "--input_video=/dev/null", "--num_inference_steps=8"]
    assert stage_flags.base_and_larger(video) == [video], "there is no base run"
    # Without it the latents of a former run are not decoded, unless the flags say so.
    (tmp_path / "stage2_latents_720p.safetensors").touch()
    own = [f"--output_dir={tmp_path}"]
    assert stage_flags.split_flags(own)[-1] == ["--latents=base", f"--input_dir={tmp_path}"]
    assert stage_flags.split_flags(["--super_resolution=720p", "--latents", "base"])[-1][-2:] == [
        "--latents=base",
        *FOLDER,
    ]


def test_what_shapes_the_base_run_alone_does_not_reach_super_resolution():
    given = ["--super_resolution=720p", "--sigmas=1,0.5", "--width=848", "--height=480"]
    _, base, larger, _ = stage_flags.split_flags(given)
    assert base == ["--sigmas=1,0.5", "--width=848", "--height=480", *FOLDER]
    assert larger == ["--super_resolution=720p", *FOLDER]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sede", "7"], "--sede is a flag of no stage; did you mean --seed?"),
        (["cat"], "cat is a flag of no stage; see run_staged.sh --help"),
        (["--input_dir", "x"], "--input_dir is for a single stage; a whole run has one folder: use --output_dir"),
        (["--seed"], "--seed needs a value"),
        (["--video_length", "10"], r"--video_length 10 is not 4n\+1; the nearest are 9 and 13"),
        (["--tile_size", "100"], "--tile_size 100 is not a positive multiple of 16 px"),
        (["--resolution", "999p"], "--resolution '999p' is unknown; known: demo, 360p"),
    ],
)
def test_a_bad_flag_of_any_stage_is_refused_before_the_first_starts(given, message):
    with pytest.raises(InputError, match=message):
        stage_flags.read_whole_run(given)


def test_a_video_may_lie_in_the_folder_that_the_run_makes(tmp_path):
    """Was refused: the folder does not exist yet."""
    folder = tmp_path / "runs" / "new"
    given = ["--output_dir", str(folder), "--output_video"]
    assert (
        stage_flags.read_whole_run([*given, str(folder / "cat.mp4")]).lists[2][0]
        == f"--output_video={folder / 'cat.mp4'}"
    )
    other = tmp_path / "runs" / "other" / "cat.mp4"
    with pytest.raises(InputError, match=f"--output_video {other}: {other.parent} does not exist"):
        stage_flags.read_whole_run([*given, str(other)])
    with pytest.raises(InputError, match="--output_video names one video, and --jobs makes many"):
        stage_flags.read_whole_run(["--seeds=1-2", *given, str(folder / "cat.mp4")])


def test_split_is_refused_in_one_line(tmp_path):
    command = ["bash", str(ROOT / "run_staged.sh"), "--video_length", "ten"]
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "error: argument --video_length: invalid int value: 'ten' (see stage2_transformer.py --help)\n"
    )
    assert not list(tmp_path.iterdir())


def test_check_is_what_the_stage_itself_would_say(capsys):
    assert launch.main(["python", "check", "--only", "3", "--fps", "12"]) == 0
    with pytest.raises(SystemExit) as left:
        launch.main(["python", "check", "--only", "3", "--fps", "0"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --fps 0 is outside 1 to 240\n"
    assert launch.main(["python", "check", "--only", "3", "--help"]) == launch.HELP_SHOWN
    assert capsys.readouterr().out.startswith("usage: stage3_vae_decoder.py ")
