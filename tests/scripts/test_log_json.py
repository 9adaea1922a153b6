"""--log_json: what is in the file, and which files are refused."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from folders import denoised, embed
from forked import run_ranks, run_stage

from hunyuan_staged.files.event_log import EventLog


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def named(found: list[dict], event: str) -> list[dict]:
    return [one for one in found if one["event"] == event]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_official) -> Path:
    return embed(tmp_path_factory.mktemp("inputs"), tiny_official)


SMALL = ["--video_length", 9, "--num_inference_steps", 2]


def test_every_event_is_a_line_of_the_first_process(inputs, tmp_path):
    log = tmp_path / "new folder" / "log.jsonl"
    arguments = ["--input_dir", inputs, "--output_dir", tmp_path / "out", *SMALL, "--log_json", log]
    ranks = run_ranks(2, 2, *arguments, said=tmp_path / "said")
    assert [rank.status() for rank in ranks] == [0, 0], ranks[0].said()
    found = events(log)
    assert {one["stage"] for one in found} == {"stage 2"}
    assert all(datetime.fromisoformat(one["time"]).tzinfo for one in found)
    assert [found[0]["event"], found[-1]["event"]] == ["start", "done"]
    assert found[0]["options"]["num_inference_steps"] == 2 and found[0]["processes"] == 2
    (plan,) = named(found, "plan")
    assert plan["video"] == "160x96, 9 frames" and plan["ranks"].startswith("2: ")
    steps = [(one["done"], one["total"]) for one in named(found, "progress") if one["what"] == "denoising"]
    assert steps == [(1, 2), (2, 2)]
    assert all(one["seconds"] >= 0 for one in named(found, "progress"))
    assert [one["path"] for one in named(found, "output")] == [str(tmp_path / "out" / "stage2_latents.safetensors")]
    assert set(found[-1]["seconds"]) == {"load", "compute", "write", "all"} and found[-1]["peak_mib"]["host"] > 0


def test_a_further_run_adds_its_events_and_an_error_is_one(tmp_path, tiny_official):
    folder, log = denoised(tmp_path / "run", tiny_official), tmp_path / "log.jsonl"
    arguments = ["--input_dir", folder, "--log_json", log]
    for status in (0, 2):
        more = [] if status == 0 else ["--tile_size", 64, "--tile_overlap", 0.5, "--model_path", tmp_path]
        ended, said = run_stage(3, *arguments, *more, said=tmp_path / "said")
        assert ended == status, said
    found = events(log)
    assert [one["event"] for one in found if one["event"] in ("start", "done", "error")] == [
        *("start", "done", "start", "error"),
    ]
    assert found[-1]["kind"] == "InputError" and f"{tmp_path} is no model folder" in found[-1]["text"]


def test_a_warning_is_an_event(inputs, tmp_path):
    log = tmp_path / "log.jsonl"
    arguments = ["--input_dir", inputs, *SMALL, "--guidance_scale", 1, "--dry_run", "--log_json", log]
    status, said = run_stage(2, *arguments, said=tmp_path / "said")
    assert status == 0, said
    (warning,) = named(events(log), "warning")
    assert warning["text"] == "demo_t2v needs guidance: --guidance_scale 6 is right, not 1"


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (os.mkdir, "log", "log is no regular file"),
        (os.mkfifo, "log", "log is no regular file"),
        (lambda path: path.write_text("{\n"), "log", "log holds something else than events, and is left as it is"),
        (Path.touch, "log/log.jsonl", "log: {folder}/log is not a folder"),
        (Path.touch, "", "is empty"),
    ],
)
def test_a_file_that_is_no_log_is_refused_before_anything_loads(inputs, tmp_path, make, name, message):
    make(tmp_path / "log")
    arguments = ["--input_dir", inputs, *SMALL, "--log_json", tmp_path / name if name else ""]
    status, said = run_stage(2, *arguments, said=tmp_path / "said")
    place = f"{tmp_path}/" if name else ""
    assert (status, said) == (2, f"error: --log_json {place}{message.format(folder=tmp_path)}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"log", "said"}


def test_a_disk_that_fills_up_costs_the_log_and_not_the_run(capfd):
    log = EventLog(None, "stage x")
    log._handle = os.open("/dev/full", os.O_WRONLY)
    log.write("info", text="a")
    log.write("info", text="b")
    assert capfd.readouterr().err == "warning: --log_json ends here: No space left on device\n"
