"""What the scripts share: refusals in one line, statuses, the closing report, and the flags of a whole run."""

import argparse
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import utils
from hunyuan_staged import parsing
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import atomic
from hunyuan_staged.files.atomic import check_output_dir
from hunyuan_staged.pipeline.common import torch_dtype
from hunyuan_staged.run_options import RunOptions
from hunyuan_staged.runtime import failure
from hunyuan_staged.runtime.environment import WHOLE_RUN

ARGS = argparse.Namespace(debug=False, log_json=None)


def as_rank_1_of_2(monkeypatch):
    """torchrun's environment of a second process."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_one_line_keeps_no_control_characters():
    assert utils.one_line("a\n b\tc") == "a b c"
    assert utils.one_line("red\x1b[31m") == "red\\x1b[31m"


def test_no_line_of_the_log_is_longer_than_2000_characters(capfd):
    def body(run, _):
        run.info("a" * 100_000)
        run.warn("\x1b" * 100_000)
        run.add_output("b" * 100_000, "nothing [0]")

    assert utils.run_stage("stage x", ARGS, body=body) == 0
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if " […] " in line]) == 3
    assert max(map(len, lines)) < 2000


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


@pytest.mark.parametrize("whole", [False, True])
def test_a_stage_run_by_itself_names_the_next_command_and_prints_the_path(capfd, monkeypatch, tmp_path, whole):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(WHOLE_RUN, raising=False)
    if whole:
        monkeypatch.setenv(WHOLE_RUN, repr(time.monotonic() - 3600))

    def body(run, _):
        run.next_stage(3, ["--input_dir=a folder"])
        run.add_video(Path("clip.mp4"), 33, 24)

    assert utils.run_stage("stage x", ARGS, body=body) == 0
    told = capfd.readouterr()
    assert told.out == ("" if whole else f"{tmp_path}/clip.mp4\n")
    assert (f"next: bash {ROOT}/run_stage3.sh '--input_dir=a folder'\n" in told.err) != whole
    seconds = re.search(rf"video {tmp_path}/clip.mp4: 1.38 s, 33 frames; (\d+\.\d) s in all\n", told.err)
    assert seconds, told.err
    assert (float(seconds[1]) >= 3600) == whole, "those of the whole run"


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

    assert (
        utils.run_stage("stage x", argparse.Namespace(debug=True, log_json=None), check=fail, body=lambda *_: None) == 2
    )
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
    as_rank_1_of_2(monkeypatch)

    def never(*_):
        raise AssertionError("rank 1 has nothing to do")

    assert utils.run_stage("stage x", ARGS, body=never, every_rank=False) == 0


@pytest.fixture
def second_process(monkeypatch):
    """This process as torchrun's rank 1; returns the pauses that it made."""
    pauses: list[float] = []
    as_rank_1_of_2(monkeypatch)
    monkeypatch.setattr(failure.time, "sleep", pauses.append)
    return pauses


def test_a_second_process_is_silent_and_leaves_the_first_the_time_to_speak(second_process, capfd):
    """torchrun ends all processes when one ends badly; the line was lost where rank 1 was the quicker one."""

    def fail(_):
        raise InputError("bad")

    assert utils.run_stage("stage x", ARGS, check=fail, body=lambda *_: None) == 2
    assert second_process == [failure.SILENCE_SECONDS]
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
    monkeypatch.setattr(atomic.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match=f"--output_dir {tmp_path}/new: {tmp_path} cannot be written"):
        check_output_dir("--output_dir", tmp_path / "new")


def test_abbreviated_flags_are_refused(capsys):
    from stage2_transformer import build_parser

    with pytest.raises(SystemExit) as left:
        build_parser().parse_args(["--vid", "9"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --vid 9 (see stage2_transformer.py --help)\n"
