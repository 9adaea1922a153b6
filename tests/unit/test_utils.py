"""What the scripts share: refusals in one line, statuses, the closing report, and the flags of a whole run."""

import argparse
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import utils
from hunyuan_staged import parsing
from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.options import RunOptions
from hunyuan_staged.pipeline.common import torch_dtype

ARGS = argparse.Namespace(debug=False)


def test_one_line_keeps_no_control_characters():
    assert utils.one_line("a\n b\tc") == "a b c"
    assert utils.one_line("red\x1b[31m") == "red\\x1b[31m"


def test_dtypes():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert torch_dtype("auto", cpu) == torch.float32
    assert torch_dtype("auto", cuda) == torch.bfloat16
    assert torch_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="dtype 'int4' is unknown; known: bf16, fp32, auto"):
        torch_dtype("int4", cpu)


def test_a_stage_reports_its_files_parts_and_memory(capfd):
    def body(run, checked):
        assert checked == 7
        with run.timed("load"):
            pass
        assert list(run.progress(range(3), desc="counting", unit="thing")) == [0, 1, 2]
        run.add_output("out.bin", "nothing [0]")

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


def test_debug_shows_the_traceback_and_keeps_the_status(capfd):
    def fail(_):
        raise InputError("bad")

    assert utils.run_stage("stage x", argparse.Namespace(debug=True), check=fail, body=lambda *_: None) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == ["hunyuan_staged.errors.InputError: bad", "error: bad"]


def test_our_own_faults_keep_their_traceback():
    def fail(*_):
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        utils.run_stage("stage x", ARGS, body=fail)


def test_ctrl_c_is_status_130(capfd):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert utils.run_stage("stage x", ARGS, body=interrupt) == 130
    assert capfd.readouterr().err == "error: stage x was interrupted by SIGINT; run the same command again\n"


def test_only_one_process_runs_a_stage_for_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")

    def never(*_):
        raise AssertionError("rank 1 has nothing to do")

    assert utils.run_stage("stage x", ARGS, body=never, every_rank=False) == 0


@pytest.fixture
def second_process(monkeypatch):
    """This process as torchrun's rank 1; returns the pauses that it made."""
    pauses: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(parsing.time, "sleep", pauses.append)
    return pauses


def test_a_second_process_is_silent_and_leaves_the_first_the_time_to_speak(second_process, capfd):
    """torchrun ends all processes when one ends badly; the line was lost where rank 1 was the quicker one."""

    def fail(_):
        raise InputError("bad")

    assert utils.run_stage("stage x", ARGS, check=fail, body=lambda *_: None) == 2
    assert second_process == [parsing.SILENCE_SECONDS]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--sede", 2)])
def test_the_parser_of_a_second_process_is_silent(second_process, capfd, flag, status):
    with pytest.raises(SystemExit) as left:
        parsing.make_parser(RunOptions, "x.py", "does x", "example").parse_args([flag])
    assert left.value.code == status
    told = capfd.readouterr()
    assert told.out + told.err == ""
    assert len(second_process) == (status == 2)


def test_bytes_that_are_no_text_are_refused_by_name(capsys):
    """They came to a traceback in the tokenizer, or when the config was written."""
    parser = parsing.make_parser(RunOptions, "x.py", "does x", "example")
    parser.add_argument("--prompt")
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--prompt", "caf\udce9"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: argument 'caf\\udce9' is not UTF-8 text (see x.py --help)\n"
    assert parser.parse_args(["--prompt", "café 猫\n"]).prompt == "café 猫\n"


def test_an_output_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/x/y"):
        with pytest.raises(InputError, match=f"--output_dir {tmp_path / name}: {tmp_path / 'file'} is not a folder"):
            check_output_dir("--output_dir", tmp_path / name)
    check_output_dir("--output_dir", tmp_path / "new" / "x")
    check_output_dir("--output_dir", "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match=f"--output_dir {tmp_path}/new: {tmp_path} cannot be written"):
        check_output_dir("--output_dir", tmp_path / "new")


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


def test_check_is_what_the_stage_itself_would_say(capsys):
    assert utils.main(["check", "3", "--fps", "12"]) == 0
    with pytest.raises(SystemExit) as left:
        utils.main(["check", "3", "--fps", "0"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --fps 0 is outside 1 to 240\n"
    with pytest.raises(SystemExit) as left:
        utils.main(["check", "3", "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: stage3_vae_decoder.py ")


def test_abbreviated_flags_are_refused(capsys):
    from stage2_transformer import build_parser

    with pytest.raises(SystemExit) as left:
        build_parser().parse_args(["--vid", "9"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --vid 9 (see stage2_transformer.py --help)\n"
