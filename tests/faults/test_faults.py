"""Whatever happens: killed processes, lost ranks, full disks, two runs at once, files that do not belong together."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from folders import embed
from forked import Forked, Moment, SmallDisk, alive, heed_interrupts, run_ranks, run_stage

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import atomic, contract, provenance
from hunyuan_staged.files.config import read_config
from hunyuan_staged.files.tensors import (
    load_embeddings,
    load_latents,
    load_state,
    load_tensors,
    save_embeddings,
    save_tensors,
)

SMALL = ["--video_length", 5, "--num_inference_steps", 8]
STEP = "hunyuan_staged.sampling.loop.euler_step"
TIMES = ("stage2_elapsed_time", "stage3_decode_time", "output_video")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def calls(model: Path, folder: Path) -> dict[int, list[object]]:
    """The arguments of the three stages of one run."""
    return {
        1: ["--model_path", model, "--output_dir", folder, "--prompt", 'a card that says "AB"'],
        2: ["--input_dir", folder, *SMALL, "--checkpoint_every", 2],
        3: ["--input_dir", folder, "--tile_size", 64],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_official) -> tuple[dict[int, Path], dict[int, float]]:
    """A run of all three stages that nothing happened to: the folder after each stage, and how long each took."""
    base = tmp_path_factory.mktemp("whole")
    after, seconds = {0: base / "0"}, {}
    after[0].mkdir()
    folder = base / "run"
    run_stage(1, "--help", said=base / "said")  # so that the first time measured is not that of the imports
    for stage in (1, 2, 3):
        started = time.perf_counter()
        status, said = run_stage(stage, *calls(tiny_official, folder)[stage], said=base / "said")
        seconds[stage] = time.perf_counter() - started
        assert status == 0, said
        after[stage] = shutil.copytree(folder, base / str(stage))
    return after, seconds


def assert_same(folder: Path, expected: Path) -> None:
    """The same files with the same bytes; of the config all but the times."""
    assert names(folder) == names(expected)
    for name in names(folder):
        if name == contract.CONFIG_FILE:
            ours, theirs = (json.loads((place / name).read_text()) for place in (folder, expected))
            assert {k: v for k, v in ours.items() if k not in TIMES} == {
                k: v for k, v in theirs.items() if k not in TIMES
            }
        else:
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("number", range(20))
def test_killed_at_a_random_moment_and_resumed(whole, tmp_path, tiny_official, number):
    """kill -9 at any moment of any stage: the same command (stage 2's with --resume) then gives the same bits."""
    after, seconds = whole
    chance = random.Random(number)
    stage = chance.choices((1, 2, 3), [seconds[stage] for stage in (1, 2, 3)])[0]
    delay = chance.random() * seconds[stage]
    folder = tmp_path / "run"
    said = tmp_path / "said"
    argv = calls(tiny_official, folder)
    status = 0
    while status != 137:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(after[stage - 1], folder)
        forked = Forked(stage, *argv[stage], said=said)
        time.sleep(delay)
        forked.process.kill()
        status = forked.status()
        delay *= 0.8  # it was done already
    more = ["--resume"] if stage == 2 else []
    for then in range(stage, 4):
        status, told = run_stage(then, *argv[then], *(more if then == stage else []), said=said)
        assert status == 0, told
    assert_same(folder, after[3])


# Ranks


def ranks_of(launcher: int, size: int) -> dict[int, int]:
    """Process ids by rank, once all are there."""
    while True:
        found = {}
        for task in Path(f"/proc/{launcher}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                rank = next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)
                if rank is not None:
                    found[rank] = child
        if len(found) == size:
            return found
        time.sleep(0.05)


def launch(size: int, folder: Path, *args: object) -> subprocess.Popen:
    """Stage 2 through its launcher, for so many steps that it does not end by itself; returns once it is in its loop."""
    command = ["bash", ROOT / "run_stage2.sh", "--gpus", size, "--input_dir", folder]
    command += ["--video_length", 5, "--num_inference_steps", 1000, "--checkpoint_every", 1, *args]
    with (folder.parent / "said").open("w") as said:
        environment = os.environ | {"PYTHON": sys.executable}
        words = [str(word) for word in command]
        process = subprocess.Popen(words, stderr=said, env=environment, preexec_fn=heed_interrupts)
    while not (folder / contract.STATE_FILE).exists():
        assert process.poll() is None, (folder.parent / "said").read_text()
        time.sleep(0.05)
    return process


def test_a_killed_rank_of_four_ends_the_run_within_30_seconds(tmp_path, tiny_official):
    folder = embed(tmp_path / "run", tiny_official)
    process = launch(4, folder)
    os.kill(ranks_of(process.pid, 4)[2], signal.SIGKILL)
    started = time.monotonic()
    assert process.wait(60) == 137
    assert time.monotonic() - started < 30
    said = (tmp_path / "said").read_text()
    assert [line for line in errors(said) if "interrupted" not in line] == [
        "error: stage2_transformer.py: process 2 of 4 ended with status -9"
    ]
    assert len(errors(said)) <= 2
    assert "Traceback" not in said
    assert names(folder) == sorted([contract.CONFIG_FILE, contract.EMBEDDINGS_FILE, contract.STATE_FILE])
    assert int(load_state(folder)[1]["step"]) >= 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_stops_all_ranks_after_the_same_step(tmp_path, tiny_official, number, status):
    folder = embed(tmp_path / "run", tiny_official)
    process = launch(2, folder)
    process.send_signal(number)
    assert process.wait(60) == status
    said = (tmp_path / "said").read_text()
    assert len(errors(said)) == 1, said
    match = re.search(
        rf"error: stage 2 was interrupted by {number.name} after step (\d+) of 1000; the same command", said
    )
    assert match, said
    assert load_state(folder)[1]["step"] == match[1]
    assert "Traceback" not in said


@pytest.mark.parametrize("function", [STEP, "hunyuan_staged.weights.loading.require_float"])
def test_a_signal_to_a_whole_group_leaves_no_lock(tmp_path, tiny_official, function):
    """As a terminal's Ctrl-C, or a scheduler: each process gets it at the same moment, in its loop or as it loads."""
    folder = embed(tmp_path / "run", tiny_official)
    moments = {rank: Moment(function, 2, (signal.SIGTERM,)) for rank in range(2)}
    ranks = run_ranks(2, 2, "--input_dir", folder, *SMALL, said=tmp_path / "said", moments=moments)
    assert [rank.status() for rank in ranks] == [143, 143], [rank.said() for rank in ranks]
    told = [line for rank in ranks for line in errors(rank.said())]
    assert len(told) == 1 and told[0].startswith("error: stage 2 was interrupted by SIGTERM"), told
    assert "Traceback" not in "".join(rank.said() for rank in ranks)
    saved = [contract.STATE_FILE] if function == STEP else []
    assert names(folder) == sorted([contract.CONFIG_FILE, contract.EMBEDDINGS_FILE, *saved])


@pytest.mark.parametrize("fault", ["refusal", "fault of ours"])
def test_one_ranks_error_is_said_once_and_ends_all(tmp_path, tiny_official, fault):
    """Rank 1 alone fails; it was silent, for the first rank to speak, which knew of nothing."""
    folder = embed(tmp_path / "run", tiny_official)
    said = tmp_path / "said"
    if fault == "refusal":
        ranks = run_ranks(2, 2, "--input_dir", folder, *SMALL, said=said, more={1: ["--model_path", "/nowhere/at/all"]})
    else:
        # ZeroDivisionError, in the loop, while rank 0 waits for an exchange with rank 1.
        ranks = run_ranks(2, 2, "--input_dir", folder, *SMALL, said=said, moments={1: Moment(STEP, 2, (), fails=True)})
    started = time.monotonic()
    statuses = [rank.status() for rank in ranks]
    assert time.monotonic() - started < 30
    told = [rank.said() for rank in ranks]
    assert "Traceback" not in told[0]
    assert not errors(told[0])
    if fault == "refusal":
        assert statuses == [1, 2]
        assert errors(told[1]) == [
            "error: /nowhere/at/all does not exist, and it is no hub id (owner/name) either; to get it: hf download "
            'tencent/HunyuanVideo-1.5 --include "transformer/720p_t2v/*" "vae/*" "scheduler/*" --local-dir /nowhere/at/all'
        ]
    else:
        assert statuses == [1, 1]
        assert told[1].count("Traceback") == 1
        assert "ZeroDivisionError" in told[1]
    assert contract.LATENTS_FILE not in names(folder)
    assert contract.LOCK_FILE not in names(folder)


# The folder


def test_two_runs_at_once(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[2], tmp_path / "run")
    argv = calls(tiny_official, folder)
    first = Forked(2, *argv[2], said=tmp_path / "first", moment=Moment(STEP, 2, (), pause=600))
    while f"process {first.pid}" not in (
        (folder / contract.LOCK_FILE).read_text() if (folder / contract.LOCK_FILE).exists() else ""
    ):
        assert first.process.is_alive(), first.said()
        time.sleep(0.02)
    for stage in (1, 2, 3):
        before = {name: (folder / name).read_bytes() for name in names(folder)}
        status, said = run_stage(stage, *argv[stage], said=tmp_path / "said")
        assert status == 2, said
        assert len(errors(said)) == 1
        refused = rf"error: {folder} is being written by another run \(process {first.pid} on \S+\); wait for it, or"
        assert re.match(refused, errors(said)[0])
        assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    first.process.kill()
    assert first.status() == 137
    assert contract.LOCK_FILE in names(folder), "it is left behind, and holds nobody up"
    for stage in (2, 3):
        status, said = run_stage(stage, *argv[stage], said=tmp_path / "said")
        assert status == 0, said
    assert_same(folder, after[3])


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    kept = [".stage2_latents.abcd1234.mp4", ".stage2_latents.safetensors", ".stage2_latents.ABCD1234.safetensors"]
    for name in [*kept, ".stage2_latents.abcd12_4.safetensors", ".generation_config.zzzzzzzz.json"]:
        (tmp_path / name).touch()
    with atomic.locked(tmp_path / contract.LOCK_FILE, contract.STAGE_FILES[2]):
        assert names(tmp_path) == sorted([*kept, contract.LOCK_FILE])
        assert (tmp_path / contract.LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert names(tmp_path) == sorted(kept)


def test_a_claim_makes_its_folder_and_takes_it_away_again(tmp_path):
    with atomic.locked(tmp_path / "a" / "b" / contract.LOCK_FILE, []):
        assert names(tmp_path / "a" / "b") == [contract.LOCK_FILE]
        with (
            pytest.raises(InputError, match=rf"a/b is being written by another run \(process {os.getpid()} on "),
            atomic.locked(tmp_path / "a" / "b" / contract.LOCK_FILE, []),
        ):
            raise AssertionError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("stage", "size", "message"),
    [
        (1, 100_000, "{target}/stage1_embeddings.safetensors"),
        (2, 8192, "{target}/stage2_latents.safetensors"),
        (3, 8192, "{target}/a.mp4"),
    ],
)
def test_a_full_disk(whole, tmp_path, tiny_official, stage, size, message):
    after, _ = whole
    target = tmp_path / "small"
    target.mkdir()
    source = shutil.copytree(after[stage - 1], tmp_path / "source")
    argv = calls(tiny_official, source)[stage]
    if stage == 1 or stage == 2:
        argv += ["--output_dir", target]
    else:
        argv += ["--output_video", target / "a.mp4"]
    status, said = run_stage(stage, *argv, said=tmp_path / "said", disk=SmallDisk(target, size))
    assert status == 2, said
    assert len(errors(said)) == 1, said
    assert message.format(target=target) in errors(said)[0]
    assert re.search("No space left on device|File too large|os error 2[78]", errors(said)[0]), said
    assert "Traceback" not in said
    assert "left: []" in said
    assert names(source) == names(after[stage - 1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_disk_that_cannot_be_written(whole, tmp_path, tiny_official, stage):
    """A file system mounted read-only, which no check of rights would tell of; without mounting a folder of /proc."""
    after, _ = whole
    source = shutil.copytree(after[stage - 1], tmp_path / "source")
    target = Path("/proc/self/fdinfo")
    flag = "--output_video" if stage == 3 else "--output_dir"
    argv = [*calls(tiny_official, source)[stage], flag, target / "a.mp4" if stage == 3 else target]
    status, said = run_stage(stage, *argv, said=tmp_path / "said")
    assert status == 2, said
    assert len(errors(said)) == 1
    assert str(target) in errors(said)[0]
    assert "Traceback" not in said
    assert "loading" not in said
    assert names(source) == names(after[stage - 1])


def refused(stage: int, argv: list[object], folder: Path, message: str, said: Path, **how: object) -> None:
    """One line that says this, status 2, before any weights are read, and the folder is as it was."""
    before = {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}
    status, told = run_stage(stage, *argv, said=said, **how)
    assert status == 2, told
    assert len(errors(told)) == 1 and message in errors(told)[0], told
    assert "Traceback" not in told and "loading" not in told
    assert {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()} == before


def test_a_disk_that_is_full_to_the_last_byte(whole, tmp_path, tiny_official):
    """There is room for the lock, and none for what it says."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    after, _ = whole
    folder = shutil.copytree(after[1], tmp_path / "run")
    target = tmp_path / "small"
    target.mkdir()
    disk = SmallDisk(target, 4096, filled=True)
    argv = [*calls(tiny_official, folder)[2], "--output_dir", target]
    refused(2, argv, folder, f"cannot write to {target}: ", tmp_path / "said", disk=disk)


LANGUAGE, DIT = "model/text_encoder/llm", "model/transformer/demo_t2v"
NO_READING = "{path} cannot be read (Permission denied)"
# (stage, the place, its rights, the whole line after "error: ", in which {path} is the place).
DENIED = [
    (1, "model", 0, "{path}/transformer/config.json: Permission denied"),
    (1, "model/text_encoder", 0, "{path}/llm: Permission denied"),
    (1, f"{LANGUAGE}/tokenizer.json", 0, NO_READING),
    (1, f"{LANGUAGE}/model-00001-of-00002.safetensors", 0, NO_READING),
    (1, "run/generation_config.json", 0, NO_READING),
    (1, "run", 0o500, "--output_dir {path}: {path} cannot be written"),
    (1, "run", 0o300, "cannot write to {path}: Permission denied"),
    (2, "run", 0, "{path}/generation_config.json: Permission denied"),
    (2, "run", 0o500, "cannot write to {path}: Permission denied (.lock)"),
    (2, "run", 0o300, "cannot write to {path}: Permission denied"),
    (2, "run/generation_config.json", 0, NO_READING),
    (2, "run/stage1_embeddings.safetensors", 0, NO_READING),
    (2, "out", 0o500, "--output_dir {path}: {path} cannot be written"),
    (2, "out", 0o600, "--output_dir {path}: {path} cannot be written"),
    (2, "model", 0, "{path}/transformer/config.json: Permission denied"),
    (2, "model/transformer", 0o600, "{path}/config.json: Permission denied"),
    (2, DIT, 0, "{path}: Permission denied"),
    (2, f"{DIT}/config.json", 0, NO_READING),
    (2, f"{DIT}/diffusion_pytorch_model.safetensors", 0, NO_READING),
    (3, "run/stage2_latents.safetensors", 0, NO_READING),
    (3, "run/generation_config.json", 0, NO_READING),
    (3, "model/vae", 0, "{path}/config.json cannot be read (Permission denied)"),
    (3, "model/vae/config.json", 0, NO_READING),
    (3, "model/vae/diffusion_pytorch_model.safetensors", 0, NO_READING),
    (3, "out", 0o500, "--output_video {path}: {path} cannot be written"),
    (3, "out", 0o600, "--output_video {path}/a.mp4: Permission denied"),
]


def with_rights(
    whole, tmp_path: Path, tiny_official: Path, stage: int, path: str, mode: int | None
) -> tuple[int, str, Path]:
    """(status, what it said, its folder) of a stage that is denied what the rights of files deny.

    path: what gets the rights `mode`, None: those that it has: the model, of which the run then has a copy, the run's
    folder, or one for its output.
    """
    after, _ = whole
    folder = shutil.copytree(after[stage - 1], tmp_path / "run")
    model = tiny_official
    if path.startswith("model"):
        model = Path(shutil.copytree(tiny_official, tmp_path / "model", copy_function=os.link))
    argv = calls(model, folder)[stage]
    if stage == 1:
        (folder / contract.CONFIG_FILE).write_text("{}")
    else:
        argv += ["--model_path", model]
    if path == "out":
        (tmp_path / "out").mkdir()
        argv += ["--output_video", tmp_path / "out/a.mp4"] if stage == 3 else ["--output_dir", tmp_path / "out"]
    place = tmp_path / path
    if place.is_file():  # else the shared one's rights would change
        raw = place.read_bytes()
        place.unlink()
        place.write_bytes(raw)
    former = place.stat().st_mode
    place.chmod(former if mode is None else mode)
    try:
        status, told = run_stage(stage, *argv, said=tmp_path / "said", denied=True)
    finally:
        place.chmod(former)
    return status, told, folder


@pytest.mark.parametrize(("stage", "path", "mode", "message"), DENIED)
def test_permission_denied_anywhere(whole, tmp_path, tiny_official, stage, path, mode, message):
    """Of thirteen places each was a traceback; of three, later on, the line gave another reason."""
    status, told, folder = with_rights(whole, tmp_path, tiny_official, stage, path, mode)
    assert status == 2, told
    assert errors(told) == [f"error: {message.format(path=tmp_path / path)}"]
    assert "Traceback" not in told and "loading" not in told
    before = whole[0][stage - 1]
    if stage > 1:
        assert_same(folder, before)
    else:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {contract.CONFIG_FILE: "{}"}
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


@pytest.mark.parametrize(
    ("stage", "path"), sorted({(stage, path.partition("/")[0]) for stage, path, _, _ in DENIED}), ids=str
)
def test_with_all_rights_the_same_run_goes_through(whole, tmp_path, tiny_official, stage, path):
    """Else the cases above could be refused for another reason."""
    status, told, _ = with_rights(whole, tmp_path, tiny_official, stage, path, None)
    assert status == 0, told


def test_a_folder_in_the_videos_place_is_found_before_the_decoding(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[2], tmp_path / "run")
    (folder / contract.VIDEO_FILE).mkdir()
    refused(3, calls(tiny_official, folder)[3], folder, f"{contract.VIDEO_FILE} is a folder", tmp_path / "said")


@pytest.mark.parametrize("script", ["exit 0", "exit 1"])
def test_an_ffmpeg_that_does_not_work_is_found_before_the_decoding(whole, tmp_path, tiny_official, script):
    after, _ = whole
    folder = shutil.copytree(after[2], tmp_path / "run")
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    forked = Forked(3, *calls(tiny_official, folder)[3], said=tmp_path / "said", IMAGEIO_FFMPEG_EXE=str(program))
    assert forked.status() == 2, forked.said()
    assert errors(forked.said()) == [
        f"error: {program} cannot encode with libx264: it gave no reason; see IMAGEIO_FFMPEG_EXE"
    ]
    assert "loading" not in forked.said()
    assert names(folder) == names(after[2])


def children(parent: int, program: str) -> list[int]:
    """The ids of a process's children that run a program of this name."""
    found = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            with contextlib.suppress(OSError):  # it has ended
                if program in Path(f"/proc/{child}/exe").readlink().name:
                    found.append(child)
    return found


def test_no_ffmpeg_outlives_a_killed_run(whole, tmp_path, tiny_official):
    """Nobody can tell it: it ends because its input does, which no other process holds open."""
    after, _ = whole
    folder = shutil.copytree(after[2], tmp_path / "run")
    argv = calls(tiny_official, folder)[3]
    moment = Moment("hunyuan_staged.decoding.blending.blend", 1, (), pause=600)
    killed = Forked(3, *argv, said=tmp_path / "said", moment=moment)
    while not (found := [child for child in children(killed.pid, "ffmpeg") if is_writing(child, folder)]):
        assert killed.process.is_alive(), killed.said()
        time.sleep(0.02)
    killed.process.kill()
    assert killed.status() == 137
    deadline = time.monotonic() + 60
    while alive(found[0]):
        assert time.monotonic() < deadline, "it waits for more frames"
        time.sleep(0.02)
    status, told = run_stage(3, *argv, said=tmp_path / "said")
    assert status == 0, told
    assert_same(folder, after[3])


def is_writing(process: int, folder: Path) -> bool:
    """Whether a program was given a file of this folder; the trial of an encoder is not."""
    try:
        return bytes(folder) in Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def test_a_broken_config_is_found_before_the_embeddings_are_replaced(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[1], tmp_path / "run")
    (folder / contract.CONFIG_FILE).write_text("{")
    argv = ["--model_path", tiny_official, "--output_dir", folder, "--prompt", "another"]
    refused(1, argv, folder, f"{contract.CONFIG_FILE} is not JSON", tmp_path / "said")


def test_a_video_that_another_run_decodes_is_not_taken_from_it(whole, tmp_path, tiny_official):
    """--output_video in the folder of a run that decodes removed that run's file under way."""
    after, _ = whole
    folder, other = (shutil.copytree(after[2], tmp_path / name) for name in ("run", "other"))
    moment = Moment("hunyuan_staged.decoding.tiled.decode_frames", 1, (), pause=600)
    first = Forked(3, *calls(tiny_official, folder)[3], said=tmp_path / "first", moment=moment)
    under_way = folder / ".output_video.abcd1234.mp4"
    while "INFO    latents [" not in first.said():  # it has the lock, and has cleaned up
        assert first.process.is_alive(), first.said()
        time.sleep(0.02)
    under_way.touch()
    argv = calls(tiny_official, other)[3]
    there = ["--output_video", folder / contract.VIDEO_FILE]
    refused(3, [*argv, *there], other, f"(process {first.pid} on", tmp_path / "said")
    assert under_way.exists()
    status, told = run_stage(3, *argv, "--output_video", folder / "b.mp4", said=tmp_path / "said")
    assert status == 0, told
    assert under_way.exists() and (folder / "b.mp4").exists()
    first.process.kill()
    assert first.status() == 137
    status, told = run_stage(3, *argv, *there, said=tmp_path / "said")
    assert status == 0, told
    assert not under_way.exists()


# What belongs together


def test_embeddings_of_another_run(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[1], tmp_path / "run")
    tensors, metadata = load_embeddings(folder)
    argv = calls(tiny_official, folder)[2]
    old = read_config(folder)["embeddings_sha256"]
    save_embeddings(folder, tensors | {"prompt_embeds": tensors["prompt_embeds"] * 2}, metadata)
    new = provenance.sha256(folder / contract.EMBEDDINGS_FILE)
    reason = (
        f"{folder}/stage1_embeddings.safetensors (sha256 {new[:12]}…) does not belong to "
        f"{folder}/generation_config.json, which was written with sha256 {old[:12]}…"
    )
    status, said = run_stage(2, *argv, "--strict", said=tmp_path / "said")
    assert status == 2
    assert errors(said) == [f"error: {reason}; --strict refuses that"]
    assert contract.LATENTS_FILE not in names(folder)
    status, said = run_stage(2, *argv, said=tmp_path / "said")
    assert status == 0, said
    assert f"WARNING {reason}" in said


def test_embeddings_without_a_hash_are_judged_by_their_prompt(tmp_path, tiny_official):
    folder = embed(tmp_path, tiny_official, {"prompt": "another prompt"})
    config = read_config(folder)
    _, metadata = load_embeddings(folder)
    reason = provenance.embeddings_mismatch(folder, config, metadata, "0" * 64)
    assert reason == (
        f"{folder}/stage1_embeddings.safetensors (prompt 'a') does not belong to "
        f"{folder}/generation_config.json (prompt 'another prompt')"
    )
    assert provenance.embeddings_mismatch(folder, config | {"prompt": "a"}, metadata, "0" * 64) is None
    assert provenance.embeddings_mismatch(folder, {"prompt": "a"}, {}, "0" * 64) is None


def test_latents_whose_embeddings_were_replaced(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[2], tmp_path / "run")
    argv = calls(tiny_official, folder)
    old = provenance.sha256(folder / contract.EMBEDDINGS_FILE)
    first = ["--model_path", tiny_official, "--output_dir", folder]
    status, said = run_stage(1, *first, "--prompt", "another", said=tmp_path / "said")
    assert status == 0, said
    new = provenance.sha256(folder / contract.EMBEDDINGS_FILE)
    reason = (
        f"{folder}/stage2_latents.safetensors was made from embeddings with sha256 {old[:12]}…, which "
        f"{folder}/stage1_embeddings.safetensors has since replaced (sha256 {new[:12]}…)"
    )
    status, said = run_stage(3, *argv[3], "--strict", said=tmp_path / "said")
    assert status == 2
    assert errors(said) == [f"error: {reason}; --strict refuses that"]
    status, said = run_stage(3, *argv[3], said=tmp_path / "said")
    assert status == 0, said
    assert f"WARNING {reason}" in said


def test_each_file_says_what_it_was_made_from(whole):
    after, _ = whole
    folder = after[3]
    _, embeddings = load_embeddings(folder)
    _, latents = load_latents(folder)
    config = read_config(folder)
    assert len(embeddings[contract.MADE_FROM]) == len(latents[contract.MADE_FROM]) == 64
    embeddings_hash = provenance.sha256(folder / contract.EMBEDDINGS_FILE)
    assert config[contract.EMBEDDINGS_HASH] == latents[contract.EMBEDDINGS_HASH] == embeddings_hash
    assert config[contract.LATENTS_HASH] == provenance.sha256(folder / contract.LATENTS_FILE)


def test_the_same_contents_give_the_same_bytes(tmp_path):
    """The library writes metadata in an order that changes from process to process."""
    metadata = dict.fromkeys("qwertyuiop", 'a "quoted" \\ naïve 猫')
    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)}, metadata)
    header = path.read_bytes()[8:]
    order = [header.index(f'"{letter}":'.encode()) for letter in sorted(metadata)]
    assert order == sorted(order)
    tensors, read = load_tensors(path)
    assert read == metadata | {"dtype_info": '{"x": "torch.float32"}'}
    assert torch.equal(tensors["x"], torch.ones(3))


# Folders and files of someone else


def test_a_link_in_the_locks_place_is_not_followed(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[1], tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    (folder / contract.LOCK_FILE).symlink_to(tmp_path / "precious")
    status, said = run_stage(2, *calls(tiny_official, folder)[2], said=tmp_path / "said")
    assert status == 2, said
    assert f"cannot write to {folder}" in errors(said)[0]
    assert (tmp_path / "precious").read_text() == "mine"


def test_links_in_the_files_places_are_replaced_not_followed(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[2], tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "config").write_text((folder / contract.CONFIG_FILE).read_text())
    for name, target in ((contract.VIDEO_FILE, "precious"), (contract.CONFIG_FILE, "config")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / target)
    before = (tmp_path / "config").read_text()
    status, said = run_stage(3, *calls(tiny_official, folder)[3], said=tmp_path / "said")
    assert status == 0, said
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "config").read_text() == before
    assert not (folder / contract.VIDEO_FILE).is_symlink()


def test_a_config_does_not_say_where_to_write(whole, tmp_path, tiny_official):
    after, _ = whole
    folder = shutil.copytree(after[2], tmp_path / "run")
    config = json.loads((folder / contract.CONFIG_FILE).read_text())
    config |= {"output_video": str(tmp_path / "elsewhere.mp4"), "image_path": str(tmp_path / "x.png")}
    (folder / contract.CONFIG_FILE).write_text(json.dumps(config))
    status, said = run_stage(3, *calls(tiny_official, folder)[3], said=tmp_path / "said")
    assert status == 0, said
    assert names(tmp_path) == ["run", "said"]
    assert (folder / contract.VIDEO_FILE).exists()


def test_prompts_are_data(tmp_path, tiny_official):
    """Control characters reach neither the log nor the metadata; braces, quotes and shell signs are text."""
    prompt = "red\x1b[31m \x07{0} {prompt!r} %s $(touch x) `touch y` '\"\n--seed 4\x9b"
    folder = tmp_path / "run"
    argv = [
        "--model_path",
        tiny_official,
        "--output_dir",
        folder,
        "--prompt",
        prompt,
        "--negative_prompt",
        "\x1b]0;t\x07",
    ]
    status, said = run_stage(1, *argv, said=tmp_path / "said")
    assert status == 0, said
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", said)
    _, metadata = load_embeddings(folder)
    assert not any(re.search(r"[\x00-\x1f\x7f-\x9f]", value) for value in metadata.values())
    assert metadata["prompt"].startswith("red\\x1b[31m \\x07{0} {prompt!r} %s $(touch x)")
    text = (folder / contract.CONFIG_FILE).read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert read_config(folder)["prompt"] == prompt, "JSON keeps it exactly"
    assert names(tmp_path) == ["run", "said"]
    status, said = run_stage(2, "--input_dir", folder, *SMALL, "--strict", said=tmp_path / "said")
    assert status == 0, said


def test_no_code_runs_what_a_file_brings():
    sources = {path: path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("hunyuan_staged/**/*.py")]}
    for path, text in sources.items():
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, (path, call)
        for call in re.findall(r"AutoTokenizer\.from_pretrained\([^\n]*", text):
            assert "trust_remote_code=False" in call or "demo" in path.parts, (path, call)
        assert not re.search(r"pickle\.loads?\(|shell=True|trust_remote_code=True|(?<![.\w])(?:eval|exec)\(", text), (
            path
        )
