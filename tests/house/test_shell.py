"""The shell scripts work with macOS's bash, 3.2: they use nothing that came later, nor what its tools lack."""

import re
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("*.sh"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run", ROOT / ".ci" / "environment.sh"])
LATER = {
    r"\b(mapfile|readarray)\b": "mapfile -t lines < file",
    r"\b(declare|local|typeset) -[a-zA-Z]*[Agn]": "declare -A table",
    r"\bcoproc\b": "coproc cat",
    r"\bwait -n\b": "wait -n",
    r"\$\{\w+(\[[^]]*\])?[,^]": "echo ${name,,}",
    r"\$\{\w+(\[[^]]*\])?@[A-Za-z]\}": "echo ${name@Q}",
    r"\$\{\w+:[^}:]*:\s*-": "echo ${name:0:-1}",
    # Without elements an error under set -u, before 4.4.
    r"\$\{\w+\[[@*]\]\}": 'run "${words[@]}"',
    r"\{\w+\}[<>]": "exec {log}>file",
    r"&>>|\|&": "make |& tee log",
    r";;?&": "a) one ;;&",
    r"\[\[ -v |\btest -v ": "[[ -v name ]]",
    r"%\([^)]*\)T": "printf '%(%s)T' -1",
    r"\b(EPOCHSECONDS|EPOCHREALTIME|BASHPID|SRANDOM)\b": "echo $EPOCHSECONDS",
    r"\b(globstar|lastpipe|inherit_errexit)\b": "shopt -s globstar",
    r"\breadlink -[a-z]*[fe]|\brealpath\b": 'readlink -f "$0"',
    r"\b(grep -[a-zA-Z]*P|sed -i\b|date -d\b|stat -c\b)": "grep -oP x file",
}


def later(text: str) -> list[str]:
    """What of LATER a script uses, outside its comments."""
    code = "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines())
    return [found[0] for pattern in LATER for found in re.finditer(pattern, code)]


@pytest.mark.parametrize("example", LATER.values())
def test_what_came_later_is_found(example):
    assert later(f"set -eu\n{example}\n")
    assert not later(f"set -eu # {example}\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_needs_no_newer_bash(script):
    assert later(script.read_text(encoding="utf-8")) == []
    subprocess.run(["bash", "-n", script], check=True)


def test_no_script_is_left_out():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    shell = {
        name for name in tracked if name.endswith(".sh") or (ROOT / name).read_bytes()[:19] == b"#!/usr/bin/env bash"
    }
    assert shell == {path.relative_to(ROOT).as_posix() for path in SCRIPTS}
