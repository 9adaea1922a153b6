"""What the scripts share: refusals in one line, statuses, the closing report, and the flags of a whole run."""

import argparse
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import utils
from hunyuan_staged import InputError

ARGS = argparse.Namespace(debug=False)


def test_one_line_keeps_no_control_characters():
    assert utils.one_line("a\n b\tc") == "a b c"
    assert utils.one_line("red\x1b[31m") == "red\\x1b[31m"


def test_dtypes():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert utils.torch_dtype("auto", cpu) == torch.float32
    assert utils.torch_dtype("auto", cuda) == torch.bfloat16
    assert utils.torch_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="dtype 'int4' is unknown; known: bf16, fp32, auto"):
        utils.torch_dtype("int4", cpu)


def test_a_stage_reports_its_files_parts_and_memory(capfd):
    def body(run, checked):
        assert checked == 7
        with run.part("load"):
            pass
        assert list(run.progress(range(3), desc="counting", unit="thing")) == [0, 1, 2]
        run.wrote("out.bin", "nothing [0]")

    assert utils.run_stage("stage x", ARGS, check=lambda _: 7, body=body) == 0
    told = capfd.readouterr().err
    assert "wrote out.bin: nothing [0]" in told
    assert "stage x done: load 0.0 s; peak memory: host " in told
    assert "counting: 100%" in told


@pytest.mark.parametrize("where", ["check", "body"])
def test_bad_input_is_one_line_and_status_2(capfd, where):
    def fail(*_):
        raise InputError("--flag 3 is not\n4")

    calls = {"check": None, "body": lambda *_: None} | {where: fail}
    assert utils.run_stage("stage x", ARGS, **calls) == 2
    assert capfd.readouterr().err.splitlines() == ["error: --flag 3 is not 4"]


def test_debug_shows_the_traceback():
    def fail(_):
        raise InputError("bad")

    with pytest.raises(InputError, match="bad"):
        utils.run_stage("stage x", argparse.Namespace(debug=True), check=fail, body=lambda *_: None)


def test_our_own_faults_keep_their_traceback():
    def fail(*_):
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        utils.run_stage("stage x", ARGS, body=fail)


def test_ctrl_c_is_status_130(capfd):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert utils.run_stage("stage x", ARGS, body=interrupt) == 130
    assert capfd.readouterr().err == "error: stage x was interrupted\n"


def test_only_one_process_runs_a_stage_for_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")

    def never(*_):
        raise AssertionError("rank 1 has nothing to do")

    assert utils.run_stage("stage x", ARGS, body=never, every_rank=False) == 0


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
        (["--debug", "--save_frames"], ["--debug"], ["--debug", *FOLDER], ["--debug", "--save_frames", *FOLDER]),
    ],
)
def test_each_stage_gets_the_flags_that_are_its_own(given, stage1, stage2, stage3):
    assert utils.split_flags(given) == [stage1, stage2, stage3]


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
        utils.split_flags(given)


def test_split_is_refused_in_one_line(tmp_path):
    command = [sys.executable, "utils.py", "split", str(tmp_path), "--video_length", "ten"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "error: argument --video_length: invalid int value: 'ten' (see stage2_transformer.py --help)\n"
    )
    assert not list(tmp_path.iterdir())


def test_abbreviated_flags_are_refused(capsys):
    from stage2_transformer import build_parser

    with pytest.raises(SystemExit) as left:
        build_parser().parse_args(["--vid", "9"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --vid 9 (see stage2_transformer.py --help)\n"
