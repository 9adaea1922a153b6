"""Locks where something else is in the way: nothing of anyone else's is changed, and the reason is one line."""

import os
import resource
from pathlib import Path

import pytest

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import atomic

LOCK = ".lock"


def refused(folder: Path, match: str, *files: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match=match), atomic.locked(folder / LOCK, files):
        raise AssertionError("it was locked")
    assert sorted(folder.iterdir()) == before


def test_a_hard_link_in_the_locks_place_does_not_lead_to_its_file(tmp_path):
    """What the lock says was written into it."""
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir()
    os.link(precious, folder / LOCK)
    refused(folder, r"run/\.lock is no lock of a run but something else, or a link to it; remove it$")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_something_else_in_the_locks_place(tmp_path, make):
    make(tmp_path / LOCK)
    refused(tmp_path, r"\.lock")


def test_a_folder_named_like_a_leftover_stays(tmp_path):
    folder = tmp_path / ".a.abcd1234.mp4"
    folder.mkdir()
    (tmp_path / ".a.abcd5678.mp4").touch()
    with atomic.locked(tmp_path / LOCK, ["a.mp4"]):
        pass
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_in_a_files_place_is_found_before_the_work(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    refused(tmp_path, r"a\.mp4 is a folder, in the place of a file to be written$", "a.mp4")


@pytest.mark.parametrize("folder", ["here", "here/new/newer"])
def test_not_a_byte_can_be_written(tmp_path, folder):
    """A disk that is full to the last byte, or RLIMIT_FSIZE 0."""
    (tmp_path / "here").mkdir()
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, former[1]))
    try:
        with (
            pytest.raises(InputError, match=rf"^cannot write to {tmp_path}/{folder}: File too large$"),
            atomic.locked(tmp_path / folder / LOCK, ["a"]),
        ):
            raise AssertionError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert list((tmp_path / "here").iterdir()) == []
