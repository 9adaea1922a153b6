"""Errors in one line, and what every tool makes of them."""

import argparse
import importlib
import re
import sys

import pytest
from conftest import ROOT

from hunyuan_staged.errors import InputError, run_tool
from hunyuan_staged.parsing import tool_parser

TOOLS = ("bench", "calibrate", "compare", "download", "fit_preview", "verify")
TOOLS += tuple(f"demo.{name}" for name in ("adapter", "caches", "evaluate", "quality", "train"))


def parser() -> argparse.ArgumentParser:
    return tool_parser("a.tool", "What it does.")


@pytest.mark.parametrize(("gives", "status"), [(None, 0), (0, 0), (1, 1)])
def test_a_tool_ends_with_what_its_run_gives(gives, status):
    assert run_tool(parser(), lambda args: gives, []) == status


@pytest.mark.parametrize("debug", [False, True])
def test_bad_input_is_one_line_and_with_debug_its_traceback_before_it(debug, capsys):
    def run(args):
        raise InputError("9 is odd;\nallowed are even numbers", option="count")

    assert run_tool(parser(), run, ["--debug"] * debug) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line == "error: --count 9 is odd; allowed are even numbers"
    assert bool(before) == debug and before[:1] == ["Traceback (most recent call last):"] * debug


@pytest.mark.parametrize("quoted", ["x", "é", "\x1b", "\n a", "猫"])
def test_no_line_is_longer_than_2000_characters_whatever_it_quotes(quoted, capsys):
    """Control characters grow to four each."""

    def run(args):
        raise InputError(f"{quoted * 100_000} is too much; allowed is less", option="much")

    assert run_tool(parser(), run, []) == 2
    error = capsys.readouterr().err
    assert len(error) < 2000 and error.count("\n") == 1
    assert error.startswith("error: --much ") and error.endswith(" is too much; allowed is less\n")


def test_every_error_is_printed_at_one_place():
    """Which gives it its limit."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "hunyuan_staged").rglob("*.py")]
    found = [path.relative_to(ROOT).as_posix() for path in sources if re.search(r"[\"']error: ", path.read_text())]
    assert found == ["hunyuan_staged/errors.py"]
    assert (ROOT / "hunyuan_staged" / "errors.py").read_text().count('"error: ') == 1


def test_ctrl_c_is_one_line(capsys):
    def run(args):
        raise KeyboardInterrupt

    assert run_tool(parser(), run, [], interrupted="the work was interrupted") == 130
    assert capsys.readouterr().err == "error: the work was interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_tool(parser(), lambda args: 1 // 0, [])


def test_help_ends_a_tool_well(capsys):
    assert run_tool(parser(), lambda args: 1, ["--help"]) == 0
    assert "usage: python -m a.tool" in capsys.readouterr().out


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_refuses_a_wrong_flag_in_one_line(tool, capsys, monkeypatch):
    inside = tool in ("bench", "compare", "download", "verify")
    module = importlib.import_module(f"hunyuan_staged.{tool}" + ".command" * inside)
    monkeypatch.setattr(sys, "argv", [tool, "--nonsense"])
    assert module.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(f" (see python -m hunyuan_staged.{tool} --help)")
