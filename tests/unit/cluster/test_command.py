"""The flags of a cluster: what is refused before anything starts, and which actors there are."""

import sys
from pathlib import Path

import pytest

from hunyuan_staged.cluster import command
from hunyuan_staged.stage_flags import read_whole_run

JOBS = ("--prompt", "a", "--seeds", "1-3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--prompt", "a"), "give --jobs FILE, --seeds, or --prompt several times"),
        ((*JOBS, "--denoisers", "0"), "--denoisers 0 is outside 1 to 1000"),
        ((*JOBS, "--gpus_per_denoiser", "-1"), "--gpus_per_denoiser -1 is outside 0 to 64"),
        (
            (*JOBS, "--gpus_per_denoiser", "1.5"),
            "--gpus_per_denoiser 1.5 is neither a whole number nor a part of one GPU",
        ),
        ((*JOBS, "--gpus_per_denoiser", "nan"), "--gpus_per_denoiser nan is outside 0 to 64"),
        ((*JOBS, "--gpus_per_decoder", "1.5"), "--gpus_per_decoder 1.5 is outside 0 to 1"),
        ((*JOBS, "--processes_per_denoiser", "2"), "--processes_per_denoiser goes with --gpus_per_denoiser 0"),
        ((*JOBS, "--gpus_per_job", "2"), "--gpus_per_job is for run_staged.sh; here it is --gpus_per_denoiser"),
        ((*JOBS, "--dry_run"), "--dry_run is for run_staged.sh"),
        ((*JOBS, "--video_length", "6"), "--video_length 6 is not 4n+1"),
        ((*JOBS, "--colour", "red"), "--colour is a flag of no stage"),
        (("--jobs", "absent.jsonl"), "--jobs absent.jsonl: No such file or directory"),
        (
            (*JOBS, "--gpus_per_denoiser", "60"),
            "--gpus_per_denoiser 60: the actors take 62 GPUs, and this machine has 0",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(argv, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("hunyuan_staged.cluster.driver.visible_gpus", lambda: 0)
    assert command.main(argv) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {message}") and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_ray_it_says_how_to_install_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command.main([*JOBS, "--gpus_per_denoiser", "0"]) == 2
    assert capfd.readouterr().err == (
        "error: Ray is not installed: pip install 'ray>=2.9', or this package with [cluster]\n"
    )
    assert list(tmp_path.iterdir()) == []


def pools(*argv: str) -> list[tuple[object, ...]]:
    args = command.build_parser().parse_args([*JOBS, *argv])
    command.check(args)
    found = command.pools_of(args, read_whole_run(args.flags), 3, Path("logs"))
    return [(one.kind, one.number, one.count, one.gpus, one.command.processes, one.command.gpus) for one in found]


def test_each_stage_has_its_actors_and_no_more_than_there_are_jobs():
    assert pools("--denoisers", "4", "--gpus_per_denoiser", "2") == [
        ("encoder", 1, 1, 1.0, 1, True),
        ("denoiser", 2, 3, 2.0, 2, True),
        ("decoder", 3, 1, 1.0, 1, True),
    ]
    assert pools("--gpus_per_denoiser", "0", "--processes_per_denoiser", "2", "--decoders", "2") == [
        ("encoder", 1, 1, 0.0, 1, False),
        ("denoiser", 2, 1, 0.0, 2, False),
        ("decoder", 3, 2, 0.0, 1, False),
    ]
    shared = pools("--gpus_per_denoiser", "0.5", "--gpus_per_encoder", "0.2", "--gpus_per_decoder", "0.3")
    assert [(gpus, processes) for *_, gpus, processes, _ in shared] == [(0.2, 1), (0.5, 1), (0.3, 1)]
    assert [one[:3] for one in pools("--super_resolution", "720p", "--enlargers", "2")] == [
        ("encoder", 1, 1),
        ("denoiser", 2, 1),
        ("enlarger", 2, 2),
        ("decoder", 3, 1),
    ]
    drafts = pools("--super_resolution", "720p", "--stop_after", "2")
    assert [one[0] for one in drafts] == ["encoder", "denoiser"], "a draft is neither enlarged nor decoded"


def test_what_the_stages_get_is_their_flags():
    args = command.build_parser().parse_args([*JOBS, "--decoders", "2", "--fps", "12", "--debug"])
    assert command.flags_of_stages(args) == [*JOBS, "--fps", "12", "--debug"]
