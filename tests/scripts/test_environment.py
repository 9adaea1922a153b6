"""The scripts and launchers in an environment that is odd, half set or left over from another run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forked import heed_interrupts

from hunyuan_staged.files import contract
from hunyuan_staged.stage_flags import STAGES

BASH = ["bash", str(ROOT / "run_staged.sh")]
STAGE1 = [sys.executable, str(ROOT / "stage1_text_encoder.py")]
RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def call(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("GPUS", *RANKS)}
    clean |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=False, cwd=folder)


def refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert (result.returncode, result.stderr, result.stdout) == (2, f"error: {message}\n", "")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK is set without WORLD_SIZE: a launcher such as torchrun sets both; unset RANK"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set without RANK: a launcher such as torchrun sets both; unset WORLD_SIZE",
        ),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is '1' in the environment; allowed: 0 to 0"),
        (RANKS | {"RANK": "one"}, "RANK is 'one' in the environment; allowed: 0 to 1"),
        (RANKS | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment; allowed: 1 to 65536"),
        (RANKS | {"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x' in the environment; allowed: 1 to 2"),
        (RANKS | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' in the environment; allowed: 0 to 1"),
        (RANKS | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http' in the environment; allowed: 1 to 65535"),
        (
            RANKS | {"MASTER_ADDR": ""},
            "WORLD_SIZE is 2 without MASTER_ADDR: a launcher such as torchrun sets both",
        ),
        ({"OMP_NUM_THREADS": "two"}, "OMP_NUM_THREADS is 'two' in the environment, which is not a positive number"),
        (
            {"PYTHONOPTIMIZE": "2"},
            "PYTHONOPTIMIZE=2 and -OO remove the docstrings, which transformers needs; allowed: 0 or 1",
        ),
    ],
)
def test_a_stage_refuses_what_it_cannot_believe(tmp_path, environment, message):
    """RANK=1 left over gave status 0, and nothing was written."""
    refused(call(STAGE1, tmp_path, **environment), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ([], {"GPUS": str(2**64 + 1)}, f"--gpus {2**64 + 1} is more than 64"),
        ([], {"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is not a program"),
        (["--only", "two"], {}, "--only two is not 1, 2 or 3"),
        (["--only"], {}, "--only needs a number"),
        (
            ["a red circle"],
            {},
            "a red circle is a flag of no stage; see run_staged.sh --help; a prompt is given as --prompt 'a red circle'",
        ),
    ],
)
def test_the_launcher_refuses(tmp_path, flags, environment, message):
    refused(call([*BASH, *flags], tmp_path, **environment), message)


def test_a_message_is_cut_whatever_it_quotes(tmp_path):
    result = call([*BASH, f"--{'x' * 100_000}"], tmp_path)
    assert result.returncode == 2
    assert len(result.stderr) < 2000
    assert result.stderr.startswith("error: --xxx") and result.stderr.endswith("see run_staged.sh --help\n")
    result = call(BASH, tmp_path, PYTHON="x\n" * 50_000)
    assert result.returncode == 2
    assert len(result.stderr) < 2000 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: PYTHON=x x ") and result.stderr.endswith(" is not a program\n")


def test_a_working_folder_that_is_gone_or_no_text(tmp_path):
    gone, odd = tmp_path / "gone", tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    script = 'mkdir "$1"; cd "$1"; rmdir "$1"; shift; exec "$@"'
    for command in (BASH, STAGE1):
        result = call(["bash", "-c", script, "x", str(gone), *command], tmp_path)
        told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert told == ["error: the working folder cannot be used: No such file or directory; change to another"]
        result = call(command, odd)
        assert result.returncode == 2
        assert result.stderr.endswith("caf\\udce9' is not UTF-8 text; change to another\n")


def test_links_cdpath_and_tmpdir_do_not_matter(tmp_path):
    (tmp_path / "go").symlink_to(ROOT / "run_staged.sh")
    (tmp_path / "go2").symlink_to(ROOT / "run_stage2.sh")
    odd = {"CDPATH": str(tmp_path), "TMPDIR": "/nowhere"}
    (tmp_path / "tests").mkdir()  # where CDPATH would lead
    for command, folder in ((["bash", "./go"], tmp_path), (["bash", "../run_staged.sh"], ROOT / "tests")):
        result = call([*command, "--fps", "0"], folder, **odd)
        refused(result, "--fps 0 is outside 1 to 240")
    refused(
        call(["bash", "./go2", "--video_length", "10"], tmp_path, **odd),
        "--video_length 10 is not 4n+1; the nearest are 9 and 13",
    )


@pytest.mark.parametrize("command", [[*BASH, "--help"], [*BASH, "--only", "1", "--help"], [*STAGE1, "--help"]])
def test_help_where_it_can_hardly_be_written(tmp_path, command):
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "2"}
    result = call(command, tmp_path, **ascii_only)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ")
    result = call(["bash", "-c", 'exec "$@" >/dev/full', "x", *command], tmp_path)
    refused(result, "cannot write to standard output: No space left on device")


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_whole_run_may_lack_a_terminal_altogether(tmp_path, closed):
    """It ended with status 1 after stage 1, without a word: there was no standard output to flush."""
    small = ["--video_length", "5", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "run")]
    result = call(["bash", "-c", f'exec "$@" {closed}', "x", *BASH, *small], tmp_path)
    assert (result.returncode, result.stdout, "Traceback" in result.stderr) == (0, "", False)
    assert (tmp_path / "run" / "output_video.mp4").read_bytes()[4:8] == b"ftyp"
    for command in (
        [*BASH, "--only", "3", "--input_dir", str(tmp_path / "run")],
        [*BASH, "--dry_run"],
        [*BASH, "--help"],
    ):
        result = call(["bash", "-c", f'exec "$@" {closed}', "x", *command], tmp_path)
        assert (result.returncode, result.stdout, "Traceback" in result.stderr) == (0, "", False), command


@pytest.mark.parametrize("count", ["1", "2"])
def test_what_cannot_write_the_video_is_told_before_the_latents_are_made(tmp_path, count):
    """It was told after them: after an hour, with real weights. A draft writes no video, and so needs none."""
    folder = tmp_path / "run"
    small = ["--video_length", "5", "--num_inference_steps", "2", "--gpus", count, "--output_dir", str(folder)]
    result = call([*BASH, *small], tmp_path, IMAGEIO_FFMPEG_EXE="/nowhere/ffmpeg")
    message = "error: /nowhere/ffmpeg is no ffmpeg that works: No such file or directory; see IMAGEIO_FFMPEG_EXE"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (2, message)
    assert {path.name for path in folder.iterdir()} == {contract.EMBEDDINGS_FILE, contract.CONFIG_FILE}
    result = call([*BASH, *small, "--stop_after", "1"], tmp_path, IMAGEIO_FFMPEG_EXE="/nowhere/ffmpeg")
    assert result.returncode == 0 and (folder / contract.STATE_FILE).exists(), result.stderr


def test_a_refusal_is_no_fault_where_its_line_cannot_be_written(tmp_path):
    result = call(["bash", "-c", 'exec "$@" >&- 2>&-', "x", *STAGE1, "--sede", "1"], tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_a_prompt_may_be_a_flags_name(tmp_path):
    """--help anywhere showed the help."""
    result = call([*BASH, "--prompt", "--help", "--negative_prompt", "--gpus", "--fps", "0"], tmp_path)
    refused(result, "--fps 0 is outside 1 to 240")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("tenths", [1, 2, 3, 4])
def test_a_signal_in_the_first_moments_is_one_line(tmp_path, number, tenths):
    """It was a traceback and status 1. Whenever it comes, even before the launcher listens: status, no traceback."""
    environment = os.environ | {"PYTHON": sys.executable}
    process = subprocess.Popen(
        BASH,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    time.sleep(tenths / 10)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    # A shell that has not come to its last line dies of the signal itself.
    assert process.returncode in (128 + number, -number), said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


# Runs a script as Python would, with a signal to itself as it looks for a module.
AT_AN_IMPORT = """
import os, runpy, sys
number, module, script, *flags = sys.argv[1:]
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Finder())
sys.path.insert(0, os.path.dirname(script))
sys.argv[:] = [script, *flags]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("stage", "module"),
    [
        *((stage, module) for stage in STAGES for module in ("utils", "hunyuan_staged.options", "torch")),
        ("stage1_text_encoder", "numpy"),  # torch swallows what is raised there, and gives an error of its own later on
        ("stage1_text_encoder", "torch.nn"),
        ("stage1_text_encoder", "transformers"),  # by then the folder is made, and locked
    ],
)
def test_a_signal_within_an_import_is_one_line(tmp_path, number, stage, module):
    """Before the script listened: a traceback. Afterwards: swallowed, and the stage went on, or aborted, with -6."""
    script = [sys.executable, "-c", AT_AN_IMPORT, str(int(number)), module, str(ROOT / f"{stage}.py")]
    inputs = [] if stage == STAGES[0] else ["--input_dir", str(tmp_path)]
    process = subprocess.run(
        [*script, *inputs],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=heed_interrupts,
    )
    assert process.returncode == 128 + number, process.stderr
    told = [line for line in process.stderr.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert told == [f"error: stage {stage[5]} was interrupted by {number.name}; run the same command again"]
    assert not list(tmp_path.iterdir())
