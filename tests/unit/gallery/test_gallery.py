"""Folders of jobs as cards, the commands that finish them, and the page's text."""

import json
import math
import os
import re
import shlex
import socket
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import stage2_transformer
from hunyuan_staged.files import contract, tensors
from hunyuan_staged.gallery import command, folders, page
from hunyuan_staged.gallery.finishing import ROOT, denoise_command
from hunyuan_staged.options import DenoiseOptions
from hunyuan_staged.parsing import parse
from hunyuan_staged.pipeline.denoising_records import options_to_go_on

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!-- $(touch x) `y`   é 红"
SETTINGS = {"num_inference_steps": 30, "seed": 7, "width": 160, "height": 96, "video_length": 33, "guidance_scale": 6.0}


def job(root: Path, name: str, files: tuple[str, ...] = (), **config: object) -> Path:
    """A folder with a config, and with empty files."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / contract.CONFIG_FILE).write_text(json.dumps({"prompt": "a"} | config))
    for file in files:
        (folder / file).touch()
    return folder


def stop(folder: Path, *, options: object = None, **settings: object) -> None:
    """Have the state of a stopped run in a folder."""
    metadata = {"format": "1", "step": "10", "settings": json.dumps(SETTINGS | settings)}
    metadata |= {} if options is None else {"options": json.dumps(options)}
    folder.mkdir(exist_ok=True, parents=True)
    tensors.save_state(folder, {"latents": torch.zeros(1, 2, 1, 1, 1)}, metadata)


def read(root: Path) -> dict[str, folders.Job]:
    return {one.name: one for one in (folders.read(folder, root) for folder in folders.find(root))}


def flags(line: str) -> list[str]:
    """A command's words after the script's name."""
    words = shlex.split(line)
    assert words[0] == "bash" and Path(words[1]).parent == ROOT
    return words[2:]


def test_how_far_each_job_is_and_what_finishes_it(tmp_path):
    job(tmp_path, "done", (contract.LATENTS_FILE, contract.VIDEO_FILE), seed=3, width=160, height=96)
    job(tmp_path, "set/latents", (contract.LATENTS_FILE,), stage2_elapsed_time=2, stage3_decode_time=0.5)
    job(tmp_path, "set/encoded", (contract.EMBEDDINGS_FILE,))
    stop(job(tmp_path, "stopped", (contract.EMBEDDINGS_FILE,)), options={"seed": 7, "four_steps": True})
    job(tmp_path, ".hidden")
    found = read(tmp_path)
    assert {name: one.status for name, one in found.items()} == {
        "done": folders.FINISHED,
        "set/latents": folders.DECODE,
        "set/encoded": folders.ENCODED,
        "stopped": folders.STOPPED,
    }
    done, latents, encoded, stopped = (found[name] for name in ("done", "set/latents", "set/encoded", "stopped"))
    assert (done.seed, done.settings, done.commands) == (3, {"size": "160x96"}, [])
    assert done.video == tmp_path / "done" / contract.VIDEO_FILE
    assert latents.seconds == 2.5 and [flags(line) for line in latents.commands] == [
        [f"--input_dir={tmp_path}/set/latents"]
    ]
    assert [flags(line) for line in encoded.commands] == [[f"--input_dir={tmp_path}/set/encoded"]] * 2
    assert "flags of its command line are not known" in encoded.note
    assert (stopped.note, stopped.seed) == ("stopped after step 10 of 30", 7)
    assert list(stopped.settings.items()) == [("size", "160x96"), ("steps", "30"), ("frames", "33"), ("guidance", "6")]
    assert flags(stopped.commands[0]) == [f"--input_dir={tmp_path}/stopped", "--resume", "--seed=7", "--four_steps"]
    assert "run_stage3.sh" in stopped.commands[1]


def test_a_video_of_other_latents_is_not_the_jobs(tmp_path):
    """A second run of stage 2 in one folder, with another seed: at its end, and while it is stopped."""
    folder = job(tmp_path, "a", (contract.VIDEO_FILE, contract.LATENTS_FILE), latents_sha256=sha256(b"").hexdigest())
    os.utime(folder / contract.VIDEO_FILE, (1, 1))
    (found,) = read(tmp_path).values()
    assert found.status == folders.FINISHED, "they are the same, only copied later"
    (folder / contract.LATENTS_FILE).write_text("other")
    (found,) = read(tmp_path).values()
    assert (found.status, found.video) == (folders.DECODE, None)
    assert found.note == "output_video.mp4 is of other latents: it will be replaced" and len(found.commands) == 1
    stop(folder, options={})
    (found,) = read(tmp_path).values()
    assert (found.status, found.video) == (folders.STOPPED, None)


def test_larger_latents_are_what_is_decoded(tmp_path):
    """A video of the base run was taken for that of the larger latents, and an old larger one for that of a new run."""
    folder = job(tmp_path, "a")
    base = tensors.save_latents(folder, torch.zeros(1, 32, 2, 6, 10), {})
    about = {contract.LATENTS_HASH: sha256(base.read_bytes()).hexdigest(), contract.ENLARGED_FROM: base.name}
    small, large = (folder / contract.at_resolution(contract.VIDEO_FILE, size) for size in (None, "demo_hd"))

    def decoded(latents: Path, video: Path) -> folders.Job:
        recorded = {"prompt": "a", contract.LATENTS_HASH: sha256(latents.read_bytes()).hexdigest()}
        (folder / contract.CONFIG_FILE).write_text(json.dumps(recorded))
        video.touch()
        return read(tmp_path)["a"]

    found = decoded(base, small)
    os.utime(small, (1, 1))
    assert (found.status, found.video, found.settings) == (folders.FINISHED, small, {})
    larger = tensors.save_latents(folder, torch.zeros(1, 32, 2, 12, 20), about, "demo_hd")
    (found,) = read(tmp_path).values()
    assert (found.status, found.video, found.settings) == (folders.DECODE, None, {"super resolution": "demo_hd"})
    assert [flags(line) for line in found.commands] == [[f"--input_dir={folder}"]]
    found = decoded(larger, large)
    assert (found.status, found.video, found.commands) == (folders.FINISHED, large, [])
    tensors.save_latents(folder, torch.ones(1, 32, 2, 6, 10), {})
    (found,) = read(tmp_path).values()
    assert (found.status, found.video, found.settings) == (folders.DECODE, None, {})
    assert found.note == "output_video.mp4 is of other latents: it will be replaced"


def test_super_resolution_that_was_asked_for_follows(tmp_path):
    """A draft of a whole run forgot it. As in a whole run, what shapes the base run alone is not given to it."""
    encoded, asked = (contract.EMBEDDINGS_FILE,), {"super_resolution": "1080p"}
    options = {"seed": 7, "preset": "fast", "cache_type": "teacache", "num_inference_steps": 9, "video_length": 9}
    stop(job(tmp_path, "draft", encoded, **asked), options=options | {"input_dir": "/in"})
    stop(job(tmp_path, "unknown", encoded, super_resolution="9999p"), options={})
    stop(job(tmp_path, "enlarging", encoded, **asked), options={"super_resolution": "1080p"})
    job(tmp_path, "encoded", encoded, **asked)
    for size in (None, "720p", "1080p"):
        folder = job(tmp_path, f"to {size}", **asked)
        made = tensors.save_latents(folder, torch.zeros(1, 32, 2, 6, 10), {})
        hashed = sha256(made.read_bytes()).hexdigest()
        if size:
            tensors.save_latents(folder, torch.zeros(1, 32, 2, 6, 10), {contract.LATENTS_HASH: hashed}, size)
    found = read(tmp_path)
    draft = found["draft"]
    assert [Path(shlex.split(line)[1]).name for line in draft.commands] == [
        f"run_stage{stage}.sh" for stage in (2, 2, 3)
    ]
    folders_of = ["--input_dir=/in", f"--output_dir={tmp_path}/draft", "--resume"]
    assert flags(draft.commands[1]) == [*folders_of, "--super_resolution=1080p", "--video_length=9", "--seed=7"]
    assert "--super_resolution=1080p" not in flags(draft.commands[0]) and "--preset=fast" in flags(draft.commands[0])
    assert draft.note == "stopped after step 10 of 30; super resolution to 1080p follows" and draft.line is None
    assert len(found["unknown"].commands) == 2 and "follows" not in found["unknown"].note
    assert len(found["enlarging"].commands) == 2 and "--super_resolution=1080p" in found["enlarging"].commands[0]
    assert flags(found["encoded"].commands[1]) == [f"--input_dir={tmp_path}/encoded", "--super_resolution=1080p"]
    enlarges = {name: len(found[name].commands) == 2 for name in found if name.startswith("to ")}
    assert enlarges == {"to None": True, "to 720p": True, "to 1080p": False}


def test_what_is_recorded_gives_the_options_again(tmp_path, monkeypatch):
    """Through the state's JSON and a shell's words; files by their whole paths."""
    adapter = tmp_path / "it's an adapter.safetensors"
    save_file({"weight": torch.ones(1)}, adapter)
    monkeypatch.chdir(tmp_path)
    given = DenoiseOptions(
        input_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"),
        seed=2**63,
        guidance_scale=1.5,
        enable_cache=True,
        cache_type="magcache",
        lora=(f"{adapter.name}:0.5",),
        model_path="org/name",
        resume=False,
        debug=True,
    )
    recorded = json.loads(json.dumps(options_to_go_on(given)))
    line = denoise_command(tmp_path / "out", recorded, resume=True)
    found = parse(DenoiseOptions, stage2_transformer.build_parser(), flags(line))
    same = {name: value for name, value in vars(given).items() if name not in ("resume", "debug", "lora")}
    assert {name: getattr(found, name) for name in same} == same
    assert found.resume and not found.debug and found.lora == (f"{adapter}:0.5",)


def test_a_job_of_a_file_keeps_what_was_asked_and_why_it_failed(tmp_path):
    folder = job(tmp_path, "a", (contract.EMBEDDINGS_FILE,), prompt="a")
    (folder / contract.JOB_FILE).write_text('{"name": "a", "prompt": "a", "seed": 3, "fps": 12}')
    (found,) = read(tmp_path).values()
    assert (found.status, found.seed) == (folders.ENCODED, 3)
    assert [flags(line)[1:] for line in found.commands] == [["--seed=3"], ["--fps=12.0"]]
    assert json.loads(found.line) == {"name": "a", "seed": 3, "fps": 12}
    (folder / contract.FAILURE_FILE).write_text('{"stage": 2, "error": "NaN"}')
    (found,) = read(tmp_path).values()
    assert (found.status, found.note, len(found.commands)) == (folders.FAILED, "stage 2 failed: NaN", 2)
    for name in (contract.CONFIG_FILE, contract.EMBEDDINGS_FILE):
        (folder / name).unlink()
    (found,) = read(tmp_path).values()
    assert (found.status, found.prompt, found.commands, found.line) == (folders.FAILED, "a", [], None)
    (folder / contract.JOB_FILE).write_text('{"evil": 1}')
    (found,) = read(tmp_path).values()
    assert found.status == folders.BROKEN and "'evil' is unknown" in found.note


def test_what_a_job_file_cannot_say_has_a_command_of_its_own(tmp_path):
    """A name that no job may have, flags of a whole run, broken values, embeddings in another folder."""
    stop(tmp_path / "a", options={"seed": 1, "lora": ["x:1"], "guidance_scale": 2})
    for name, options in {
        "a b": {},
        "larger": {"super_resolution": "720p"},
        "text": {"seed": "7"},
        "elsewhere": {"input_dir": "/x"},
        "shared": {"input_dir": str(tmp_path)},
    }.items():
        stop(tmp_path / name, options=options)
    found = read(tmp_path)
    assert json.loads(found["a"].line) == {"name": "a", "seed": 1, "lora": ["x:1"], "guidance_scale": 2.0}
    assert {name for name, one in found.items() if one.line} == {"a"}
    # With embeddings in the folder above, its jobs take those: as one did, and another did not.
    (tmp_path / contract.EMBEDDINGS_FILE).touch()
    assert {name for name, one in read(tmp_path).items() if one.line} == {"shared"}


def test_a_file_gives_values_of_known_flags_alone(tmp_path):
    options = {"seed": "7; rm -rf ~", "evil": "$(x)", "lora": "text", "compile": "yes", "dtype": ["a"], "debug": 1}
    stop(job(tmp_path, "a b; $(touch x)"), options=options)
    (found,) = read(tmp_path).values()
    assert flags(found.commands[0]) == [
        *(f"--input_dir={tmp_path}/a b; $(touch x)", "--resume"),
        "--seed=7; rm -rf ~",
    ]
    stop(tmp_path / "a b; $(touch x)", options={"dtype": "x\x1b[201~\nrm -rf ~"})
    (found,) = read(tmp_path).values()
    assert (found.status, found.commands) == (folders.BROKEN, [])
    assert found.note.startswith("control characters in --dtype=x\\x1b[201~")


def test_a_name_that_is_no_text_gives_no_command(tmp_path):
    name = os.fsdecode(b"a\xff")
    job(tmp_path, name, (contract.LATENTS_FILE, contract.PREVIEW_VIDEO))
    job(tmp_path, name + "b", (contract.VIDEO_FILE,))
    assert command.main([str(tmp_path)]) == 0
    broken, finished = data((tmp_path / "index.html").read_text())["jobs"]
    assert broken["status"] == folders.BROKEN and "a\\udcff' is not UTF-8 text: no command is given" in broken["note"]
    assert finished["link"] == "a%FFb/output_video.mp4"


def test_a_state_without_a_config_is_a_job_too(tmp_path):
    stop(tmp_path / "out")
    (found,) = read(tmp_path).values()
    assert found.status == folders.STOPPED and "it does not record its flags" in found.note
    assert flags(found.commands[0]) == [f"--input_dir={tmp_path}/out", "--resume"]


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ("{", "is not JSON"),
        ('{"prompt": 3}', "prompt is 3; allowed is text"),
        ("[]", "holds a JSON list, not an object"),
        ("{}", "is alone: neither embeddings nor latents nor a video are with it"),
    ],
)
def test_a_broken_folder_is_a_card_that_says_so(tmp_path, config, note):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / contract.CONFIG_FILE).write_text(config)
    (found,) = read(tmp_path).values()
    assert found.status == folders.BROKEN and note in found.note and found.commands == []


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"settings": "[]"},
        {"settings": '{"num_inference_steps": null}'},
        {"settings": json.dumps(SETTINGS | {"width": math.inf})},
        {"settings": json.dumps(SETTINGS | {"guidance_scale": 10**400})},
        {"settings": json.dumps(SETTINGS), "options": "{"},
    ],
)
def test_a_broken_state_is_a_card_that_says_so(tmp_path, change):
    folder = job(tmp_path, "a")
    tensors.save_state(folder, {"latents": torch.zeros(1, 2, 1, 1, 1)}, {"step": "1", "settings": "{}"} | change)
    (found,) = read(tmp_path).values()
    assert found.status == folders.BROKEN and "is no state of stage 2" in found.note
    (folder / contract.STATE_FILE).write_bytes(b"x")
    (found,) = read(tmp_path).values()
    assert "is not a whole safetensors file" in found.note


def test_a_folder_that_a_run_is_at_is_left_to_it(tmp_path):
    folder = job(tmp_path, "a", (contract.LATENTS_FILE,))
    lock = folder / contract.LOCK_FILE
    for owner, status in (
        (f"process {os.getpid()} on {socket.gethostname()}", folders.RUNNING),
        ("process 1 on another", folders.RUNNING),
        (f"process {2**22 + 1} on {socket.gethostname()}", folders.DECODE),  # above any number that Linux gives
        ("", folders.DECODE),
    ):
        lock.write_text(owner)
        (found,) = read(tmp_path).values()
        assert (found.status, bool(found.commands)) == (status, status == folders.DECODE), owner


def test_a_link_puts_no_other_file_into_the_page(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    root = tmp_path / "runs"
    folder = job(root, "a", (contract.LATENTS_FILE,), output_video=str(secret))
    for name in (contract.VIDEO_FILE, contract.PREVIEW_VIDEO, contract.PREVIEW_PICTURE):
        (folder / name).symlink_to(secret)
    (found,) = read(root).values()
    assert (found.video, found.preview, found.picture, found.status) == (None, None, None, folders.DECODE)
    named = root / "videos" / "red.mp4"
    named.parent.mkdir()
    named.touch()
    (folder / contract.CONFIG_FILE).write_text(json.dumps({"output_video": str(named)}))
    (found,) = read(root).values()
    assert (found.video, found.status) == (named, folders.FINISHED)


def data(text: str) -> dict:
    """What a page's script reads."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


def test_what_files_say_is_data_and_never_markup(tmp_path):
    job(tmp_path, "a", (contract.VIDEO_FILE,), prompt=HOSTILE, negative_prompt="JOBS_AS_JSON SCRIPT_HASH")
    text = page.render(read(tmp_path).values(), HOSTILE, tmp_path / "index.html")
    assert text.count("<script") == 2 and text.count("</script") == 2 and "<img" not in text and "alert(1)>" not in text
    found = data(text)
    assert found["title"] == found["jobs"][0]["prompt"] == HOSTILE
    assert found["jobs"][0]["settings"]["negative prompt"] == "JOBS_AS_JSON SCRIPT_HASH"


def test_small_files_are_in_the_page_and_large_ones_are_linked(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "EMBEDDED_BYTES", 10)
    monkeypatch.setattr(page, "EMBEDDED_IN_ALL", 17)
    for name, size in (("a", 10), ("b #1?", 11), ("c", 10)):
        folder = job(tmp_path / "runs", name)
        (folder / contract.VIDEO_FILE).write_bytes(b"v" * size)
        (folder / contract.PREVIEW_VIDEO).write_bytes(b"preview")
    found = data(page.render(read(tmp_path / "runs").values(), "t", tmp_path / "pages" / "index.html"))["jobs"]
    embedded = "data:video/mp4;base64,"
    assert [one["link"] for one in found] == [f"../runs/{name}/output_video.mp4" for name in ("a", "b%20%231%3F", "c")]
    assert found[0]["sources"] == [embedded + "dnZ2dnZ2dnZ2dg=="]
    assert found[1]["sources"] == ["../runs/b%20%231%3F/output_video.mp4", embedded + "cHJldmlldw=="]
    assert found[2]["sources"] == ["../runs/c/output_video.mp4"], "there is no room left"


def test_seconds_beyond_all_numbers_are_left_out(tmp_path):
    job(tmp_path, "a", (contract.VIDEO_FILE,), stage2_elapsed_time=1.7e308, stage3_decode_time=1.7e308, seed=10**400)
    (found,) = data(page.render(read(tmp_path).values(), "t", tmp_path / "index.html"))["jobs"]
    assert found["seconds"] is None and found["seed"] == str(10**400)


def test_the_command_says_what_it_wrote_or_why_not(tmp_path, capsys):
    assert command.main([str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert command.main([str(tmp_path / "empty")]) == 2
    job(tmp_path, "a", (contract.VIDEO_FILE,))
    assert command.main([str(tmp_path), "--output", str(tmp_path / "page.txt")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}/none does not exist",
        f"error: {tmp_path}/empty holds no job: no folder in it has generation_config.json",
        f"error: --output {tmp_path}/page.txt is not the name of an .html file",
    ]
    assert not (tmp_path / "empty" / "index.html").exists()
    job(tmp_path, "b", (contract.LATENTS_FILE,))
    assert command.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/index.html: 2 jobs: 1 finished, 1 to decode\n"
    assert data((tmp_path / "index.html").read_text())["title"] == tmp_path.name
